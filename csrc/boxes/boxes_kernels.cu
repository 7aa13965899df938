// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the box ops.
#include "boxes/box_math.h"
#include "boxes/boxes_kernels.h"
#include "common/cuda.h"
#include "common/warp.cuh"

namespace detr_fast {
namespace {

constexpr int kThreads = 256;

int blocks_for(int64_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

// One thread per pair: consecutive threads write consecutive elements.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    generalized_box_iou_kernel(const scalar_t* __restrict__ boxes1,  // (n, 4)
                               const scalar_t* __restrict__ boxes2,  // (m, 4)
                               unsigned pairs, unsigned m,
                               scalar_t* __restrict__ out) {  // (n, m)
  const unsigned pair = blockIdx.x * kThreads + threadIdx.x;
  if (pair >= pairs) return;
  const size_t row = pair / m, column = pair % m;
  out[pair] = generalized_box_iou(load_box(boxes1 + row * 4), load_box(boxes2 + column * 4));
}

// One warp per row: its lanes share out the columns, then add up.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    generalized_box_iou_backward_kernel(const scalar_t* __restrict__ grad,    // (n, m)
                                        const scalar_t* __restrict__ boxes1,  // (n, 4)
                                        const scalar_t* __restrict__ boxes2,  // (m, 4)
                                        int n, int m,
                                        scalar_t* __restrict__ grad_boxes1) {  // (n, 4)
  const size_t row = (size_t(blockIdx.x) * kThreads + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (row >= size_t(n)) return;  // the whole warp
  const Box<scalar_t> box = load_box(boxes1 + row * 4);
  Box<scalar_t> sum = {0, 0, 0, 0};
  for (int column = lane; column < m; column += kWarpSize) {
    const scalar_t weight = grad[row * m + column];
    const auto slope = generalized_box_iou_gradient(box, load_box(boxes2 + size_t(column) * 4));
    sum.x0 += weight * slope.x0;
    sum.y0 += weight * slope.y0;
    sum.x1 += weight * slope.x1;
    sum.y1 += weight * slope.y1;
  }
  sum = {warp_sum(sum.x0), warp_sum(sum.y0), warp_sum(sum.x1), warp_sum(sum.y1)};
  if (lane == 0) store_box(grad_boxes1 + row * 4, sum);
}

}  // namespace

template <typename scalar_t>
void launch_generalized_box_iou(const scalar_t* boxes1, const scalar_t* boxes2, int n, int m,
                                scalar_t* out, void* stream) {
  const unsigned pairs = unsigned(n) * unsigned(m);
  DETR_FAST_LAUNCH(generalized_box_iou_kernel<scalar_t>, blocks_for(pairs), kThreads, 0, stream,
                   boxes1, boxes2, pairs, unsigned(m), out);
}

template <typename scalar_t>
void launch_generalized_box_iou_backward(const scalar_t* grad, const scalar_t* boxes1,
                                         const scalar_t* boxes2, int n, int m,
                                         scalar_t* grad_boxes1, void* stream) {
  DETR_FAST_LAUNCH(generalized_box_iou_backward_kernel<scalar_t>,
                   blocks_for(int64_t(n) * kWarpSize), kThreads, 0, stream, grad, boxes1, boxes2, n,
                   m, grad_boxes1);
}

#define DETR_FAST_INSTANTIATE(scalar_t)                                                          \
  template void launch_generalized_box_iou<scalar_t>(const scalar_t*, const scalar_t*, int, int, \
                                                     scalar_t*, void*);                          \
  template void launch_generalized_box_iou_backward<scalar_t>(                                   \
      const scalar_t*, const scalar_t*, const scalar_t*, int, int, scalar_t*, void*);
DETR_FAST_INSTANTIATE(float)
DETR_FAST_INSTANTIATE(double)
#undef DETR_FAST_INSTANTIATE

}  // namespace detr_fast
