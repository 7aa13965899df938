// SPDX-License-Identifier: Apache-2.0
// Contracts of the box ops and the checks that their CPU and CUDA versions share.
#pragma once

#include "common/checks.h"

namespace detr_fast {

// generalized_box_iou(boxes1 (N, 4), boxes2 (M, 4)) -> (N, M)
//   Boxes are corners (x0, y0, x1, y1), float or double.
inline void check_generalized_box_iou(const Tensor& boxes1, const Tensor& boxes2) {
  check_shape(boxes1, "boxes1", {kAnySize, 4});
  check_shape(boxes2, "boxes2", {kAnySize, 4});
  check_alike(boxes2, "boxes2", boxes1, "boxes1");
}

// generalized_box_iou_backward(grad (N, M), boxes1 (N, 4), boxes2 (M, 4)) -> (N, 4)
//   The gradient of boxes1. GIoU is symmetric: that of boxes2 is the same op on
//   (grad.T, boxes2, boxes1). No atomics: the result does not depend on the schedule.
inline void check_generalized_box_iou_backward(const Tensor& grad, const Tensor& boxes1,
                                               const Tensor& boxes2) {
  check_generalized_box_iou(boxes1, boxes2);
  check_shape(grad, "grad", {boxes1.size(0), boxes2.size(0)});
  check_alike(grad, "grad", boxes1, "boxes1");
}

}  // namespace detr_fast
