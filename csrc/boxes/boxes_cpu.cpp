// SPDX-License-Identifier: Apache-2.0
// CPU twins of the box ops. The four coordinates of the inner loop's boxes are laid out as four
// arrays of m, which makes every load of a vector contiguous.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "boxes/box_math.h"
#include "boxes/boxes.h"
#include "common/dispatch.h"
#include "common/library.h"
#include "common/multiversion.h"

namespace detr_fast {
namespace {

// The fewest pairs that are worth another thread (about 10 us of work).
constexpr int64_t kPairsPerThread = 16384;
// The most pieces that the rows of one problem are cut into for the gradient of its columns.
constexpr int64_t kMostBlocks = 64;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t rows_per_thread(int64_t columns) {
  return divide_up(kPairsPerThread, std::max<int64_t>(1, columns));
}

template <typename T>
DETR_FAST_HOST_DEVICE Box<T> load_box(const T* corners) {
  return {corners[0], corners[1], corners[2], corners[3]};
}

template <typename T>
DETR_FAST_HOST_DEVICE void store_box(T* corners, Box<T> box) {
  corners[0] = box.x0, corners[1] = box.y0, corners[2] = box.x1, corners[3] = box.y1;
}

// boxes (m, 4) -> out (4, m)
template <typename scalar_t>
void transpose_boxes(const scalar_t* boxes, int64_t m, scalar_t* out) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t side = 0; side < 4; ++side) out[side * m + i] = boxes[i * 4 + side];
  }
}

template <Hull kHull, typename scalar_t>
DETR_FAST_MULTIVERSION void pairwise_iou_row(Box<scalar_t> box, const scalar_t* columns, int64_t m,
                                             scalar_t* __restrict out) {
  const scalar_t *x0 = columns, *y0 = x0 + m, *x1 = y0 + m, *y1 = x1 + m;
  for (int64_t i = 0; i < m; ++i) {
    out[i] = similarity<kHull>(box, Box<scalar_t>{x0[i], y0[i], x1[i], y1[i]}, scalar_t(0));
  }
}

// Adds to `column_sums` (4, m) if the gradient of the columns is needed.
template <Hull kHull, bool kColumns, typename scalar_t>
DETR_FAST_MULTIVERSION void pairwise_iou_backward_row(const scalar_t* weights, Box<scalar_t> box,
                                                      const scalar_t* columns, int64_t m,
                                                      scalar_t* __restrict row_sum,
                                                      scalar_t* __restrict column_sums) {
  const scalar_t *x0 = columns, *y0 = x0 + m, *x1 = y0 + m, *y1 = x1 + m;
  scalar_t *sum_x0 = column_sums, *sum_y0 = sum_x0 + m, *sum_x1 = sum_y0 + m, *sum_y1 = sum_x1 + m;
  scalar_t row_x0 = 0, row_y0 = 0, row_x1 = 0, row_y1 = 0;
#pragma omp simd reduction(+ : row_x0, row_y0, row_x1, row_y1)
  for (int64_t i = 0; i < m; ++i) {
    const scalar_t weight = weights[i];
    const auto slope =
        similarity_gradient<kHull>(box, Box<scalar_t>{x0[i], y0[i], x1[i], y1[i]}, scalar_t(0));
    row_x0 += weight * slope.first.x0;
    row_y0 += weight * slope.first.y0;
    row_x1 += weight * slope.first.x1;
    row_y1 += weight * slope.first.y1;
    if constexpr (kColumns) {
      sum_x0[i] += weight * slope.second.x0;
      sum_y0[i] += weight * slope.second.y0;
      sum_x1[i] += weight * slope.second.x1;
      sum_y1[i] += weight * slope.second.y1;
    }
  }
  store_box(row_sum, Box<scalar_t>{row_x0, row_y0, row_x1, row_y1});
}

template <typename scalar_t>
DETR_FAST_MULTIVERSION void generalized_box_iou_loss_range(const scalar_t* boxes1,
                                                           const scalar_t* boxes2, scalar_t eps,
                                                           int64_t begin, int64_t end,
                                                           scalar_t* __restrict out) {
  for (int64_t i = begin; i < end; ++i) {
    out[i] = generalized_box_iou_loss(load_box(boxes1 + i * 4), load_box(boxes2 + i * 4), eps);
  }
}

template <typename scalar_t>
DETR_FAST_MULTIVERSION void matched_box_losses_range(const scalar_t* src, const scalar_t* tgt,
                                                     int64_t begin, int64_t end,
                                                     scalar_t* __restrict l1,
                                                     scalar_t* __restrict giou) {
  for (int64_t i = begin; i < end; ++i) {
    const auto losses = matched_box_losses(load_box(src + i * 4), load_box(tgt + i * 4));
    l1[i] = losses.l1;
    giou[i] = losses.giou;
  }
}

