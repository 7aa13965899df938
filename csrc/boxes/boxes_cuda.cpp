// SPDX-License-Identifier: Apache-2.0
// Host side of the CUDA box ops: checks, allocation, launch. Compiled by the host compiler alone.
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "boxes/boxes.h"
#include "boxes/boxes_kernels.h"
#include "common/device.h"
#include "common/dispatch.h"
#include "common/library.h"

namespace detr_fast {
namespace {

// The kernels count by 32 bits: boxes, and pairs where there are any.
constexpr int64_t kMost = std::numeric_limits<int>::max();

void check_countable(PairwiseSizes sizes) {
  const int64_t longer = std::max(sizes.n, sizes.m), shorter = std::min(sizes.n, sizes.m);
  // problems * longer boxes are in one tensor, so that their number does not overflow
  STD_TORCH_CHECK(sizes.problems * longer <= kMost / std::max<int64_t>(1, shorter),
                  "expected at most ", kMost, " pairs, got ", sizes.problems, " x ", sizes.n, " x ",
                  sizes.m, "; split the first set of boxes");
}

int check_countable(int64_t pairs) {
  const int count = static_cast<int>(pairs);
  STD_TORCH_CHECK(count == pairs, "expected at most ", kMost, " pairs, got ", pairs,
                  "; split both sets of boxes");
  return count;
}

// Contiguous and on 16 bytes, so that a kernel loads whole boxes; a slice of a flat buffer may lie
// in between.
Tensor aligned(const Tensor& boxes) {
  const Tensor tensor = dense(boxes);
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

// Where a kernel puts a side of a gradient; nullptr where it is not needed.
template <typename scalar_t>
scalar_t* side_data(const DeviceScope& device, const Tensor& tensor, bool needed) {
  return needed ? device.write<scalar_t>(tensor) : nullptr;
}

template <Hull kHull>
Tensor pairwise_iou_cuda(const Tensor& boxes1, const Tensor& boxes2) {
  const PairwiseSizes sizes = check_pairwise(boxes1, boxes2);
  check_countable(sizes);
  const DeviceScope device(boxes1);
  std::vector<int64_t> out_sizes = leading_sizes(boxes1, 1);
  out_sizes.push_back(sizes.m);
  const Tensor out = torch::stable::new_empty(boxes1, out_sizes);
  if (out.numel() == 0) return out;
  const Tensor rows = aligned(boxes1), columns = aligned(boxes2);
  dispatch_floating(boxes1, [&](auto zero) {
    using scalar_t = decltype(zero);
    launch_pairwise_iou<kHull, scalar_t>(
        device.read<scalar_t>(rows), device.read<scalar_t>(columns), int(sizes.problems),
        int(sizes.n), int(sizes.m), device.write<scalar_t>(out), device.stream());
  });
  device.check_launch();
  return out;
}

template <Hull kHull>
std::tuple<Tensor, Tensor> pairwise_iou_backward_cuda(const Tensor& grad, const Tensor& boxes1,
                                                      const Tensor& boxes2, bool needs1,
                                                      bool needs2) {
  const PairwiseSizes sizes = check_pairwise_backward(grad, boxes1, boxes2);
  check_countable(sizes);
  const int problems = int(sizes.problems), n = int(sizes.n), m = int(sizes.m);
  const DeviceScope device(boxes1);
  const PairwiseGrad weights = pairwise_grad(grad);
  const Tensor rows = aligned(boxes1), columns = aligned(boxes2);
  const Tensor grad1 = gradient_of(boxes1, needs1), grad2 = gradient_of(boxes2, needs2);
  if (grad1.numel() > 0) {
    dispatch_floating(boxes1, [&](auto zero) {
      using scalar_t = decltype(zero);
      launch_pairwise_iou_backward_rows<kHull, scalar_t>(
          device.read<scalar_t>(weights.tensor), weights.step, device.read<scalar_t>(rows),
          device.read<scalar_t>(columns), problems, n, m, device.write<scalar_t>(grad1),
          device.stream());
    });
    device.check_launch();
  }
  if (grad2.numel() > 0) {
    const int splits = pairwise_iou_splits(n);
    const Tensor partial =
        torch::stable::new_empty(boxes1, {problems, splits > 1 ? splits : 0, m, 4});
    dispatch_floating(boxes1, [&](auto zero) {
      using scalar_t = decltype(zero);
      launch_pairwise_iou_backward_columns<kHull, scalar_t>(
          device.read<scalar_t>(weights.tensor), weights.step, device.read<scalar_t>(rows),
          device.read<scalar_t>(columns), problems, n, m, device.write<scalar_t>(partial),
          device.write<scalar_t>(grad2), device.stream());
    });
    device.check_launch();
  }
  return {grad1, grad2};
}

Tensor generalized_box_iou_loss_cuda(const Tensor& boxes1, const Tensor& boxes2, double eps) {
  const int pairs = check_countable(check_matched(boxes1, "boxes1", boxes2, "boxes2"));
  const DeviceScope device(boxes1);
  const Tensor out = torch::stable::new_empty(boxes1, leading_sizes(boxes1, 1));
  if (pairs == 0) return out;
  const Tensor first = aligned(boxes1), second = aligned(boxes2);
  dispatch_floating(boxes1, [&](auto zero) {
    using scalar_t = decltype(zero);
    launch_generalized_box_iou_loss<scalar_t>(device.read<scalar_t>(first),
                                              device.read<scalar_t>(second), scalar_t(eps), pairs,
                                              device.write<scalar_t>(out), device.stream());
  });
  device.check_launch();
  return out;
}

std::tuple<Tensor, Tensor> generalized_box_iou_loss_backward_cuda(const Tensor& grad,
                                                                  const Tensor& boxes1,
                                                                  const Tensor& boxes2, double eps,
                                                                  bool needs1, bool needs2) {
  const int pairs = check_countable(check_matched(boxes1, "boxes1", boxes2, "boxes2"));
  check_matched_gradient(grad, "grad", boxes1, "boxes1");
  const DeviceScope device(boxes1);
  const Tensor grad1 = gradient_of(boxes1, needs1), grad2 = gradient_of(boxes2, needs2);
  if (pairs == 0) return {grad1, grad2};
  const Flat weights = flat(grad);
  const Tensor first = aligned(boxes1), second = aligned(boxes2);
  dispatch_floating(boxes1, [&](auto zero) {
    using scalar_t = decltype(zero);
    launch_generalized_box_iou_loss_backward<scalar_t>(
        device.read<scalar_t>(weights.tensor), weights.step, device.read<scalar_t>(first),
        device.read<scalar_t>(second), scalar_t(eps), pairs,
        side_data<scalar_t>(device, grad1, needs1), side_data<scalar_t>(device, grad2, needs2),
        device.stream());
  });
  device.check_launch();
  return {grad1, grad2};
}

std::tuple<Tensor, Tensor> matched_box_losses_cuda(const Tensor& src, const Tensor& tgt) {
  const int pairs = check_countable(check_matched(src, "src", tgt, "tgt"));
  const DeviceScope device(src);
  const std::vector<int64_t> sizes = leading_sizes(src, 1);
  const Tensor l1 = torch::stable::new_empty(src, sizes);
  const Tensor giou = torch::stable::new_empty(src, sizes);
  if (pairs == 0) return {l1, giou};
  const Tensor first = aligned(src), second = aligned(tgt);
  dispatch_floating(src, [&](auto zero) {
    using scalar_t = decltype(zero);
    launch_matched_box_losses<scalar_t>(device.read<scalar_t>(first), device.read<scalar_t>(second),
                                        pairs, device.write<scalar_t>(l1),
                                        device.write<scalar_t>(giou), device.stream());
  });
  device.check_launch();
  return {l1, giou};
}

std::tuple<Tensor, Tensor> matched_box_losses_backward_cuda(const Tensor& grad_l1,
                                                            const Tensor& grad_giou,
                                                            const Tensor& src, const Tensor& tgt,
                                                            bool needs_src, bool needs_tgt) {
  const int pairs = check_countable(check_matched(src, "src", tgt, "tgt"));
  check_matched_gradient(grad_l1, "grad_l1", src, "src");
  check_matched_gradient(grad_giou, "grad_giou", src, "src");
  const DeviceScope device(src);
  const Tensor grad_src = gradient_of(src, needs_src), grad_tgt = gradient_of(tgt, needs_tgt);
  if (pairs == 0) return {grad_src, grad_tgt};
  const Flat weights_l1 = flat(grad_l1), weights_giou = flat(grad_giou);
  const Tensor first = aligned(src), second = aligned(tgt);
  dispatch_floating(src, [&](auto zero) {
    using scalar_t = decltype(zero);
    launch_matched_box_losses_backward<scalar_t>(
        device.read<scalar_t>(weights_l1.tensor), weights_l1.step,
        device.read<scalar_t>(weights_giou.tensor), weights_giou.step, device.read<scalar_t>(first),
        device.read<scalar_t>(second), pairs, side_data<scalar_t>(device, grad_src, needs_src),
        side_data<scalar_t>(device, grad_tgt, needs_tgt), device.stream());
  });
  device.check_launch();
  return {grad_src, grad_tgt};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, DETR_FAST_CUDA_KEY, m) {
  m.impl("box_iou", TORCH_BOX(&pairwise_iou_cuda<Hull::kNone>));
  m.impl("box_iou_backward", TORCH_BOX(&pairwise_iou_backward_cuda<Hull::kNone>));
  m.impl("generalized_box_iou", TORCH_BOX(&pairwise_iou_cuda<Hull::kClamped>));
  m.impl("generalized_box_iou_backward", TORCH_BOX(&pairwise_iou_backward_cuda<Hull::kClamped>));
  m.impl("generalized_box_iou_loss", TORCH_BOX(&generalized_box_iou_loss_cuda));
  m.impl("generalized_box_iou_loss_backward", TORCH_BOX(&generalized_box_iou_loss_backward_cuda));
  m.impl("matched_box_losses", TORCH_BOX(&matched_box_losses_cuda));
  m.impl("matched_box_losses_backward", TORCH_BOX(&matched_box_losses_backward_cuda));
}

}  // namespace detr_fast
