// SPDX-License-Identifier: Apache-2.0
// CPU twins of the box ops.
#include <torch/csrc/stable/ops.h>

#include "boxes/box_math.h"
#include "boxes/boxes.h"
#include "common/dispatch.h"
#include "common/library.h"
#include "common/multiversion.h"

namespace detr_fast {
namespace {

// The fewest pairs that are worth another thread (about 10 us of work).
constexpr int64_t kPairsPerThread = 16384;

int64_t rows_per_thread(int64_t columns) {
  return std::max<int64_t>(1, kPairsPerThread / std::max<int64_t>(1, columns));
}

template <typename scalar_t>
DETR_FAST_MULTIVERSION void generalized_box_iou_rows(const scalar_t* boxes1, const scalar_t* boxes2,
                                                     int64_t m, int64_t begin, int64_t end,
                                                     scalar_t* __restrict out) {
  for (int64_t row = begin; row < end; ++row) {
    const Box<scalar_t> box = load_box(boxes1 + row * 4);
    for (int64_t column = 0; column < m; ++column) {
      out[row * m + column] = generalized_box_iou(box, load_box(boxes2 + column * 4));
    }
  }
}

template <typename scalar_t>
DETR_FAST_MULTIVERSION void generalized_box_iou_backward_rows(const scalar_t* grad,
                                                              const scalar_t* boxes1,
                                                              const scalar_t* boxes2, int64_t m,
                                                              int64_t begin, int64_t end,
                                                              scalar_t* __restrict grad_boxes1) {
  for (int64_t row = begin; row < end; ++row) {
    const Box<scalar_t> box = load_box(boxes1 + row * 4);
    scalar_t x0 = 0, y0 = 0, x1 = 0, y1 = 0;
#pragma omp simd reduction(+ : x0, y0, x1, y1)
    for (int64_t column = 0; column < m; ++column) {
      const scalar_t weight = grad[row * m + column];
      const auto slope = generalized_box_iou_gradient(box, load_box(boxes2 + column * 4));
      x0 += weight * slope.x0;
      y0 += weight * slope.y0;
      x1 += weight * slope.x1;
      y1 += weight * slope.y1;
    }
    store_box(grad_boxes1 + row * 4, Box<scalar_t>{x0, y0, x1, y1});
  }
}

Tensor generalized_box_iou_cpu(const Tensor& boxes1, const Tensor& boxes2) {
  check_generalized_box_iou(boxes1, boxes2);
  const int64_t n = boxes1.size(0), m = boxes2.size(0);
  const Tensor rows = torch::stable::contiguous(boxes1);
  const Tensor columns = torch::stable::contiguous(boxes2);
  const Tensor out = torch::stable::new_empty(boxes1, {n, m});
  DETR_FAST_DISPATCH_FLOATING(boxes1, "generalized_box_iou", [&] {
    const auto* row_data = rows.const_data_ptr<scalar_t>();
    const auto* column_data = columns.const_data_ptr<scalar_t>();
    auto* out_data = out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, n, rows_per_thread(m), [&](int64_t begin, int64_t end) {
      generalized_box_iou_rows(row_data, column_data, m, begin, end, out_data);
    });
  });
  return out;
}

Tensor generalized_box_iou_backward_cpu(const Tensor& grad, const Tensor& boxes1,
                                        const Tensor& boxes2) {
  check_generalized_box_iou_backward(grad, boxes1, boxes2);
  const int64_t n = boxes1.size(0), m = boxes2.size(0);
  const Tensor weights = torch::stable::contiguous(grad);
  const Tensor rows = torch::stable::contiguous(boxes1);
  const Tensor columns = torch::stable::contiguous(boxes2);
  const Tensor out = torch::stable::new_empty(boxes1, {n, 4});
  DETR_FAST_DISPATCH_FLOATING(boxes1, "generalized_box_iou_backward", [&] {
    const auto* weight_data = weights.const_data_ptr<scalar_t>();
    const auto* row_data = rows.const_data_ptr<scalar_t>();
    const auto* column_data = columns.const_data_ptr<scalar_t>();
    auto* out_data = out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, n, rows_per_thread(m), [&](int64_t begin, int64_t end) {
      generalized_box_iou_backward_rows(weight_data, row_data, column_data, m, begin, end,
                                        out_data);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, CPU, m) {
  m.impl("generalized_box_iou", TORCH_BOX(&generalized_box_iou_cpu));
  m.impl("generalized_box_iou_backward", TORCH_BOX(&generalized_box_iou_backward_cpu));
}

}  // namespace detr_fast