template <typename scalar_t>
DETR_FAST_MULTIVERSION void generalized_box_iou_loss_backward_range(
    const scalar_t* grad, const scalar_t* boxes1, const scalar_t* boxes2, scalar_t eps,
    int64_t begin, int64_t end, scalar_t* __restrict grad1, scalar_t* __restrict grad2) {
  for (int64_t i = begin; i < end; ++i) {
    const auto gradient = generalized_box_iou_loss_gradient(load_box(boxes1 + i * 4),
                                                            load_box(boxes2 + i * 4), eps, grad[i]);
    store_box(grad1 + i * 4, gradient.first);
    store_box(grad2 + i * 4, gradient.second);
  }
}

template <typename scalar_t>
DETR_FAST_MULTIVERSION void matched_box_losses_backward_range(
    const scalar_t* grad_l1, const scalar_t* grad_giou, const scalar_t* src, const scalar_t* tgt,
    int64_t begin, int64_t end, scalar_t* __restrict grad_src, scalar_t* __restrict grad_tgt) {
  for (int64_t i = begin; i < end; ++i) {
    const BoxLosses<scalar_t> grad = {grad_l1[i], grad_giou[i]};
    const auto gradient =
        matched_box_losses_gradient(load_box(src + i * 4), load_box(tgt + i * 4), grad);
    store_box(grad_src + i * 4, gradient.first);
    store_box(grad_tgt + i * 4, gradient.second);
  }
}

// The `count` elements of a gradient side by side: where they lie, or copied to `buffer`.
template <typename scalar_t>
const scalar_t* packed(const scalar_t* grad, int64_t step, int64_t count,
                       std::vector<scalar_t>& buffer) {
  if (step == 1) return grad;
  buffer.resize(count);
  for (int64_t i = 0; i < count; ++i) buffer[i] = grad[i * step];
  return buffer.data();
}

// The data of a tensor, nullptr where its side of a gradient is not needed.
template <typename scalar_t>
scalar_t* side_data(const Tensor& tensor, bool needed) {
  return needed ? tensor.mutable_data_ptr<scalar_t>() : nullptr;
}

// Where a loop puts a side of a gradient: a side that is not needed goes to `buffer`, because a
// branch would keep the loop from being vectorised.
template <typename scalar_t>
scalar_t* side_or_buffer(const Tensor& tensor, bool needed, int64_t size,
                         std::vector<scalar_t>& buffer) {
  if (needed) return tensor.mutable_data_ptr<scalar_t>();
  buffer.resize(size);
  return buffer.data();
}

template <Hull kHull>
Tensor pairwise_iou_cpu(const Tensor& boxes1, const Tensor& boxes2) {
  const PairwiseSizes count = check_pairwise(boxes1, boxes2);
  const int64_t n = count.n, m = count.m;
  std::vector<int64_t> sizes = leading_sizes(boxes1, 1);
  sizes.push_back(m);
  const Tensor out = torch::stable::new_empty(boxes1, sizes);
  const Tensor rows = dense(boxes1), columns = dense(boxes2);
  dispatch_floating(boxes1, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* row_data = rows.const_data_ptr<scalar_t>();
    const auto* column_data = columns.const_data_ptr<scalar_t>();
    auto* out_data = out.mutable_data_ptr<scalar_t>();
    const auto run = [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> sides(4 * m);
      for (int64_t row = begin; row < end; ++row) {
        if (row == begin || row % n == 0) {
          transpose_boxes(column_data + row / n * m * 4, m, sides.data());
        }
        pairwise_iou_row<kHull>(load_box(row_data + row * 4), sides.data(), m, out_data + row * m);
      }
    };
    torch::stable::parallel_for(0, count.problems * n, rows_per_thread(m), run);
  });
  return out;
}

// One piece of a problem's rows: writes the gradients of the rows (count, 4), adds up those of the
// columns in `column_sums` (4, m) unless that is nullptr.
template <Hull kHull, typename scalar_t>
void pairwise_iou_backward_rows(const scalar_t* grad, PairwiseSteps step, const scalar_t* rows,
                                int64_t count, const scalar_t* columns, int64_t m,
                                scalar_t* row_sums, scalar_t* column_sums) {
  std::vector<scalar_t> buffer;
  scalar_t unused[4];
  for (int64_t row = 0; row < count; ++row) {
    const scalar_t* weights = packed(grad + row * step.row, step.column, m, buffer);
    const Box<scalar_t> box = load_box(rows + row * 4);
    scalar_t* sum = row_sums == nullptr ? unused : row_sums + row * 4;
    if (column_sums == nullptr) {
      pairwise_iou_backward_row<kHull, false>(weights, box, columns, m, sum, column_sums);
    } else {
      pairwise_iou_backward_row<kHull, true>(weights, box, columns, m, sum, column_sums);
    }
  }
}

