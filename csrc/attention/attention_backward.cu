// SPDX-License-Identifier: Apache-2.0
// Attention, backward: statistics of the queries, then all gradients in one launch; what the two
// kinds of blocks do is in key_gradients.cuh and query_gradients.cuh.
#include "attention/attention_kernels.h"
#include "attention/key_gradients.cuh"
#include "attention/query_gradients.cuh"
#include "common/element.cuh"

namespace detr_fast {

namespace {

template <typename element_t>
__device__ __forceinline__ float chunk_product(const HeadsInput& a, const HeadsInput& b, int image,
                                               int head, int row, int chunk) {
  constexpr int kElements = kHeadDim / kChunks;
  element_t elements[2][kElements];
  const HeadsInput* const inputs[] = {&a, &b};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto* const from = static_cast<const element_t*>(inputs[i]->data) +
                             offset(*inputs[i], image, head, row) + chunk * kElements;
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    memcpy(elements[i], &bits, sizeof bits);
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    sum = fmaf(number(elements[0][i]), number(elements[1][i]), sum);
  }
  return sum;
}

// kChunks threads take a row. Rows behind the last real one weigh 0 with every key.
template <typename element_t>
__global__ void __launch_bounds__(kStatisticsRows* kChunks)
    attention_statistics_kernel(const AttentionInputs in, const AttentionGradients out) {
  const int image = blockIdx.z, head = blockIdx.y, chunk = threadIdx.x % kChunks;
  const int row = blockIdx.x * kStatisticsRows + threadIdx.x / kChunks;
  const Rows queries = queries_of(in, image);
  const bool real = row < queries.count;
  const int position = real ? queries.position(row) : 0;
  float delta =
      real ? chunk_product<element_t>(out.grad, out.out, image, head, position, chunk) : 0;
  delta += __shfl_xor_sync(kWholeWarp, delta, 1);
  delta += __shfl_xor_sync(kWholeWarp, delta, 2);
  if (chunk > 0) return;
  Statistics& pair = statistics_of(in, out, image, head)[row / 2];
  const int64_t at = heads_first(image, head, position, in.heads, in.queries, 1);
  const int slot = row % 2;
  pair.exponent[slot] = pair.exponent[slot + 2] = real ? -kLog2E * out.lse[at] : -float(kInfinity);
  pair.less[slot] = pair.less[slot + 2] = -kept_share(in) * delta;
}

constexpr int kBlocks = 3;  // that a multiprocessor shall hold at a time

template <bool kDropout, typename element_t>
__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_backward_kernel(const AttentionInputs in, const AttentionGradients out) {
  constexpr int kShared = Few::kShared;
  static_assert(Many::kShared <= kShared && kKeyShared <= kShared);
  __shared__ __align__(128) Stage stages[kShared];
  __shared__ RowSteps row_steps;
  const bool few = few_queries(in);
  const int key_blocks = (in.keys + kKeyRows - 1) / kKeyRows;
  // the longer ones begin: those of queries where there are few of them
  const int begin = few ? int(gridDim.x) - key_blocks : key_blocks;
  const bool later = int(blockIdx.x) >= begin;
  const int block = int(blockIdx.x) - (later ? begin : 0);
  if (later == few) {
    key_gradients<kDropout, element_t>(in, out, stages, row_steps, block * kKeyRows);
  } else if (few) {
    query_gradients<Few, kDropout, element_t>(in, out, stages, row_steps, block * Few::kRows);
  } else {
    query_gradients<Many, kDropout, element_t>(in, out, stages, row_steps, block * Many::kRows);
  }
}

template <bool kDropout, typename element_t>
void launch(const AttentionInputs& in, const AttentionGradients& out, void* stream) {
  const auto blocks = [](int rows, int size) { return (rows + size - 1) / size; };
  const unsigned heads = in.heads, images = in.images;
  if (in.queries > 0) {
    const dim3 grid(blocks(in.queries, kStatisticsRows), heads, images);
    DETR_FAST_LAUNCH((attention_statistics_kernel<element_t>), grid,
                     dim3(kStatisticsRows * kChunks), 0, stream, in, out);
  }
  const int query_rows = few_queries(in) ? Few::kRows : Many::kRows;
  const dim3 grid(blocks(in.keys, kKeyRows) + blocks(in.queries, query_rows), heads, images);
  DETR_FAST_LAUNCH((attention_backward_kernel<kDropout, element_t>), grid, dim3(kThreads), 0,
                   stream, in, out);
}

template <typename element_t>
void launch(const AttentionInputs& in, const AttentionGradients& out, void* stream) {
  if (in.kept < kKeepLevels) return launch<true, element_t>(in, out, stream);
  launch<false, element_t>(in, out, stream);
}

}  // namespace

void launch_attention_backward(const AttentionInputs& in, const AttentionGradients& out,
                               void* stream) {
  if (in.images == 0 || in.heads == 0 || (in.queries == 0 && in.keys == 0)) return;
  if (in.type == ElementType::kHalf) return launch<__half>(in, out, stream);
  launch<__nv_bfloat16>(in, out, stream);
}

}  // namespace detr_fast
