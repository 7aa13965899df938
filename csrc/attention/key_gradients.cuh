// SPDX-License-Identifier: Apache-2.0
// Gradients of k and v: the rows of a warp's fragments are keys, the columns queries.
#pragma once

#include "attention/gradients.cuh"

namespace detr_fast {

constexpr int kKeyRows = kWarps * kWarpRows;  // of a block
constexpr int kQueryStep = kStatisticsRows;
constexpr int kKeptWords = kKeyRows / kKeysInWord;  // of a query and block, one for each warp
static_assert(kWarpRows == kKeysInWord && kKeptWords * sizeof(uint32_t) == kChunk);

using QueryTiles = TilePair<kQueryStep, kThreads>;

// What a step needs of a pair of queries beside the tiles of q and grad.
struct PairSide {
  uint32_t kept[2][kKeptWords];
  Statistics statistics;
  uint4 gap;  // so that pairs lie in different banks
};
constexpr int kSide = 4096;  // bytes from one stage to the other
static_assert(sizeof(PairSide) * kQueryStep / 2 <= kSide);

// Copies it: the first half of the threads the bits, the others the statistics, each a chunk a
// step.
template <bool kDropout>
class SideCopy {
 public:
  __device__ __forceinline__ SideCopy(const AttentionInputs& in, const AttentionGradients& out,
                                      const Rows& queries, int image, int head, int first_key)
      : left_(queries.count) {
    static_assert(kThreads == 2 * kQueryStep && sizeof(Statistics) == 2 * kChunk);
    const int row = threadIdx.x % kQueryStep, words = keep_words(in.keys);
    if (kDropout && threadIdx.x < kQueryStep) {
      const int64_t first = heads_first(image, head, row, in.heads, in.queries, words);
      from_ = reinterpret_cast<const char*>(out.keep + first + first_key / kKeysInWord);
      step_ = kQueryStep * words * sizeof(uint32_t);
    } else {
      from_ = reinterpret_cast<const char*>(statistics_of(in, out, image, head)) + row * kChunk;
      step_ = kQueryStep * kChunk;
    }
  }

  // Whether there are queries whose tiles have not been copied.
  __device__ __forceinline__ bool more() const { return left_ > 0; }

  __device__ __forceinline__ void copy(Stage* sides) {
    const unsigned thread = in_register(threadIdx.x);
    const bool bits = thread < kQueryStep;
    const unsigned pair = thread % kQueryStep / 2, chunk = thread / kQueryStep * 2 + thread % 2;
    if (kDropout || !bits) {
      copy_16_async(sides + pair * sizeof(PairSide) + chunk * kChunk, from_,
                    !bits || int(thread) < left_);
    }
    from_ += step_;
    left_ -= kQueryStep;
  }

