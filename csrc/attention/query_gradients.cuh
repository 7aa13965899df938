// SPDX-License-Identifier: Apache-2.0
// Gradient of q: the rows of a warp's fragments are queries, the columns keys.
#pragma once

#include <type_traits>

#include "attention/gradients.cuh"

namespace detr_fast {

// How a block of queries divides its work.
template <int kQueryWarps_, int kKeys_>
struct Shape {
  static constexpr int kQueryWarps = kQueryWarps_;      // that go through the same keys
  static constexpr int kGroups = kWarps / kQueryWarps;  // of such warps, each with some of the keys
  static constexpr int kKeys = kKeys_;                  // of a step
  static constexpr int kRows = kQueryWarps * kWarpRows;
  static constexpr int kWords = kKeys / kKeysInWord;
  static constexpr int kGroupThreads = kQueryWarps * kWarpSize;
  using Tiles = TilePair<kKeys, kGroupThreads>;
  static constexpr int kStages = 2 * Tiles::kStage;  // bytes of a group
  static constexpr int kShared = kGroups * kStages;
};

using Many = Shape<4, 64>;
using Few = Shape<1, 32>;

// Which keys the rows of a warp keep: a lane reads the words of one row, a step ahead.
template <typename S>
class KeptBits {
 public:
  __device__ __forceinline__ KeptBits(const AttentionInputs& in, const AttentionGradients& out,
                                      const Rows& queries, int image, int head, int first, int word,
                                      bool any, int lane) {
    const int row = min(first + lane, queries.count - 1), words = keep_words(in.keys);
    keep_ = out.keep + heads_first(image, head, row, in.heads, in.queries, words) + word;
    read(any);
  }

  // Begins a step; says whether there is another one.
  __device__ __forceinline__ void step(bool more) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int w = 0; w < S::kWords; ++w) {
          const int source = 16 * m + 8 * h + lane / 4;
          bits_[m][h][w] = __shfl_sync(kWholeWarp, next_[w], source) << (lane % 4 * 2);
        }
      }
    }
    read(more);
  }

  // Of this lane's row of half h of tile m, the bit of its first key the sign.
  __device__ __forceinline__ uint32_t of_row(int m, int h, int word) const {
    return bits_[m][h][word];
  }

 private:
  __device__ __forceinline__ void read(bool any) {
    if (!any) return;
#pragma unroll
    for (int w = 0; w < S::kWords; ++w) next_[w] = keep_[w];
    keep_ += S::kWords;
  }

  const uint32_t* keep_;  // of the lane's row
  uint32_t next_[S::kWords] = {}, bits_[kWarpTiles][2][S::kWords];
};

struct NoneDropped {
  template <typename... Arguments>
  __device__ __forceinline__ explicit NoneDropped(const Arguments&...) {}

  __device__ __forceinline__ void step(bool) {}
  __device__ __forceinline__ uint32_t of_row(int, int, int) const { return 0; }
};

// Adds the sums of the other groups of keys to those of the first, in their order.
template <typename S>
__device__ __forceinline__ void merge_groups(Sums& sums, Stage* stages, int group, int thread) {
  constexpr int kNumbers = sizeof(Sums) / sizeof(float);
  static_assert(kNumbers * S::kGroupThreads * (S::kGroups - 1) * 4 <= S::kShared);
  float* const shared = reinterpret_cast<float*>(stages) + thread;
  float* const own = &sums[0][0][0];
  __syncthreads();  // the tiles are no longer read
  if (group > 0) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      shared[((group - 1) * kNumbers + i) * S::kGroupThreads] = own[i];
    }
  }
  __syncthreads();
  if (group > 0) return;
  for (int other = 0; other < S::kGroups - 1; ++other) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      own[i] += shared[(other * kNumbers + i) * S::kGroupThreads];
    }
  }
}

