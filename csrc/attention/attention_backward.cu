// SPDX-License-Identifier: Apache-2.0
// Attention, backward: blocks of keys go through the queries and sum up the gradients of k and v,
// blocks of queries go through the keys and sum up that of q. Scores are computed in both; in
// return no block adds to what another one has written, and every sum has one order.
//   p = exp(score - lse)  dP = grad v^T  delta = sum(grad * out)  dS = p * (dP - delta)
//   dV = p^T grad         dK = kScale * dS^T q                    dQ = kScale * dS k
// Dropout that keeps a share r of the weights multiplies p in dV and dP by 0 or 1 / r; here all is
// summed up times r.
#include "attention/attention_kernels.h"
#include "attention/dropout.h"
#include "attention/tiles.cuh"
#include "common/element.cuh"

namespace detr_fast {

namespace {

constexpr int kTiles = 2;  // sixteens of rows of a warp: two halve what shared memory has to give
constexpr int kWarpRows = 16 * kTiles;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocks = 3;  // that a multiprocessor shall hold at a time

using Sums = float[kTiles][kColumnTiles][4];  // of a warp's rows, fragments d

__device__ __forceinline__ Rows queries_of(const AttentionInputs& in, int image) {
  return rows_of(in.query_rect, nullptr, image, in.queries, in.padded_width);
}

__device__ __forceinline__ Rows keys_of(const AttentionInputs& in, int image) {
  return rows_of(in.key_rect, in.key_count, image, in.keys, in.padded_width);
}

__device__ __forceinline__ float kept_share(const AttentionInputs& in) {
  return float(in.kept) / float(kKeepLevels);
}

// ---- statistics of queries, in the order of their real rows

struct Statistics {
  float *exponent, *less;  // of p = 2^(score in log2 + exponent) and dS = p * (dP + less)
};

__device__ __forceinline__ Statistics statistics_of(const AttentionInputs& in,
                                                    const AttentionGradients& out, int image,
                                                    int head) {
  const int rows = statistics_rows(in.queries);
  float* const exponent = out.statistics + heads_first(image, head, 0, in.heads, 2, rows);
  return {exponent, exponent + rows};
}

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
    statistics_kernel(const AttentionInputs in, const AttentionGradients out) {
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
  const Statistics of = statistics_of(in, out, image, head);
  const int64_t at = heads_first(image, head, position, in.heads, in.queries, 1);
  of.exponent[row] = real ? -kLog2E * out.lse[at] : -float(kInfinity);
  of.less[row] = -kept_share(in) * delta;
}

// ---- what both passes do

// All ones where a bit is set, else zeros: of the sign of byte `byte`.
__device__ __forceinline__ uint32_t mask_of(uint32_t bits, int byte) {
  return spread_signs(bits, 0, 0x8888 + 0x1111 * byte);
}

// Two neighbours of a fragment: from products s = q k^T and dp = dP + less to p, without what is
// dropped, and dS as elements. A mask is all ones where a weight is kept.
template <typename element_t>
__device__ __forceinline__ void weigh(uint32_t& p, uint32_t& ds, const float* s, const float* dp,
                                      float2 exponent, float2 less, uint32_t mask0,
                                      uint32_t mask1) {
  const auto choose = [](uint32_t mask, float kept, float dropped) {
    return __uint_as_float((__float_as_uint(kept) & mask) | (__float_as_uint(dropped) & ~mask));
  };
  const float p0 = exp2_fast(fmaf(s[0], kScaleLog2E, exponent.x));
  const float p1 = exp2_fast(fmaf(s[1], kScaleLog2E, exponent.y));
  p = pack<element_t>(choose(mask0, p0, 0), choose(mask1, p1, 0));
  ds = pack<element_t>(p0 * choose(mask0, dp[0], less.x), p1 * choose(mask1, dp[1], less.y));
}

// Where gradients go: a tensor whose rows are `step` elements apart.
struct Output {
  void* data;
  int64_t step;
  int length;
};

template <typename element_t>
__device__ __forceinline__ element_t* row_of(const Output& out, int image, int head, int position) {
  return static_cast<element_t*>(out.data) + (int64_t(image) * out.length + position) * out.step +
         head * kHeadDim;
}

template <int kRows, typename element_t>
__device__ __forceinline__ void clear(const Output& out, const Rows& rows, int image, int head,
                                      int first) {
  each_padded_chunk<kRows, kThreads>(
      rows, out.length, first, threadIdx.x, [&](int position, int chunk) {
        clear_chunk(row_of<element_t>(out, image, head, position), chunk);
      });
}

template <typename element_t>
__device__ __forceinline__ void write(const Output& out, const Rows& rows, const Sums& sums,
                                      float factor, int image, int head, int first, int lane) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int number = first + 16 * m + 8 * h + lane / 4;
      if (number >= rows.count) continue;
      write_row(row_of<element_t>(out, image, head, rows.position(number)), sums[m], h, factor,
                lane);
    }
  }
}

