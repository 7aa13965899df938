// SPDX-License-Identifier: Apache-2.0
// Formulas for one pair of boxes, and their gradients: one truth for the CPU twin, the CUDA kernels
// and the simulator. A box is its corners (x0, y0, x1, y1), always passed by value: behind a
// reference it would keep GCC from vectorising the loops of the CPU twin. The operations stand in
// the order of the eager formula, so that CPU values equal torchvision's bit for bit.
#pragma once

#include "common/host_device.h"

namespace detr_fast {

template <typename T>
struct Box {
  T x0, y0, x1, y1;
};

template <typename T>
DETR_FAST_HOST_DEVICE Box<T> load_box(const T* corners) {
  return {corners[0], corners[1], corners[2], corners[3]};
}

template <typename T>
DETR_FAST_HOST_DEVICE void store_box(T* corners, Box<T> box) {
  corners[0] = box.x0, corners[1] = box.y0, corners[2] = box.x1, corners[3] = box.y1;
}

template <typename T>
DETR_FAST_HOST_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
DETR_FAST_HOST_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

// The width and height of what two boxes share and of the smallest box round both, before clamping
// at 0, and the areas of intersection, union and that hull.
template <typename T>
struct Overlap {
  T width, height, hull_width, hull_height;
  T intersection, union_area, hull;
};

template <typename T>
DETR_FAST_HOST_DEVICE Overlap<T> overlap(Box<T> a, Box<T> b) {
  Overlap<T> o;
  o.width = smaller(a.x1, b.x1) - larger(a.x0, b.x0);
  o.height = smaller(a.y1, b.y1) - larger(a.y0, b.y0);
  o.hull_width = larger(a.x1, b.x1) - smaller(a.x0, b.x0);
  o.hull_height = larger(a.y1, b.y1) - smaller(a.y0, b.y0);
  const T area_a = (a.x1 - a.x0) * (a.y1 - a.y0);
  const T area_b = (b.x1 - b.x0) * (b.y1 - b.y0);
  o.intersection = larger(o.width, T(0)) * larger(o.height, T(0));
  o.union_area = area_a + area_b - o.intersection;
  o.hull = larger(o.hull_width, T(0)) * larger(o.hull_height, T(0));
  return o;
}

// Generalized IoU, in [-1, 1] (Rezatofighi et al., CVPR 2019, algorithm 1).
template <typename T>
DETR_FAST_HOST_DEVICE T generalized_box_iou(Box<T> a, Box<T> b) {
  const Overlap<T> o = overlap(a, b);
  return o.intersection / o.union_area - (o.hull - o.union_area) / o.hull;
}

// The share of the gradient of max(a, b) that goes to a: one half at a tie, as in torch.maximum.
template <typename T>
DETR_FAST_HOST_DEVICE T larger_share(T a, T b) {
  return (a > b ? T(1) : T(0)) + (a == b ? T(0.5) : T(0));
}

// d generalized_box_iou(a, b) / d a
template <typename T>
DETR_FAST_HOST_DEVICE Box<T> generalized_box_iou_gradient(Box<T> a, Box<T> b) {
  const Overlap<T> o = overlap(a, b);
  // giou = I / U + U / H - 1 with U = area(a) + area(b) - I
  const T by_union = T(1) / o.hull - o.intersection / (o.union_area * o.union_area);
  const T by_intersection = T(1) / o.union_area - by_union;
  const T by_hull = -o.union_area / (o.hull * o.hull);
  // a side that is clamped, or just 0, has no gradient, as in torch.relu
  const T by_width = o.width > 0 ? by_intersection * larger(o.height, T(0)) : T(0);
  const T by_height = o.height > 0 ? by_intersection * larger(o.width, T(0)) : T(0);
  const T by_hull_width = o.hull_width > 0 ? by_hull * larger(o.hull_height, T(0)) : T(0);
  const T by_hull_height = o.hull_height > 0 ? by_hull * larger(o.hull_width, T(0)) : T(0);
  const T by_area_width = by_union * (a.y1 - a.y0);
  const T by_area_height = by_union * (a.x1 - a.x0);
  return {-(by_area_width + by_width * larger_share(a.x0, b.x0) +
            by_hull_width * larger_share(b.x0, a.x0)),
          -(by_area_height + by_height * larger_share(a.y0, b.y0) +
            by_hull_height * larger_share(b.y0, a.y0)),
          by_area_width + by_width * larger_share(b.x1, a.x1) +
              by_hull_width * larger_share(a.x1, b.x1),
          by_area_height + by_height * larger_share(b.y1, a.y1) +
              by_hull_height * larger_share(a.y1, b.y1)};
}

}  // namespace detr_fast