template <typename S, bool kDropout, typename element_t>
__device__ __forceinline__ void query_gradients(const AttentionInputs& in,
                                                const AttentionGradients& out, Stage* stages,
                                                RowSteps& row_steps, int block_first) {
  const int image = blockIdx.z, head = blockIdx.y;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = S::kGroups > 1 ? warp / S::kQueryWarps : 0;
  const int thread = threadIdx.x % S::kGroupThreads;
  const int first = block_first + warp % S::kQueryWarps * kWarpRows;
  const Gradient grad_q = {out.grad_q, out.query_step, in.queries};
  const Rows queries = queries_of(in, image), keys = keys_of(in, image);
  grad_q.clear<element_t, S::kRows>(queries, image, head, block_first);
  if (block_first >= queries.count) return;

  Fragments q, grad;
  float exponent[kWarpTiles][2], less[kWarpTiles][4];
  const Statistics* const statistics = statistics_of(in, out, image, head);
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
    read_rows(q[m], in.q, image, head, queries, first + 16 * m, lane);
    read_rows(grad[m], out.grad, image, head, queries, first + 16 * m, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(first + 16 * m + 8 * h + lane / 4, queries.count - 1);
      const Statistics& of = statistics[row / 2];
      exponent[m][h] = of.exponent[row % 2];
      // two numbers that the compiler does not know to be one: it would copy it before each product
      less[m][2 * h] = of.less[row % 2];
      less[m][2 * h + 1] = of.less[row % 2 + 2];
    }
  }
  const int steps = (keys.count + S::kKeys - 1) / S::kKeys;
  const int group_steps = (steps + S::kGroups - 1) / S::kGroups, begin = group * group_steps;
  Stage* const own = stages + group * S::kStages;
  typename S::Tiles tiles(keys, begin * S::kKeys, in.k, in.v, image, head, thread);
  if (threadIdx.x == 0) row_steps.set(keys, S::Tiles::kPassRows);
  __syncthreads();
  int columns = columns_slot(lane), rows = rows_slot(lane);
  if (group_steps > 0) tiles.copy(own + columns, row_steps);
  commit_copies();
  // keys of the first group that are to come, and of how many more or less this one knows
  int ahead = S::kGroups > 1 ? group_steps * S::kKeys : keys.count;
  const int more = S::kGroups > 1 ? keys.count - (begin + group_steps) * S::kKeys : 0;
  std::conditional_t<kDropout, KeptBits<S>, NoneDropped> kept(
      in, out, queries, image, head, first, begin * S::kWords, ahead + more > 0, lane);
  Sums dq = {};
#pragma unroll 1
  for (; ahead > 0; ahead -= S::kKeys) {
    wait_for_copies<0>();
    __syncthreads();  // all have this tile, and have read the one before
    if (ahead > S::kKeys) tiles.copy(own + (columns ^ S::Tiles::kStage), row_steps);
    commit_copies();
    const int left = ahead + more;
    if (S::kGroups > 1 && left <= 0) continue;
    kept.step(left > S::kKeys);
#pragma unroll
    for (int c = 0; c < S::kKeys / 16; ++c) {
      const Stage* const k_tile = own + columns + c * 16 * kTileRow;
      uint32_t ds[kWarpTiles][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int key = 16 * c + 8 * n;
        uint32_t k[4], v[4];
        load_matrices(k, k_tile + n * 8 * kTileRow);
        load_matrices(v, k_tile + n * 8 * kTileRow + S::Tiles::kTile);
        float s[kWarpTiles][4], dp[kWarpTiles][4];
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
          dot_products<element_t>(s[m], q[m], k);
          dot_products<element_t>(dp[m], grad[m], v, less[m]);
        }
        // 2^exponent may be infinite, and the zeros that follow the last key would be NaN
        if (left < S::kKeys) {
          const float hidden = in_register(-float(kInfinity));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (key + lane % 4 * 2 + e % 2 < left) continue;
#pragma unroll
            for (int m = 0; m < kWarpTiles; ++m) s[m][e] = hidden;
          }
        }
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float e = exponent[m][h], l = less[m][2 * h];
            const uint32_t bits = kept.of_row(m, h, key / kKeysInWord);
            ds[m][2 * n + h] =
                score_gradients<kDropout, element_t>(weights(s[m] + 2 * h, e, e), dp[m] + 2 * h, l,
                                                     l, bits, bits << 1, key % kKeysInWord / 8);
          }
        }
      }
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        uint32_t k[4];
        load_matrices_transposed(k, own + (rows ^ slice * kSliceStep) + c * 16 * kTileRow);
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) add_rows<element_t>(dq[m], ds[m], k, slice);
      }
    }
    columns ^= S::Tiles::kStage;
    rows ^= S::Tiles::kStage;
  }
  if constexpr (S::kGroups > 1) {
    merge_groups<S>(dq, stages, group, thread);
    if (group > 0) return;
  }
  const float share = kDropout ? kept_share(in) : 1;
  grad_q.write<element_t>(dq, kScale / share, queries_of(in, image), image, head, first + lane / 4,
                          lane);
}

}  // namespace detr_fast