// ---- gradients of k and v

constexpr int kKeyRows = kWarps * kWarpRows;  // of a block
constexpr int kQueryStep = kStatisticsRows;
static_assert(kWarpRows == kKeysInWord);

using QueryTiles = TilePair<kQueryStep, kThreads>;

// What is in shared memory beside the tiles of q and grad, in bytes: of two stages by turns.
constexpr int kLess = kQueryStep * sizeof(float);
constexpr int kKeep = 2 * kLess;
constexpr int kSide = 2048;
static_assert(kKeep + kQueryStep * kChunk <= kSide);
constexpr int kKeyShared = 2 * (QueryTiles::kStage + kSide);

// Copies what is beside a tile: statistics of its queries and which of the block's keys they keep.
template <bool kDropout>
class SideCopy {
 public:
  __device__ __forceinline__ SideCopy(const AttentionInputs& in, const AttentionGradients& out,
                                      int image, int head, int first_key, int thread)
      : row_(thread), words_(keep_words(in.keys)) {
    constexpr int kCopies = kLess / kChunk;  // of one of the two
    const Statistics of = statistics_of(in, out, image, head);
    statistics_ = (thread < kCopies ? of.exponent : of.less) + thread % kCopies * 4;
    copies_statistics_ = thread < 2 * kCopies;
    if constexpr (kDropout) {
      keep_ = out.keep + heads_first(image, head, thread, in.heads, in.queries, words_) +
              first_key / kKeysInWord;
    }
  }

  __device__ __forceinline__ void copy(Stage* to, int queries) {
    if (copies_statistics_) copy_16_async(to + threadIdx.x * kChunk, statistics_, true);
    statistics_ += kQueryStep;
    if constexpr (kDropout) {
      if (threadIdx.x < kQueryStep) {
        copy_16_async(to + kKeep + threadIdx.x * kChunk, keep_, row_ < queries);
      }
      row_ += kQueryStep;
      keep_ += int64_t(kQueryStep) * words_;
    }
  }

 private:
  const float* statistics_;
  const uint32_t* keep_ = nullptr;
  int row_;
  const int words_;
  bool copies_statistics_;
};

template <bool kDropout, typename element_t>
__device__ __forceinline__ void key_gradients(const AttentionInputs& in,
                                              const AttentionGradients& out, Stage* stages,
                                              RowSteps& row_steps, int block_first) {
  const int image = blockIdx.z, head = blockIdx.y;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int first = block_first + warp * kWarpRows;
  const Output grad_k = {out.grad_k, out.key_step, in.keys};
  const Output grad_v = {out.grad_v, out.key_step, in.keys};
  const Rows keys = keys_of(in, image), queries = queries_of(in, image);
  clear<kKeyRows, element_t>(grad_k, keys, image, head, block_first);
  clear<kKeyRows, element_t>(grad_v, keys, image, head, block_first);
  if (block_first >= keys.count) return;

  uint32_t k[kTiles][kSlices][4], v[kTiles][kSlices][4];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    read_rows(k[m], in.k, image, head, keys, first + 16 * m, lane);
    read_rows(v[m], in.v, image, head, keys, first + 16 * m, lane);
  }
  QueryTiles tiles(queries, 0, in.q, out.grad, image, head, threadIdx.x);
  SideCopy<kDropout> sides(in, out, image, head, block_first, threadIdx.x);
  if (threadIdx.x == 0) row_steps.set(queries, QueryTiles::kPassRows);
  __syncthreads();
  Stage* side = stages + 2 * QueryTiles::kStage;
  int ahead = queries.count;
  if (ahead > 0) {
    tiles.copy(stages, row_steps);
    sides.copy(side, queries.count);
  }
  commit_copies();
  int columns = columns_slot(lane), rows = rows_slot(lane), beside = 0;
  Sums dk = {}, dv = {};