// Adds partial sums (blocks, 4, m), the first first, into boxes (m, 4).
template <typename scalar_t>
void sum_blocks(const scalar_t* partial, int64_t blocks, int64_t m, scalar_t* out) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t side = 0; side < 4; ++side) {
      scalar_t sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += partial[(b * 4 + side) * m + i];
      out[i * 4 + side] = sum;
    }
  }
}

template <Hull kHull>
std::tuple<Tensor, Tensor> pairwise_iou_backward_cpu(const Tensor& grad, const Tensor& boxes1,
                                                     const Tensor& boxes2, bool needs1,
                                                     bool needs2) {
  const PairwiseSizes count = check_pairwise_backward(grad, boxes1, boxes2);
  const int64_t problems = count.problems, n = count.n, m = count.m;
  const PairwiseGrad weights = pairwise_grad(grad);
  const PairwiseSteps step = weights.step;
  const Tensor rows = dense(boxes1), columns = dense(boxes2);
  const Tensor grad1 = gradient_of(boxes1, needs1), grad2 = gradient_of(boxes2, needs2);
  // the blocks, and with them the order of every sum, do not depend on the number of threads
  const int64_t block_rows = std::max(divide_up(n, kMostBlocks), rows_per_thread(m));
  const int64_t blocks = divide_up(n, block_rows);
  const int64_t block_pairs = std::max<int64_t>(1, std::min(block_rows, n) * m);
  dispatch_floating(boxes1, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* weight_data = weights.tensor.const_data_ptr<scalar_t>();
    const auto* row_data = rows.const_data_ptr<scalar_t>();
    const auto* column_data = columns.const_data_ptr<scalar_t>();
    auto* data1 = side_data<scalar_t>(grad1, needs1);
    auto* data2 = side_data<scalar_t>(grad2, needs2);
    std::vector<scalar_t> partial(needs2 ? problems * blocks * 4 * m : 0);
    const auto run = [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> sides(4 * m);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t problem = block / blocks, first = block % blocks * block_rows;
        if (block == begin || first == 0) {
          transpose_boxes(column_data + problem * m * 4, m, sides.data());
        }
        const int64_t row = problem * n + first;
        pairwise_iou_backward_rows<kHull>(weight_data + problem * step.problem + first * step.row,
                                          step, row_data + row * 4, std::min(block_rows, n - first),
                                          sides.data(), m, needs1 ? data1 + row * 4 : nullptr,
                                          needs2 ? partial.data() + block * 4 * m : nullptr);
      }
    };
    torch::stable::parallel_for(0, problems * blocks, divide_up(kPairsPerThread, block_pairs), run);
    for (int64_t p = 0; needs2 && p < problems; ++p) {
      sum_blocks(partial.data() + p * blocks * 4 * m, blocks, m, data2 + p * m * 4);
    }
  });
  return {grad1, grad2};
}

