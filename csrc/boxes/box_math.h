// SPDX-License-Identifier: Apache-2.0
// Formulas for one pair of boxes, and their gradients: one truth for the CPU twin, the CUDA kernels
// and the simulator. A box is its corners (x0, y0, x1, y1) unless a name says centre and size,
// always passed by value: behind a reference it would keep GCC from vectorising the loops of the
// CPU twin. The operations stand in the order of the eager formula, so that values equal
// torchvision's bit for bit.
#pragma once

#include "common/host_device.h"

namespace detr_fast {

// Aligned so that a kernel moves a box by one 16-byte access (two for double).
template <typename T>
struct alignas(16) Box {
  T x0, y0, x1, y1;
};

template <typename T>
DETR_FAST_HOST_DEVICE Box<T> scaled(T weight, Box<T> box) {
  return {weight * box.x0, weight * box.y0, weight * box.x1, weight * box.y1};
}

// sum + weight * box
template <typename T>
DETR_FAST_HOST_DEVICE Box<T> add_scaled(Box<T> sum, T weight, Box<T> box) {
  return {sum.x0 + weight * box.x0, sum.y0 + weight * box.y0, sum.x1 + weight * box.x1,
          sum.y1 + weight * box.y1};
}

// Centre and size (cx, cy, w, h) to corners.
template <typename T>
DETR_FAST_HOST_DEVICE Box<T> corners_of(Box<T> b) {
  const T half_width = T(0.5) * b.x1, half_height = T(0.5) * b.y1;
  return {b.x0 - half_width, b.y0 - half_height, b.x0 + half_width, b.y0 + half_height};
}

// The gradient of a centre and size from that of its corners.
template <typename T>
DETR_FAST_HOST_DEVICE Box<T> centre_gradient(Box<T> corners) {
  return {corners.x0 + corners.x1, corners.y0 + corners.y1, T(0.5) * (corners.x1 - corners.x0),
          T(0.5) * (corners.y1 - corners.y0)};
}

// How the smallest box round a pair counts: not at all (IoU), by its area with sides clamped at 0
// (GIoU), or by the plain product of its sides (torchvision's GIoU loss). The last two differ for
// boxes of negative extent only.
enum class Hull { kNone, kClamped, kSigned };

// The sides of what two boxes share and of their hull, before clamping, and the areas.
template <typename T>
struct Overlap {
  T width, height, hull_width, hull_height;
  T intersection, union_area, hull;
};

template <Hull kHull, typename T>
DETR_FAST_HOST_DEVICE Overlap<T> overlap(Box<T> a, Box<T> b) {
  Overlap<T> o;
  o.width = smaller(a.x1, b.x1) - larger(a.x0, b.x0);
  o.height = smaller(a.y1, b.y1) - larger(a.y0, b.y0);
  o.hull_width = larger(a.x1, b.x1) - smaller(a.x0, b.x0);
  o.hull_height = larger(a.y1, b.y1) - smaller(a.y0, b.y0);
  const T area_a = product(a.x1 - a.x0, a.y1 - a.y0);
  const T area_b = product(b.x1 - b.x0, b.y1 - b.y0);
  o.intersection = product(larger(o.width, T(0)), larger(o.height, T(0)));
  o.union_area = area_a + area_b - o.intersection;
  o.hull = kHull == Hull::kSigned
               ? product(o.hull_width, o.hull_height)
               : product(larger(o.hull_width, T(0)), larger(o.hull_height, T(0)));
  return o;
}

// numerator / denominator; 0 where the denominator is 0, so that an empty area ends a term.
template <typename T>
DETR_FAST_HOST_DEVICE T ratio(T numerator, T denominator) {
  return denominator == 0 ? T(0) : numerator / denominator;
}

// IoU (Hull::kNone, in [0, 1]) or generalized IoU (in [-1, 1]; Rezatofighi et al., CVPR 2019,
// algorithm 1). `eps` is added to the denominators. Without union the IoU is 0, without hull the
// generalized IoU is the IoU.
template <Hull kHull, typename T>
DETR_FAST_HOST_DEVICE T similarity(Box<T> a, Box<T> b, T eps) {
  const Overlap<T> o = overlap<kHull>(a, b);
  const T iou = ratio(o.intersection, o.union_area + eps);
  if constexpr (kHull == Hull::kNone) return iou;
  return iou - ratio(o.hull - o.union_area, o.hull + eps);
}

// 1 / value; 0 where that is infinite: an empty term is constant, its gradient 0.
template <typename T>
DETR_FAST_HOST_DEVICE T reciprocal(T value) {
  const T result = T(1) / value;
  return result == T(kInfinity) || result == -T(kInfinity) ? T(0) : result;
}

// The share of the gradient of max(a, b) that goes to a: one half at a tie, as in torch.maximum.
template <typename T>
DETR_FAST_HOST_DEVICE T larger_share(T a, T b) {
  return (a > b ? T(1) : T(0)) + (a == b ? T(0.5) : T(0));
}

template <typename T>
struct PairGradient {
  Box<T> first, second;
};

// d similarity(a, b) / d a and / d b
template <Hull kHull, typename T>
DETR_FAST_HOST_DEVICE PairGradient<T> similarity_gradient(Box<T> a, Box<T> b, T eps) {
  const Overlap<T> o = overlap<kHull>(a, b);
  // with the union U = area(a) + area(b) - I: iou = I / U, giou = iou + U / H - 1
  const T union_area = o.union_area + eps;
  const T per_union = reciprocal(union_area);
  T by_area = -(o.intersection * per_union) * per_union;
  T by_hull_width = 0, by_hull_height = 0;
  if constexpr (kHull != Hull::kNone) {
    const T per_hull = reciprocal(o.hull + eps);
    const T by_hull = -(union_area * per_hull) * per_hull;
    by_area += per_hull;
    // a clamped hull, which comes without eps, has no area where a side is clamped: by_hull is 0
    by_hull_width = by_hull * o.hull_height;
    by_hull_height = by_hull * o.hull_width;
  }
  // a side that is clamped, or just 0, has no gradient, as in torch.relu
  const T by_intersection = per_union - by_area;
  const bool meets = o.width > 0 && o.height > 0;
  const T by_width = meets ? by_intersection * o.height : T(0);
  const T by_height = meets ? by_intersection * o.width : T(0);
  // a's share of the inner sides where it has the larger coordinate, of the hull's where not
  const T x0 = larger_share(a.x0, b.x0), y0 = larger_share(a.y0, b.y0);
  const T x1 = larger_share(a.x1, b.x1), y1 = larger_share(a.y1, b.y1);
  const T a_width = by_area * (a.y1 - a.y0), a_height = by_area * (a.x1 - a.x0);
  const T b_width = by_area * (b.y1 - b.y0), b_height = by_area * (b.x1 - b.x0);
  return {{-(a_width + by_width * x0 + by_hull_width * (1 - x0)),
           -(a_height + by_height * y0 + by_hull_height * (1 - y0)),
           a_width + by_width * (1 - x1) + by_hull_width * x1,
           a_height + by_height * (1 - y1) + by_hull_height * y1},
          {-(b_width + by_width * (1 - x0) + by_hull_width * x0),
           -(b_height + by_height * (1 - y0) + by_hull_height * y0),
           b_width + by_width * x1 + by_hull_width * (1 - x1),
           b_height + by_height * y1 + by_hull_height * (1 - y1)}};
}

// 1 - GIoU of a pair of corners (Rezatofighi et al., algorithm 2).
template <typename T>
DETR_FAST_HOST_DEVICE T generalized_box_iou_loss(Box<T> a, Box<T> b, T eps) {
  return 1 - similarity<Hull::kSigned>(a, b, eps);
}

// The gradients of a and b from that of the loss.
template <typename T>
DETR_FAST_HOST_DEVICE PairGradient<T> generalized_box_iou_loss_gradient(Box<T> a, Box<T> b, T eps,
                                                                        T grad) {
  const auto slope = similarity_gradient<Hull::kSigned>(a, b, eps);
  return {scaled(-grad, slope.first), scaled(-grad, slope.second)};
}

// The distances, in elements, between the neighbours of a gradient (problems, n, m): 0 where it is
// expanded.
struct PairwiseSteps {
  long long problem, row, column;
};

template <typename T>
struct BoxLosses {
  T l1, giou;
};

// The sum of the distances of four coordinates, added from left to right.
template <typename T>
DETR_FAST_HOST_DEVICE T l1_distance(Box<T> a, Box<T> b) {
  const T cx = a.x0 - b.x0, cy = a.y0 - b.y0, w = a.x1 - b.x1, h = a.y1 - b.y1;
  return larger(cx, -cx) + larger(cy, -cy) + larger(w, -w) + larger(h, -h);
}

// L1 distance and 1 - GIoU of a pair given as centre and size (Carion et al., ECCV 2020, equation 4
// without its weights).
template <typename T>
DETR_FAST_HOST_DEVICE BoxLosses<T> matched_box_losses(Box<T> src, Box<T> tgt) {
  return {l1_distance(src, tgt),
          1 - similarity<Hull::kClamped>(corners_of(src), corners_of(tgt), T(0))};
}

template <typename T>
DETR_FAST_HOST_DEVICE T sign(T value) {
  return (value > 0 ? T(1) : T(0)) - (value < 0 ? T(1) : T(0));
}

// The gradients of src and tgt from those of their two losses.
template <typename T>
DETR_FAST_HOST_DEVICE PairGradient<T> matched_box_losses_gradient(Box<T> src, Box<T> tgt,
                                                                  BoxLosses<T> grad) {
  const auto slope = similarity_gradient<Hull::kClamped>(corners_of(src), corners_of(tgt), T(0));
  const Box<T> signs = {sign(src.x0 - tgt.x0), sign(src.y0 - tgt.y0), sign(src.x1 - tgt.x1),
                        sign(src.y1 - tgt.y1)};
  return {add_scaled(scaled(grad.l1, signs), -grad.giou, centre_gradient(slope.first)),
          add_scaled(scaled(-grad.l1, signs), -grad.giou, centre_gradient(slope.second))};
}

}  // namespace detr_fast