#pragma unroll 1
  for (; ahead > 0; ahead -= kQueryStep) {
    wait_for_copies<0>();
    __syncthreads();  // all have this tile, and have read the one before
    if (ahead > kQueryStep) {
      tiles.copy(stages, row_steps);
      sides.copy(side + (beside ^ kSide), queries.count);
    }
    commit_copies();
    const Stage* const exponents = side + beside + lane % 4 * 2 * sizeof(float);
    const Stage* const kept = side + beside + kKeep + (lane % 4 * 2 * kChunk + warp * 4);
#pragma unroll
    for (int c = 0; c < kQueryStep / 16; ++c) {
      uint32_t p[kTiles][4], ds[kTiles][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int query = 16 * c + 8 * n;
        uint32_t q[4], grad[4];
        load_matrices(q, stages + columns + query * kTileRow);
        load_matrices(grad, stages + columns + query * kTileRow + QueryTiles::kTile);
        const Stage* const pair = exponents + query * sizeof(float);
        const float2 exponent = *reinterpret_cast<const float2*>(pair);
        const float2 less = *reinterpret_cast<const float2*>(pair + kLess);
        uint32_t bits0 = ~0u, bits1 = ~0u;
        if constexpr (kDropout) {
          const auto* const words = reinterpret_cast<const uint32_t*>(kept + query * kChunk);
          bits0 = words[0] << (lane / 4);
          bits1 = words[kChunk / 4] << (lane / 4);
        }
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          float s[4] = {}, dp[4] = {less.x, less.y, less.x, less.y};
          add_dot_products<element_t>(s, k[m], q);
          add_dot_products<element_t>(dp, v[m], grad);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int eight = 2 * m + h;  // of the warp's keys
            weigh<element_t>(p[m][2 * n + h], ds[m][2 * n + h], s + 2 * h, dp + 2 * h, exponent,
                             less, kDropout ? mask_of(bits0, eight) : ~0u,
                             kDropout ? mask_of(bits1, eight) : ~0u);
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
        for (int m = 0; m < kTiles; ++m) {
          add_rows<element_t>(dk[m], ds[m], q, slice);
          add_rows<element_t>(dv[m], p[m], grad, slice);
        }
      }
    }
    columns ^= QueryTiles::kStage;
    rows ^= QueryTiles::kStage;
    beside ^= kSide;
  }
  const Rows written = keys_of(in, image);  // again: the main loop has no registers for them
  const float share = kDropout ? kept_share(in) : 1;
  write<element_t>(grad_k, written, dk, kScale / share, image, head, first, lane);
  write<element_t>(grad_v, written, dv, 1 / share, image, head, first, lane);
}

// ---- gradients of q

// How a block of queries divides its work.
template <int kQueryWarps_, int kKeys_>
struct Shape {
  static constexpr int kQueryWarps = kQueryWarps_;  // that go through the same keys
  static constexpr int kGroups =
      kWarps / kQueryWarps_;            // of such warps, each with some of the keys
  static constexpr int kKeys = kKeys_;  // of a step
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
    for (int m = 0; m < kTiles; ++m) {
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

  // Of a lane's row of half h of tile m: its key e of the eight from `key` on.
  __device__ __forceinline__ uint32_t mask(int m, int h, int key, int e) const {
    return mask_of(bits_[m][h][key / kKeysInWord] << e, key % kKeysInWord / 8);
  }

 private:
  __device__ __forceinline__ void read(bool any) {
    if (!any) return;
#pragma unroll
    for (int w = 0; w < S::kWords; ++w) next_[w] = keep_[w];
    keep_ += S::kWords;
  }

  const uint32_t* keep_;  // of the lane's row
  uint32_t next_[S::kWords] = {}, bits_[kTiles][2][S::kWords];
};

struct NoneDropped {
  template <typename... Arguments>
  __device__ __forceinline__ explicit NoneDropped(const Arguments&...) {}

  __device__ __forceinline__ void step(bool) {}
  __device__ __forceinline__ uint32_t mask(int, int, int, int) const { return ~0u; }
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
  const Output grad_q = {out.grad_q, out.query_step, in.queries};
  const Rows queries = queries_of(in, image), keys = keys_of(in, image);
  clear<S::kRows, element_t>(grad_q, queries, image, head, block_first);
  if (block_first >= queries.count) return;