Tensor generalized_box_iou_loss_cpu(const Tensor& boxes1, const Tensor& boxes2, double eps) {
  const int64_t pairs = check_matched(boxes1, "boxes1", boxes2, "boxes2");
  const Tensor first = dense(boxes1), second = dense(boxes2);
  const Tensor out = torch::stable::new_empty(boxes1, leading_sizes(boxes1, 1));
  dispatch_floating(boxes1, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* data1 = first.const_data_ptr<scalar_t>();
    const auto* data2 = second.const_data_ptr<scalar_t>();
    auto* out_data = out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, pairs, kPairsPerThread, [&](int64_t begin, int64_t end) {
      generalized_box_iou_loss_range(data1, data2, scalar_t(eps), begin, end, out_data);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> generalized_box_iou_loss_backward_cpu(const Tensor& grad,
                                                                 const Tensor& boxes1,
                                                                 const Tensor& boxes2, double eps,
                                                                 bool needs1, bool needs2) {
  const int64_t pairs = check_matched(boxes1, "boxes1", boxes2, "boxes2");
  check_matched_gradient(grad, "grad", boxes1, "boxes1");
  const Flat weights = flat(grad);
  const Tensor first = dense(boxes1), second = dense(boxes2);
  const Tensor grad1 = gradient_of(boxes1, needs1), grad2 = gradient_of(boxes2, needs2);
  dispatch_floating(boxes1, [&](auto zero) {
    using scalar_t = decltype(zero);
    std::vector<scalar_t> packing, unneeded1, unneeded2;
    const auto* weight_data =
        packed(weights.tensor.const_data_ptr<scalar_t>(), weights.step, pairs, packing);
    const auto* data1 = first.const_data_ptr<scalar_t>();
    const auto* data2 = second.const_data_ptr<scalar_t>();
    auto* out1 = side_or_buffer(grad1, needs1, pairs * 4, unneeded1);
    auto* out2 = side_or_buffer(grad2, needs2, pairs * 4, unneeded2);
    torch::stable::parallel_for(0, pairs, kPairsPerThread, [&](int64_t begin, int64_t end) {
      generalized_box_iou_loss_backward_range(weight_data, data1, data2, scalar_t(eps), begin, end,
                                              out1, out2);
    });
  });
  return {grad1, grad2};
}

std::tuple<Tensor, Tensor> matched_box_losses_cpu(const Tensor& src, const Tensor& tgt) {
  const int64_t pairs = check_matched(src, "src", tgt, "tgt");
  const Tensor first = dense(src), second = dense(tgt);
  const std::vector<int64_t> sizes = leading_sizes(src, 1);
  const Tensor l1 = torch::stable::new_empty(src, sizes);
  const Tensor giou = torch::stable::new_empty(src, sizes);
  dispatch_floating(src, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* src_data = first.const_data_ptr<scalar_t>();
    const auto* tgt_data = second.const_data_ptr<scalar_t>();
    auto* l1_data = l1.mutable_data_ptr<scalar_t>();
    auto* giou_data = giou.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, pairs, kPairsPerThread, [&](int64_t begin, int64_t end) {
      matched_box_losses_range(src_data, tgt_data, begin, end, l1_data, giou_data);
    });
  });
  return {l1, giou};
}

std::tuple<Tensor, Tensor> matched_box_losses_backward_cpu(const Tensor& grad_l1,
                                                           const Tensor& grad_giou,
                                                           const Tensor& src, const Tensor& tgt,
                                                           bool needs_src, bool needs_tgt) {
  const int64_t pairs = check_matched(src, "src", tgt, "tgt");
  check_matched_gradient(grad_l1, "grad_l1", src, "src");
  check_matched_gradient(grad_giou, "grad_giou", src, "src");
  const Flat weights_l1 = flat(grad_l1), weights_giou = flat(grad_giou);
  const Tensor first = dense(src), second = dense(tgt);
  const Tensor grad_src = gradient_of(src, needs_src), grad_tgt = gradient_of(tgt, needs_tgt);
  dispatch_floating(src, [&](auto zero) {
    using scalar_t = decltype(zero);
    std::vector<scalar_t> packing_l1, packing_giou, unneeded_src, unneeded_tgt;
    const auto* l1_data =
        packed(weights_l1.tensor.const_data_ptr<scalar_t>(), weights_l1.step, pairs, packing_l1);
    const auto* giou_data = packed(weights_giou.tensor.const_data_ptr<scalar_t>(),
                                   weights_giou.step, pairs, packing_giou);
    const auto* src_data = first.const_data_ptr<scalar_t>();
    const auto* tgt_data = second.const_data_ptr<scalar_t>();
    auto* src_out = side_or_buffer(grad_src, needs_src, pairs * 4, unneeded_src);
    auto* tgt_out = side_or_buffer(grad_tgt, needs_tgt, pairs * 4, unneeded_tgt);
    torch::stable::parallel_for(0, pairs, kPairsPerThread, [&](int64_t begin, int64_t end) {
      matched_box_losses_backward_range(l1_data, giou_data, src_data, tgt_data, begin, end, src_out,
                                        tgt_out);
    });
  });
  return {grad_src, grad_tgt};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, CPU, m) {
  m.impl("box_iou", TORCH_BOX(&pairwise_iou_cpu<Hull::kNone>));
  m.impl("box_iou_backward", TORCH_BOX(&pairwise_iou_backward_cpu<Hull::kNone>));
  m.impl("generalized_box_iou", TORCH_BOX(&pairwise_iou_cpu<Hull::kClamped>));
  m.impl("generalized_box_iou_backward", TORCH_BOX(&pairwise_iou_backward_cpu<Hull::kClamped>));
  m.impl("generalized_box_iou_loss", TORCH_BOX(&generalized_box_iou_loss_cpu));
  m.impl("generalized_box_iou_loss_backward", TORCH_BOX(&generalized_box_iou_loss_backward_cpu));
  m.impl("matched_box_losses", TORCH_BOX(&matched_box_losses_cpu));
  m.impl("matched_box_losses_backward", TORCH_BOX(&matched_box_losses_backward_cpu));
}

}  // namespace detr_fast
