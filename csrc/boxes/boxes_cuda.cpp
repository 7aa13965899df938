// SPDX-License-Identifier: Apache-2.0
// Host side of the CUDA box ops: checks, allocation, launch. Compiled by the host compiler alone.
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "boxes/boxes.h"
#include "boxes/boxes_kernels.h"
#include "common/device.h"
#include "common/dispatch.h"
#include "common/library.h"

namespace detr_fast {
namespace {

void check_pair_count(int64_t n, int64_t m) {
  STD_TORCH_CHECK(n * m <= std::numeric_limits<int>::max(), "boxes1 x boxes2: expected at most ",
                  std::numeric_limits<int>::max(), " pairs, got ", n, " x ", m);
}

Tensor generalized_box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2) {
  check_generalized_box_iou(boxes1, boxes2);
  const int64_t n = boxes1.size(0), m = boxes2.size(0);
  check_pair_count(n, m);
  const DeviceScope device(boxes1);
  const Tensor out = torch::stable::new_empty(boxes1, {n, m});
  if (out.numel() == 0) return out;
  const Tensor rows = torch::stable::contiguous(boxes1);
  const Tensor columns = torch::stable::contiguous(boxes2);
  DETR_FAST_DISPATCH_FLOATING(boxes1, "generalized_box_iou", [&] {
    launch_generalized_box_iou<scalar_t>(
        device.read<scalar_t>(rows), device.read<scalar_t>(columns), static_cast<int>(n),
        static_cast<int>(m), device.write<scalar_t>(out), device.stream());
  });
  device.check_launch();
  return out;
}

Tensor generalized_box_iou_backward_cuda(const Tensor& grad, const Tensor& boxes1,
                                         const Tensor& boxes2) {
  check_generalized_box_iou_backward(grad, boxes1, boxes2);
  const int64_t n = boxes1.size(0), m = boxes2.size(0);
  check_pair_count(n, m);
  const DeviceScope device(boxes1);
  const Tensor out = torch::stable::new_empty(boxes1, {n, 4});
  if (out.numel() == 0) return out;
  const Tensor weights = torch::stable::contiguous(grad);
  const Tensor rows = torch::stable::contiguous(boxes1);
  const Tensor columns = torch::stable::contiguous(boxes2);
  DETR_FAST_DISPATCH_FLOATING(boxes1, "generalized_box_iou_backward", [&] {
    launch_generalized_box_iou_backward<scalar_t>(
        device.read<scalar_t>(weights), device.read<scalar_t>(rows), device.read<scalar_t>(columns),
        static_cast<int>(n), static_cast<int>(m), device.write<scalar_t>(out), device.stream());
  });
  device.check_launch();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, DETR_FAST_CUDA_KEY, m) {
  m.impl("generalized_box_iou", TORCH_BOX(&generalized_box_iou_cuda));
  m.impl("generalized_box_iou_backward", TORCH_BOX(&generalized_box_iou_backward_cuda));
}

}  // namespace detr_fast
