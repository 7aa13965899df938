// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the box ops. All are bound by memory or by the launch: a thread or a lane reads
// whole boxes by 16-byte loads, neighbours write neighbouring elements, sums have a fixed order.
#include "boxes/box_math.h"
#include "boxes/boxes_kernels.h"
#include "common/cuda.h"
#include "common/warp.cuh"

namespace detr_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// The fewest blocks of a backward kernel that a multiprocessor shall hold: left to itself, ptxas
// spills doubles to reach 64 registers a thread.
template <typename scalar_t>
constexpr int kBlocks = sizeof(scalar_t) == sizeof(float) ? 4 : 2;
// Rows that one block adds up for the gradient of the columns: 32 a warp.
constexpr int kSplitRows = 256;

int divide_up(long long value, int by) { return static_cast<int>((value + by - 1) / by); }

template <typename scalar_t>
const Box<scalar_t>* as_boxes(const scalar_t* data) {
  return reinterpret_cast<const Box<scalar_t>*>(data);
}

template <typename scalar_t>
Box<scalar_t>* as_boxes(scalar_t* data) {
  return reinterpret_cast<Box<scalar_t>*>(data);
}

// One thread per pair: consecutive threads write consecutive elements.
template <Hull kHull, typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    pairwise_iou_kernel(const Box<scalar_t>* __restrict__ boxes1,  // (problems, n)
                        const Box<scalar_t>* __restrict__ boxes2,  // (problems, m)
                        unsigned pairs, unsigned n, unsigned m,
                        scalar_t* __restrict__ out) {  // (problems, n, m)
  const unsigned pair = blockIdx.x * kThreads + threadIdx.x;
  if (pair >= pairs) return;
  const unsigned row = pair / m;  // of all problems
  const unsigned column = row / n * m + pair % m;
  out[pair] = similarity<kHull>(boxes1[row], boxes2[column], scalar_t(0));
}

// One warp per row: its lanes share out the columns, then add up.
template <Hull kHull, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    pairwise_iou_backward_rows_kernel(const scalar_t* __restrict__ grad,  // (problems, n, m)
                                      PairwiseSteps step,
                                      const Box<scalar_t>* __restrict__ boxes1,  // (problems, n)
                                      const Box<scalar_t>* __restrict__ boxes2,  // (problems, m)
                                      unsigned rows, unsigned n, unsigned m,
                                      Box<scalar_t>* __restrict__ grad_boxes1) {  // (problems, n)
  const unsigned row = blockIdx.x * kWarps + threadIdx.x / kWarpSize;             // of all problems
  const unsigned lane = threadIdx.x % kWarpSize;
  if (row >= rows) return;  // the whole warp
  const unsigned problem = row / n;
  const scalar_t* weights = grad + problem * step.problem + row % n * step.row;
  const Box<scalar_t>* columns = boxes2 + size_t(problem) * m;
  const Box<scalar_t> box = boxes1[row];
  Box<scalar_t> sum = {0, 0, 0, 0};
  for (unsigned column = lane; column < m; column += kWarpSize) {
    const auto slope = similarity_gradient<kHull>(box, columns[column], scalar_t(0));
    sum = add_scaled(sum, weights[column * step.column], slope.first);
  }
  sum = {warp_sum(sum.x0), warp_sum(sum.y0), warp_sum(sum.x1), warp_sum(sum.y1)};
  if (lane == 0) grad_boxes1[row] = sum;
}

// One block per 32 columns and kSplitRows rows of a problem: a lane keeps its column, the warps
// share out the rows, then the first warp adds up.
template <Hull kHull, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    pairwise_iou_backward_columns_kernel(const scalar_t* __restrict__ grad,  // (problems, n, m)
                                         PairwiseSteps step,
                                         const Box<scalar_t>* __restrict__ boxes1,  // (problems, n)
                                         const Box<scalar_t>* __restrict__ boxes2,  // (problems, m)
                                         unsigned n, unsigned m, unsigned splits,
                                         Box<scalar_t>* __restrict__ partial) {  // (.., splits, m)
  __shared__ Box<scalar_t> sums[kWarps][kWarpSize];
  const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const unsigned tiles = (m + kWarpSize - 1) / kWarpSize;
  const unsigned split = blockIdx.x / tiles;  // of all problems
  const unsigned problem = split / splits;
  const unsigned column = blockIdx.x % tiles * kWarpSize + lane;
  const unsigned first = split % splits * kSplitRows;
  const unsigned last = first + min(n - first, unsigned(kSplitRows));
  Box<scalar_t> sum = {0, 0, 0, 0};
  if (column < m) {
    const scalar_t* weights = grad + problem * step.problem + column * step.column;
    const Box<scalar_t>* rows = boxes1 + size_t(problem) * n;
    const Box<scalar_t> box = boxes2[size_t(problem) * m + column];
    for (unsigned row = first + warp; row < last; row += kWarps) {
      const auto slope = similarity_gradient<kHull>(rows[row], box, scalar_t(0));
      sum = add_scaled(sum, weights[row * step.row], slope.second);
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= m) return;
  for (int other = 1; other < kWarps; ++other) {
    sum = add_scaled(sum, scalar_t(1), sums[other][lane]);
  }
  partial[size_t(split) * m + column] = sum;
}

// One thread per column of a problem adds up the pieces, the first first.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    sum_splits_kernel(const Box<scalar_t>* __restrict__ partial,  // (problems, splits, m)
                      unsigned columns, unsigned splits, unsigned m,
                      Box<scalar_t>* __restrict__ out) {        // (problems, m)
  const unsigned column = blockIdx.x * kThreads + threadIdx.x;  // of all problems
  if (column >= columns) return;
  const Box<scalar_t>* pieces = partial + size_t(column / m) * splits * m + column % m;
  Box<scalar_t> sum = {0, 0, 0, 0};
  for (unsigned split = 0; split < splits; ++split) {
    sum = add_scaled(sum, scalar_t(1), pieces[size_t(split) * m]);
  }
  out[column] = sum;
}

