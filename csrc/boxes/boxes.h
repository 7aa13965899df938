// SPDX-License-Identifier: Apache-2.0
// Contracts of the box ops and the checks that their CPU and CUDA versions share. Boxes are float
// or double, in any layout; all tensors of a call have one dtype and one device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "boxes/box_math.h"
#include "common/checks.h"
#include "common/layout.h"

namespace detr_fast {

// The sizes of a batch of pairwise problems.
struct PairwiseSizes {
  int64_t problems, n, m;
};

inline std::vector<int64_t> leading_sizes(const Tensor& tensor, int64_t dropped) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end() - dropped};
}

inline void check_boxes(const Tensor& boxes, const char* name, int64_t fewest_dims,
                        const char* shape) {
  STD_TORCH_CHECK(boxes.dim() >= fewest_dims && boxes.size(boxes.dim() - 1) == 4, name,
                  ": expected shape ", shape, ", got ", shape_string(boxes.sizes()));
  check_floating(boxes, name);
}

// box_iou, generalized_box_iou(boxes1 (..., N, 4), boxes2 (..., M, 4)) -> (..., N, M)
//   Boxes are corners (x0, y0, x1, y1); the leading sizes are equal.
inline PairwiseSizes check_pairwise(const Tensor& boxes1, const Tensor& boxes2) {
  check_boxes(boxes1, "boxes1", 2, "(..., N, 4)");
  check_boxes(boxes2, "boxes2", 2, "(..., M, 4)");
  check_alike(boxes2, "boxes2", boxes1, "boxes1");
  const int64_t n = boxes1.size(boxes1.dim() - 2), m = boxes2.size(boxes2.dim() - 2);
  std::vector<int64_t> expected = leading_sizes(boxes1, 2);
  int64_t problems = 1;
  for (const int64_t size : expected) problems *= size;
  expected.insert(expected.end(), {kAnySize, 4});
  check_shape(boxes2, "boxes2", expected);
  return {problems, n, m};
}

// box_iou_backward, generalized_box_iou_backward(grad (..., N, M), boxes1, boxes2, needs1, needs2)
//     -> gradients of boxes1 and boxes2; of the shape (0,) where not needed
//   No atomics: the result depends neither on the schedule nor on the number of threads.
inline PairwiseSizes check_pairwise_backward(const Tensor& grad, const Tensor& boxes1,
                                             const Tensor& boxes2) {
  const PairwiseSizes sizes = check_pairwise(boxes1, boxes2);
  std::vector<int64_t> expected = leading_sizes(boxes1, 2);
  expected.insert(expected.end(), {sizes.n, sizes.m});
  check_shape(grad, "grad", expected);
  check_alike(grad, "grad", boxes1, "boxes1");
  return sizes;
}

// generalized_box_iou_loss(boxes1 (..., 4), boxes2 (..., 4), eps) -> (...)
//   Boxes are corners; `eps` is added to the areas of union and hull.
// matched_box_losses(src (..., 4), tgt (..., 4)) -> l1 (...), giou_loss (...)
//   Boxes are centre and size (cx, cy, w, h).
// Returns the number of pairs.
inline int64_t check_matched(const Tensor& boxes1, const char* name1, const Tensor& boxes2,
                             const char* name2) {
  check_boxes(boxes1, name1, 1, "(..., 4)");
  check_boxes(boxes2, name2, 1, "(..., 4)");
  check_alike(boxes2, name2, boxes1, name1);
  check_shape(boxes2, name2, boxes1.sizes());
  return boxes1.numel() / 4;
}

// generalized_box_iou_loss_backward(grad (...), boxes1, boxes2, eps, needs1, needs2),
// matched_box_losses_backward(grad_l1 (...), grad_giou (...), src, tgt, needs_src, needs_tgt)
//     -> gradients of both sides; of the shape (0,) where not needed
inline void check_matched_gradient(const Tensor& grad, const char* name, const Tensor& boxes,
                                   const char* boxes_name) {
  check_shape(grad, name, leading_sizes(boxes, 1));
  check_alike(grad, name, boxes, boxes_name);
}

// A gradient that is read where it lies, also when it is expanded (of a sum), sliced or transposed.
struct Flat {
  Tensor tensor;
  int64_t step;  // from each element to the next in row-major order
};

// The step over the first `dims` dimensions; -1 where there is no single one.
inline int64_t flat_step(const Tensor& tensor, int64_t dims) {
  int64_t step = 0, wanted = -1;
  for (int64_t dim = dims - 1; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (wanted == -1) step = tensor.stride(dim);
    if (wanted != -1 && tensor.stride(dim) != wanted) return -1;
    wanted = tensor.stride(dim) * tensor.size(dim);
  }
  return step;
}

inline Flat flat(const Tensor& grad) {
  const int64_t step = flat_step(grad, grad.dim());
  return step == -1 ? Flat{torch::stable::contiguous(grad), 1} : Flat{grad, step};
}

struct PairwiseGrad {
  Tensor tensor;
  PairwiseSteps step;
};

// Copies the gradient only where its leading dimensions cannot be counted through by one step.
inline PairwiseGrad pairwise_grad(const Tensor& grad) {
  const int64_t leading = grad.dim() - 2, step = flat_step(grad, leading);
  if (step == -1) return pairwise_grad(torch::stable::contiguous(grad));
  return {grad, {step, grad.stride(leading), grad.stride(leading + 1)}};
}

// Where a gradient goes: like `boxes`, or an empty tensor where nobody needs it.
inline Tensor gradient_of(const Tensor& boxes, bool needed) {
  if (needed) return torch::stable::new_empty(boxes, boxes.sizes());
  return torch::stable::new_empty(boxes, {0});
}

}  // namespace detr_fast