  uint32_t q[kTiles][kSlices][4], grad[kTiles][kSlices][4];
  float exponent[kTiles][2], less[kTiles][2];
  const Statistics of = statistics_of(in, out, image, head);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    read_rows(q[m], in.q, image, head, queries, first + 16 * m, lane);
    read_rows(grad[m], out.grad, image, head, queries, first + 16 * m, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(first + 16 * m + 8 * h + lane / 4, queries.count - 1);
      exponent[m][h] = of.exponent[row];
      less[m][h] = of.less[row];
    }
  }
  const int steps = (keys.count + S::kKeys - 1) / S::kKeys;
  const int group_steps = (steps + S::kGroups - 1) / S::kGroups, begin = group * group_steps;
  Stage* const own = stages + group * S::kStages;
  typename S::Tiles tiles(keys, begin * S::kKeys, in.k, in.v, image, head, thread);
  if (threadIdx.x == 0) row_steps.set(keys, S::Tiles::kPassRows);
  __syncthreads();
  if (group_steps > 0) tiles.copy(own, row_steps);
  commit_copies();
  // keys of the first group that are to come, and of how many more or less this one knows
  int ahead = S::kGroups > 1 ? group_steps * S::kKeys : keys.count;
  const int more = S::kGroups > 1 ? keys.count - (begin + group_steps) * S::kKeys : 0;
  std::conditional_t<kDropout, KeptBits<S>, NoneDropped> kept(
      in, out, queries, image, head, first, begin * S::kWords, ahead + more > 0, lane);
  int columns = columns_slot(lane), rows = rows_slot(lane);
  Sums dq = {};
#pragma unroll 1
  for (; ahead > 0; ahead -= S::kKeys) {
    wait_for_copies<0>();
    __syncthreads();  // all have this tile, and have read the one before
    if (ahead > S::kKeys) tiles.copy(own, row_steps);
    commit_copies();
    const int left = ahead + more;
    if (S::kGroups > 1 && left <= 0) continue;
    kept.step(left > S::kKeys);
#pragma unroll
    for (int c = 0; c < S::kKeys / 16; ++c) {
      uint32_t ds[kTiles][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int key = 16 * c + 8 * n;
        uint32_t k[4], v[4];
        load_matrices(k, own + columns + key * kTileRow);
        load_matrices(v, own + columns + key * kTileRow + S::Tiles::kTile);
        float s[kTiles][4] = {}, dp[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          add_dot_products<element_t>(s[m], q[m], k);
          dp[m][0] = dp[m][1] = less[m][0];
          dp[m][2] = dp[m][3] = less[m][1];
          add_dot_products<element_t>(dp[m], grad[m], v);
        }
        // 2^exponent may be infinite, and the zeros that follow the last key would be NaN
        if (left < S::kKeys) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (key + lane % 4 * 2 + e % 2 < left) continue;
#pragma unroll
            for (int m = 0; m < kTiles; ++m) s[m][e] = -float(kInfinity);
          }
        }
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t unused;
            weigh<element_t>(unused, ds[m][2 * n + h], s[m] + 2 * h, dp[m] + 2 * h,
                             float2{exponent[m][h], exponent[m][h]}, float2{less[m][h], less[m][h]},
                             kept.mask(m, h, key, 0), kept.mask(m, h, key, 1));
          }
        }
      }
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        uint32_t k[4];
        load_matrices_transposed(k, own + (rows ^ slice * kSliceStep) + c * 16 * kTileRow);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) add_rows<element_t>(dq[m], ds[m], k, slice);
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
  write<element_t>(grad_q, queries_of(in, image), dq, kScale / share, image, head, first, lane);
}

// ---- both in one launch

template <bool kDropout, typename element_t>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradients_kernel(const AttentionInputs in, const AttentionGradients out) {
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
    DETR_FAST_LAUNCH((statistics_kernel<element_t>), grid, dim3(kStatisticsRows * kChunks), 0,
                     stream, in, out);
  }
  const int query_rows = few_queries(in) ? Few::kRows : Many::kRows;
  const dim3 grid(blocks(in.keys, kKeyRows) + blocks(in.queries, query_rows), heads, images);
  DETR_FAST_LAUNCH((gradients_kernel<kDropout, element_t>), grid, dim3(kThreads), 0, stream, in,
                   out);
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