// The kernels of matched pairs: one thread per pair.

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    generalized_box_iou_loss_kernel(const Box<scalar_t>* __restrict__ boxes1,
                                    const Box<scalar_t>* __restrict__ boxes2, scalar_t eps,
                                    unsigned count, scalar_t* __restrict__ out) {
  const unsigned pair = blockIdx.x * kThreads + threadIdx.x;
  if (pair >= count) return;
  out[pair] = generalized_box_iou_loss(boxes1[pair], boxes2[pair], eps);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    generalized_box_iou_loss_backward_kernel(const scalar_t* __restrict__ grad, long long step,
                                             const Box<scalar_t>* __restrict__ boxes1,
                                             const Box<scalar_t>* __restrict__ boxes2, scalar_t eps,
                                             unsigned count,
                                             Box<scalar_t>* __restrict__ grad_boxes1,
                                             Box<scalar_t>* __restrict__ grad_boxes2) {
  const unsigned pair = blockIdx.x * kThreads + threadIdx.x;
  if (pair >= count) return;
  const auto gradient =
      generalized_box_iou_loss_gradient(boxes1[pair], boxes2[pair], eps, grad[pair * step]);
  if (grad_boxes1 != nullptr) grad_boxes1[pair] = gradient.first;
  if (grad_boxes2 != nullptr) grad_boxes2[pair] = gradient.second;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    matched_box_losses_kernel(const Box<scalar_t>* __restrict__ src,
                              const Box<scalar_t>* __restrict__ tgt, unsigned count,
                              scalar_t* __restrict__ l1, scalar_t* __restrict__ giou_loss) {
  const unsigned pair = blockIdx.x * kThreads + threadIdx.x;
  if (pair >= count) return;
  const auto losses = matched_box_losses(src[pair], tgt[pair]);
  l1[pair] = losses.l1;
  giou_loss[pair] = losses.giou;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    matched_box_losses_backward_kernel(const scalar_t* __restrict__ grad_l1, long long step_l1,
                                       const scalar_t* __restrict__ grad_giou, long long step_giou,
                                       const Box<scalar_t>* __restrict__ src,
                                       const Box<scalar_t>* __restrict__ tgt, unsigned count,
                                       Box<scalar_t>* __restrict__ grad_src,
                                       Box<scalar_t>* __restrict__ grad_tgt) {
  const unsigned pair = blockIdx.x * kThreads + threadIdx.x;
  if (pair >= count) return;
  const BoxLosses<scalar_t> grad = {grad_l1[pair * step_l1], grad_giou[pair * step_giou]};
  const auto gradient = matched_box_losses_gradient(src[pair], tgt[pair], grad);
  if (grad_src != nullptr) grad_src[pair] = gradient.first;
  if (grad_tgt != nullptr) grad_tgt[pair] = gradient.second;
}

}  // namespace

template <Hull kHull, typename scalar_t>
void launch_pairwise_iou(const scalar_t* boxes1, const scalar_t* boxes2, int problems, int n, int m,
                         scalar_t* out, void* stream) {
  const unsigned pairs = unsigned(problems) * n * m;
  DETR_FAST_LAUNCH((pairwise_iou_kernel<kHull, scalar_t>), divide_up(pairs, kThreads), kThreads, 0,
                   stream, as_boxes(boxes1), as_boxes(boxes2), pairs, unsigned(n), unsigned(m),
                   out);
}

template <Hull kHull, typename scalar_t>
void launch_pairwise_iou_backward_rows(const scalar_t* grad, PairwiseSteps step,
                                       const scalar_t* boxes1, const scalar_t* boxes2, int problems,
                                       int n, int m, scalar_t* grad_boxes1, void* stream) {
  const unsigned rows = unsigned(problems) * n;
  DETR_FAST_LAUNCH((pairwise_iou_backward_rows_kernel<kHull, scalar_t>), divide_up(rows, kWarps),
                   kThreads, 0, stream, grad, step, as_boxes(boxes1), as_boxes(boxes2), rows,
                   unsigned(n), unsigned(m), as_boxes(grad_boxes1));
}

int pairwise_iou_splits(int n) { return larger(1, divide_up(n, kSplitRows)); }

template <Hull kHull, typename scalar_t>
void launch_pairwise_iou_backward_columns(const scalar_t* grad, PairwiseSteps step,
                                          const scalar_t* boxes1, const scalar_t* boxes2,
                                          int problems, int n, int m, scalar_t* partial,
                                          scalar_t* grad_boxes2, void* stream) {
  const unsigned splits = pairwise_iou_splits(n);
  const unsigned blocks = problems * splits * divide_up(m, kWarpSize);
  Box<scalar_t>* sums = as_boxes(splits == 1 ? grad_boxes2 : partial);
  DETR_FAST_LAUNCH((pairwise_iou_backward_columns_kernel<kHull, scalar_t>), blocks, kThreads, 0,
                   stream, grad, step, as_boxes(boxes1), as_boxes(boxes2), unsigned(n), unsigned(m),
                   splits, sums);
  if (splits == 1) return;
  const unsigned columns = unsigned(problems) * m;
  DETR_FAST_LAUNCH(sum_splits_kernel<scalar_t>, divide_up(columns, kThreads), kThreads, 0, stream,
                   sums, columns, splits, unsigned(m), as_boxes(grad_boxes2));
}

template <typename scalar_t>
void launch_generalized_box_iou_loss(const scalar_t* boxes1, const scalar_t* boxes2, scalar_t eps,
                                     int count, scalar_t* out, void* stream) {
  DETR_FAST_LAUNCH(generalized_box_iou_loss_kernel<scalar_t>, divide_up(count, kThreads), kThreads,
                   0, stream, as_boxes(boxes1), as_boxes(boxes2), eps, unsigned(count), out);
}

template <typename scalar_t>
void launch_generalized_box_iou_loss_backward(const scalar_t* grad, long long step,
                                              const scalar_t* boxes1, const scalar_t* boxes2,
                                              scalar_t eps, int count, scalar_t* grad_boxes1,
                                              scalar_t* grad_boxes2, void* stream) {
  DETR_FAST_LAUNCH(generalized_box_iou_loss_backward_kernel<scalar_t>, divide_up(count, kThreads),
                   kThreads, 0, stream, grad, step, as_boxes(boxes1), as_boxes(boxes2), eps,
                   unsigned(count), as_boxes(grad_boxes1), as_boxes(grad_boxes2));
}

template <typename scalar_t>
void launch_matched_box_losses(const scalar_t* src, const scalar_t* tgt, int count, scalar_t* l1,
                               scalar_t* giou_loss, void* stream) {
  DETR_FAST_LAUNCH(matched_box_losses_kernel<scalar_t>, divide_up(count, kThreads), kThreads, 0,
                   stream, as_boxes(src), as_boxes(tgt), unsigned(count), l1, giou_loss);
}

template <typename scalar_t>
void launch_matched_box_losses_backward(const scalar_t* grad_l1, long long step_l1,
                                        const scalar_t* grad_giou, long long step_giou,
                                        const scalar_t* src, const scalar_t* tgt, int count,
                                        scalar_t* grad_src, scalar_t* grad_tgt, void* stream) {
  DETR_FAST_LAUNCH(matched_box_losses_backward_kernel<scalar_t>, divide_up(count, kThreads),
                   kThreads, 0, stream, grad_l1, step_l1, grad_giou, step_giou, as_boxes(src),
                   as_boxes(tgt), unsigned(count), as_boxes(grad_src), as_boxes(grad_tgt));
}

#define DETR_FAST_INSTANTIATE_PAIRWISE(kHull, T)                                                 \
  template void launch_pairwise_iou<kHull, T>(const T*, const T*, int, int, int, T*, void*);     \
  template void launch_pairwise_iou_backward_rows<kHull, T>(const T*, PairwiseSteps, const T*,   \
                                                            const T*, int, int, int, T*, void*); \
  template void launch_pairwise_iou_backward_columns<kHull, T>(                                  \
      const T*, PairwiseSteps, const T*, const T*, int, int, int, T*, T*, void*);

#define DETR_FAST_INSTANTIATE(T)                                                                \
  DETR_FAST_INSTANTIATE_PAIRWISE(Hull::kNone, T)                                                \
  DETR_FAST_INSTANTIATE_PAIRWISE(Hull::kClamped, T)                                             \
  template void launch_generalized_box_iou_loss<T>(const T*, const T*, T, int, T*, void*);      \
  template void launch_generalized_box_iou_loss_backward<T>(const T*, long long, const T*,      \
                                                            const T*, T, int, T*, T*, void*);   \
  template void launch_matched_box_losses<T>(const T*, const T*, int, T*, T*, void*);           \
  template void launch_matched_box_losses_backward<T>(const T*, long long, const T*, long long, \
                                                      const T*, const T*, int, T*, T*, void*);
DETR_FAST_INSTANTIATE(float)
DETR_FAST_INSTANTIATE(double)
#undef DETR_FAST_INSTANTIATE
#undef DETR_FAST_INSTANTIATE_PAIRWISE

}  // namespace detr_fast