 private:
  const char* from_;
  unsigned step_;  // bytes; signed it would take two registers
  int left_;       // queries
};

// What a thread copies. It stands in shared memory from step to step: the products in between need
// all registers.
template <bool kDropout>
struct QueryCopies {
  QueryTiles tiles;
  SideCopy<kDropout> side;
};
constexpr int kSides = 2 * QueryTiles::kStage;  // where they begin in shared memory
constexpr int kCopies = kSides + 2 * kSide;
constexpr int kKeyShared = kCopies + kThreads * sizeof(QueryCopies<true>);

template <bool kDropout, typename element_t>
__device__ __forceinline__ void key_gradients(const AttentionInputs& in,
                                              const AttentionGradients& out, Stage* stages,
                                              RowSteps& row_steps, int block_first) {
  const int image = blockIdx.z, head = blockIdx.y;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int first = block_first + warp * kWarpRows;
  const Gradient grad_k = {out.grad_k, out.key_step, in.keys};
  const Gradient grad_v = {out.grad_v, out.key_step, in.keys};
  const Rows keys = keys_of(in, image), queries = queries_of(in, image);
  grad_k.clear<element_t, kKeyRows>(keys, image, head, block_first);
  grad_v.clear<element_t, kKeyRows>(keys, image, head, block_first);
  if (block_first >= keys.count) return;

  Fragments k, v;
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
    read_rows(k[m], in.k, image, head, keys, first + 16 * m, lane);
    read_rows(v[m], in.v, image, head, keys, first + 16 * m, lane);
  }
  auto& copies = reinterpret_cast<QueryCopies<kDropout>*>(stages + kCopies)[threadIdx.x];
  copies = {QueryTiles(queries, 0, in.q, out.grad, image, head, threadIdx.x),
            SideCopy<kDropout>(in, out, queries, image, head, block_first)};
  if (threadIdx.x == 0) row_steps.set(queries, QueryTiles::kPassRows);
  __syncthreads();
  int columns = columns_slot(lane), rows = rows_slot(lane);
  int beside = lane % 4 * sizeof(PairSide), kept = beside + warp * int(sizeof(uint32_t));
  Stage* const sides = stages + kSides;
  const auto copy = [&](int stage, int side) {
    QueryCopies<kDropout> next = copies;
    next.tiles.copy(stages + stage, row_steps);
    next.side.copy(sides + side);
    copies = next;
  };
  bool more = copies.side.more();
  if (more) copy(columns, 0);
  commit_copies();
  Sums dk = {}, dv = {};
#pragma unroll 1
  while (more) {
    wait_for_copies<0>();
    __syncthreads();  // all have this tile, and have read the one before
    more = copies.side.more();
    if (more) copy(columns ^ QueryTiles::kStage, (beside & kSide) ^ kSide);
    commit_copies();
#pragma unroll 1
    for (int c = 0; c < kQueryStep / 16; ++c) {
      const Stage* const q_tile = stages + columns + c * 16 * kTileRow;
      const Stage* const grad_tile = q_tile + QueryTiles::kTile;
      uint32_t p[kWarpTiles][4], ds[kWarpTiles][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t q[4], grad[4];
        load_matrices(q, q_tile + n * 8 * kTileRow);
        load_matrices(grad, grad_tile + n * 8 * kTileRow);
        const int first_pair = (8 * c + 4 * n) * int(sizeof(PairSide));
        const auto& pair = *reinterpret_cast<const PairSide*>(sides + beside + first_pair);
        const auto exponent = *reinterpret_cast<const float2*>(pair.statistics.exponent);
        const auto less = *reinterpret_cast<const float4*>(pair.statistics.less);
        uint32_t bits0 = 0, bits1 = 0;
        if constexpr (kDropout) {
          const auto* const words = reinterpret_cast<const uint32_t*>(sides + kept + first_pair);
          bits0 = words[0] << (lane / 4);
          bits1 = words[kKeptWords] << (lane / 4);
        }
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
          float s[4], dp[4];
          dot_products<element_t>(s, k[m], q);
          dot_products<element_t>(dp, v[m], grad, {less.x, less.y, less.z, less.w});
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int eight = 2 * m + h;  // of the warp's keys
            const float2 weight = weights(s + 2 * h, exponent.x, exponent.y);
            uint32_t pair_kept = ~0u;
            if constexpr (kDropout) {
              pair_kept = spread_signs(bits0, bits1, 0xcc88 + 0x1111 * eight);
            }
            p[m][2 * n + h] = pack<element_t>(weight.x, weight.y) & pair_kept;
            ds[m][2 * n + h] = score_gradients<kDropout, element_t>(weight, dp + 2 * h, less.x,
                                                                    less.y, bits0, bits1, eight);
          }
        }
      }
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        const Stage* const tile = stages + (rows ^ slice * kSliceStep) + c * 16 * kTileRow;
        uint32_t q[4], grad[4];
        load_matrices_transposed(q, tile);
        load_matrices_transposed(grad, tile + QueryTiles::kTile);
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
          add_rows<element_t>(dk[m], ds[m], q, slice);
          add_rows<element_t>(dv[m], p[m], grad, slice);
        }
      }
    }
    columns ^= QueryTiles::kStage;
    rows ^= QueryTiles::kStage;
    beside ^= kSide;
    kept ^= kSide;
  }
  const Rows written = keys_of(in, image);  // again: the main loop has no registers for them
  const float share = kDropout ? kept_share(in) : 1;
  grad_k.write<element_t>(dk, kScale / share, written, image, head, first, lane);
  grad_v.write<element_t>(dv, 1 / share, written, image, head, first, lane);
}

}  // namespace detr_fast
