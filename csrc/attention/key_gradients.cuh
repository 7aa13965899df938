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

// What a thread has in shared memory, as the products of a step need all registers.
template <bool kDropout>
struct alignas(kChunk) KeyThread {
  struct Copies {
    QueryTiles tiles;
    SideCopy<kDropout> side;
  } next;
  int number;  // of its first key
};
constexpr int kSides = 2 * QueryTiles::kStage;  // where they begin
constexpr int kKeyThreads = kSides + 2 * kSide;
constexpr int kKeyShared = kKeyThreads + kThreads * sizeof(KeyThread<true>);

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
  auto& own = reinterpret_cast<KeyThread<kDropout>*>(stages + kKeyThreads)[threadIdx.x];
  own.next = {QueryTiles(queries, 0, in.q, out.grad, image, head, threadIdx.x),
              SideCopy<kDropout>(in, out, queries, image, head, block_first)};
  own.number = first + lane / 4;
  if (threadIdx.x == 0) row_steps.set(queries, QueryTiles::kPassRows);
  __syncthreads();
  const int columns = columns_slot(lane), rows = rows_slot(lane);
  const int pairs = kSides + lane % 4 * int(sizeof(PairSide));
  const int words = pairs + warp * int(sizeof(uint32_t));
  // Copies the next tile, if there is one, and says whether there was.
  const auto copy = [&](int tile, int side) {
    auto next = own.next;
    const bool more = next.side.more();
    if (more) {
      next.tiles.copy(stages + columns + tile, row_steps);
      next.side.copy(stages + kSides + side);
      own.next = next;
    }
    commit_copies();
    return more;
  };
  bool more = copy(0, 0);
  int tile = 0, side = 0;  // what is computed next: numbers that all threads share
  Sums dk = {}, dv = {};
#pragma unroll 1
  while (more) {
    wait_for_copies<0>();
    __syncthreads();  // all have this tile, and have read the one before
    more = copy(tile ^ QueryTiles::kStage, side ^ kSide);
#pragma unroll 1
    for (int c = 0; c < kQueryStep / 16; ++c) {
      const Stage* const q_tile = stages + columns + tile;
      const Stage* const grad_tile = q_tile + QueryTiles::kTile;
      uint32_t p[kWarpTiles][4], ds[kWarpTiles][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t q[4], grad[4];
        load_matrices(q, q_tile + n * 8 * kTileRow);
        load_matrices(grad, grad_tile + n * 8 * kTileRow);
        const Stage* const pair = stages + side + n * 4 * int(sizeof(PairSide));
        const auto& of = reinterpret_cast<const PairSide*>(pair + pairs)->statistics;
        const auto exponent = *reinterpret_cast<const float2*>(of.exponent);
        const auto less = *reinterpret_cast<const float4*>(of.less);
        uint32_t bits0 = 0, bits1 = 0;
        if constexpr (kDropout) {
          const auto* const kept = reinterpret_cast<const uint32_t*>(pair + words);
          bits0 = kept[0] << (lane / 4);
          bits1 = kept[kKeptWords] << (lane / 4);
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
        const Stage* const q_rows = stages + (rows ^ slice * kSliceStep) + tile;
        uint32_t q[4], grad[4];
        load_matrices_transposed(q, q_rows);
        load_matrices_transposed(grad, q_rows + QueryTiles::kTile);
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
          add_rows<element_t>(dk[m], ds[m], q, slice);
          add_rows<element_t>(dv[m], p[m], grad, slice);
        }
      }
      tile += 16 * kTileRow;
      side += 8 * int(sizeof(PairSide));
    }
    tile = (tile - QueryTiles::kTile) ^ QueryTiles::kStage;
    side = (side - kQueryStep / 2 * int(sizeof(PairSide))) ^ kSide;
  }
  const Rows written = keys_of(in, image);  // again: the main loop has no registers for them
  const float share = kDropout ? kept_share(in) : 1;
  grad_k.write<element_t>(dk, kScale / share, written, image, head, own.number, lane);
  grad_v.write<element_t>(dv, 1 / share, written, image, head, own.number, lane);
}

}  // namespace detr_fast
