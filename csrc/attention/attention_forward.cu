// SPDX-License-Identifier: Apache-2.0
// Attention, forward: a block takes some queries of one head of one image; each of its warps takes
// rows in sixteens, keeps their scores, probabilities and outputs in registers and goes through the
// keys tile by tile with a running maximum (Milakov and Gimelshein, 2018; Dao et al., NeurIPS
// 2022).
#include "attention/attention_kernels.h"
#include "attention/dropout.h"
#include "attention/tiles.cuh"

namespace detr_fast {

namespace {

// How a block divides its work.
template <int kTiles_, int kQueryWarps_, int kGroups_, int kKeys_, int kBlocks_>
struct Shape {
  static constexpr int kTiles = kTiles_;            // sixteens of queries of a warp
  static constexpr int kQueryWarps = kQueryWarps_;  // that go through the same keys
  static constexpr int kGroups = kGroups_;          // of such warps, each with some of the keys
  static constexpr int kKeys = kKeys_;              // of a step
  static constexpr int kBlocks = kBlocks_;          // that a multiprocessor shall hold at a time
  static constexpr int kWarpRows = 16 * kTiles;
  static constexpr int kRows = kWarpRows * kQueryWarps;
  static constexpr int kGroupThreads = kQueryWarps * kWarpSize;
  static constexpr int kThreads = kGroupThreads * kGroups;
  static constexpr int kWords = kKeys / kKeysInWord;   // of a row and step
  static constexpr int kStage = 2 * kKeys * kTileRow;  // bytes: keys and values
};

// Many queries: two tiles a warp halve what it reads from shared memory, 128 rows what the blocks
// read from the L2 cache. Few: one image's keys are divided, or most of the GPU would wait.
using Many = Shape<2, 4, 1, 64, 3>;
using Few = Shape<1, 4, 4, 32, 1>;
constexpr int kFewQueries = 128;

// The softmax of a warp's rows so far. Rows of a lane: tile m, half h; ends are of its quad's.
template <int kTiles>
struct RunningSoftmax {
  float largest[kTiles][2];            // score
  float sum[kTiles][4];                // of exponentials: fragment d, all columns alike
  float out[kTiles][kColumnTiles][4];  // sums of values, weighted

  __device__ __forceinline__ RunningSoftmax() : sum(), out() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) largest[m][0] = largest[m][1] = -float(kInfinity);
  }

  // Scales what has been summed for a maximum that is `factor` of log2 further.
  __device__ __forceinline__ void scale(int m, int h, float factor) {
    sum[m][2 * h] *= factor;
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      out[m][i][2 * h] *= factor;
      out[m][i][2 * h + 1] *= factor;
    }
  }
};

// The largest of four numbers of the lanes that share a row.
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 1));
  return fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 2));
}

// Scores of a step become probabilities, not yet divided by their sum, as fragments a.
template <typename element_t, int kTiles, int kKeys>
__device__ __forceinline__ void exponentials(uint32_t (&p)[kTiles][kKeys / 16][4],
                                             const float (&scores)[kTiles][kKeys / 8][4],
                                             RunningSoftmax<kTiles>& state, float scale) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = state.largest[m][h];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        largest = fmaxf(fmaxf(largest, scores[m][n][2 * h]), scores[m][n][2 * h + 1]);
      }
      largest = quad_max(largest);
      state.scale(m, h, exp2_fast((state.largest[m][h] - largest) * scale));
      state.largest[m][h] = largest;
      const float less = -largest * scale;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        p[m][n / 2][n % 2 * 2 + h] =
            pack<element_t>(exp2_fast(fmaf(scores[m][n][2 * h], scale, less)),
                            exp2_fast(fmaf(scores[m][n][2 * h + 1], scale, less)));
      }
    }
  }
}

// Draws and stores which weights of a step are kept, and sets the others to 0.
template <typename S>
__device__ __forceinline__ void drop(uint32_t (&p)[S::kTiles][S::kKeys / 16][4], uint32_t* keep,
                                     int words, uint64_t seed, int problem, int first, int queries,
                                     int first_word, int kept, int lane) {
  // a lane draws the words of one row: all lanes, or the first half of them
  uint32_t drawn[S::kWords];
  const int row = lane % S::kWarpRows;
#pragma unroll
  for (int w = 0; w < S::kWords; ++w) {
    drawn[w] = keep_word(seed, problem, first + row, first_word + w, kept);
  }
  if (lane < S::kWarpRows && first + row < queries) {
    uint32_t* const stored = keep + int64_t(first + row) * words + first_word;
    if constexpr (S::kWords == 2) {
      *reinterpret_cast<uint2*>(stored) = uint2{drawn[0], drawn[1]};
    } else {
      *stored = drawn[0];
    }
  }
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int w = 0; w < S::kWords; ++w) {
        const int source = 16 * m + 8 * h + lane / 4;
        const uint32_t bits = __shfl_sync(kWholeWarp, drawn[w], source) << (2 * (lane % 4));
#pragma unroll
        for (int n = 0; n < 4; ++n) {  // eights of the word's keys
          const uint32_t mask = spread_signs(bits << (n / 2), 0, n % 2 ? 0xbbaa : 0x9988);
          p[m][2 * w + n / 2][n % 2 * 2 + h] &= mask;
        }
      }
    }
  }
}

// Adds the sums of the other groups of keys to those of the first, in their order.
template <typename S>
__device__ __forceinline__ void merge_groups(RunningSoftmax<S::kTiles>& state, Stage* stage,
                                             float scale, int group, int thread) {
  constexpr int kNumbers = S::kTiles * (4 + kColumnTiles * 4);
  static_assert(kNumbers * S::kGroupThreads * (S::kGroups - 1) * 4 <= S::kGroups * 2 * S::kStage);
  float* const shared = reinterpret_cast<float*>(stage) + thread;
  __syncthreads();  // the tiles are no longer read
  if (group > 0) {
    float* to = shared + (group - 1) * kNumbers * S::kGroupThreads;
    const auto put = [&](float value) {
      *to = value;
      to += S::kGroupThreads;
    };
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        put(state.largest[m][h]);
        put(state.sum[m][2 * h]);
#pragma unroll
        for (int i = 0; i < kColumnTiles; ++i) {
          put(state.out[m][i][2 * h]);
          put(state.out[m][i][2 * h + 1]);
        }
      }
    }
  }
  __syncthreads();
  if (group > 0) return;
  for (int other = 1; other < S::kGroups; ++other) {
    const float* from = shared + (other - 1) * kNumbers * S::kGroupThreads;
    const auto get = [&] {
      const float value = *from;
      from += S::kGroupThreads;
      return value;
    };
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float theirs = get(), largest = fmaxf(state.largest[m][h], theirs);
        // no keys: nothing to add, and infinity less infinity is NaN
        const float weight =
            theirs == -float(kInfinity) ? 0 : exp2_fast((theirs - largest) * scale);
        const bool first = state.largest[m][h] == -float(kInfinity);
        state.scale(m, h, first ? 0 : exp2_fast((state.largest[m][h] - largest) * scale));
        state.largest[m][h] = largest;
        state.sum[m][2 * h] += get() * weight;
#pragma unroll
        for (int i = 0; i < kColumnTiles; ++i) {
          state.out[m][i][2 * h] += get() * weight;
          state.out[m][i][2 * h + 1] += get() * weight;
        }
      }
    }
  }
}

// What is not computed: outputs of rows that are not real, and bits that nobody has drawn.
template <typename S, bool kDropout, typename element_t>
__device__ __forceinline__ void clear(const AttentionInputs& in, const AttentionOutputs& out,
                                      const Rows& queries, int words_drawn, int image, int head,
                                      int first) {
  each_padded_chunk<S::kRows, S::kThreads>(
      queries, in.queries, first, threadIdx.x, [&](int position, int chunk) {
        auto* const all = static_cast<element_t*>(out.out);
        clear_chunk(all + rows_first(image, position, head, in.queries, in.heads, kHeadDim), chunk);
        if (chunk == 0) {
          out.lse[heads_first(image, head, position, in.heads, in.queries, 1)] = -float(kInfinity);
        }
      });
  if constexpr (kDropout) {
    const int words = keep_words(in.keys), last = min(first + S::kRows, in.queries);
    for (int row = first + threadIdx.x / kWarpSize; row < last; row += S::kThreads / kWarpSize) {
      uint32_t* const bits = out.keep + heads_first(image, head, row, in.heads, in.queries, words);
      const int begin = row < queries.count ? words_drawn : 0;
      for (int w = begin + threadIdx.x % kWarpSize; w < words; w += kWarpSize) bits[w] = 0;
    }
  }
}

template <typename S, bool kDropout, typename element_t>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    attention_kernel(const AttentionInputs in, const AttentionOutputs out) {
  __shared__ __align__(128) Stage stages[S::kGroups * 2 * S::kStage];
  const int image = blockIdx.z, head = blockIdx.y, block_first = blockIdx.x * S::kRows;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = warp / S::kQueryWarps, thread = threadIdx.x % S::kGroupThreads;
  const int first = block_first + warp % S::kQueryWarps * S::kWarpRows;
  const Rows queries = rows_of(in.query_rect, nullptr, image, in.queries, in.padded_width);
  const Rows keys = rows_of(in.key_rect, in.key_count, image, in.keys, in.padded_width);
  const int steps = (keys.count + S::kKeys - 1) / S::kKeys;

  clear<S, kDropout, element_t>(in, out, queries, steps * S::kWords, image, head, block_first);
  if (block_first >= queries.count) return;

  uint32_t q[S::kTiles][kSlices][4];
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m) {
    read_rows(q[m], in.q, image, head, queries, first + 16 * m, lane);
  }
  const float scale = kLog2E * rsqrtf(float(kHeadDim));
  const int problem = image * in.heads + head;
  uint32_t* const keep =
      kDropout ? out.keep + heads_first(image, head, 0, in.heads, in.queries, keep_words(in.keys))
               : nullptr;
  const uint64_t seed = kDropout ? uint64_t(*out.seed) : 0;

  const int group_steps = (steps + S::kGroups - 1) / S::kGroups, begin = group * group_steps;
  Stage* const own = stages + group * 2 * S::kStage;
  TilePair<S::kGroupThreads> tiles(keys, begin * S::kKeys, in.k, in.v, image, head, thread);
  if (group_steps > 0) tiles.template copy<S::kKeys>(own, own + S::kStage / 2);
  commit_copies();
  RunningSoftmax<S::kTiles> state;
#pragma unroll 1
  for (int i = 0; i < group_steps; ++i) {
    const Stage* const k_tile = own + (i % 2) * S::kStage;
    const Stage* const v_tile = k_tile + S::kStage / 2;
    wait_for_copies<0>();
    __syncthreads();  // all have this tile, and have read the one before
    if (i + 1 < group_steps) {
      Stage* const next = own + ((i + 1) % 2) * S::kStage;
      tiles.template copy<S::kKeys>(next, next + S::kStage / 2);
    }
    commit_copies();
    const int left = keys.count - (begin + i) * S::kKeys;
    if (S::kGroups > 1 && left <= 0) continue;

    float scores[S::kTiles][S::kKeys / 8][4];
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
      uint32_t k[4];
      load_matrices(k, k_tile + columns_slot(lane) + n * 8 * kTileRow);
#pragma unroll
      for (int m = 0; m < S::kTiles; ++m) dot_products<element_t>(scores[m][n], q[m], k);
    }
    if (left < S::kKeys) {
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool real = n * 8 + lane % 4 * 2 + e % 2 < left;
#pragma unroll
          for (int m = 0; m < S::kTiles; ++m) {
            scores[m][n][e] = real ? scores[m][n][e] : -float(kInfinity);
          }
        }
      }
    }
    uint32_t p[S::kTiles][S::kKeys / 16][4];
    exponentials<element_t, S::kTiles, S::kKeys>(p, scores, state, scale);
    // the sums are those of all weights, dropped or not, as rounded: a product with ones
    const uint32_t ones = pack<element_t>(1, 1);
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
      for (int c = 0; c < S::kKeys / 16; ++c) {
        multiply_add<element_t>(state.sum[m], p[m][c], ones, ones);
      }
    }
    if constexpr (kDropout) {
      drop<S>(p, keep, keep_words(in.keys), seed, problem, first, queries.count,
              (begin + i) * S::kWords, in.kept, lane);
    }
#pragma unroll
    for (int c = 0; c < S::kKeys / 16; ++c) {
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        uint32_t v[4];
        load_matrices_transposed(v, v_tile + rows_slot(lane, slice) + c * 16 * kTileRow);
#pragma unroll
        for (int m = 0; m < S::kTiles; ++m) add_rows<element_t>(state.out[m], p[m][c], v, slice);
      }
    }
  }
  wait_for_copies<0>();
  if constexpr (S::kGroups > 1) {
    merge_groups<S>(state, stages, scale, group, thread);
    if (group > 0) return;
  }

  const float unkept = kDropout ? float(kKeepLevels) / float(in.kept) : 1;
  auto* const results = static_cast<element_t*>(out.out);
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int number = first + 16 * m + 8 * h + lane / 4;
      if (number >= queries.count) continue;
      const int position = queries.position(number);
      const float sum = state.sum[m][2 * h];
      const float factor = sum == 0 ? 0 : unkept / sum;  // no keys: 0; a NaN stays
      write_row(results + rows_first(image, position, head, in.queries, in.heads, kHeadDim),
                state.out[m], h, factor, lane);
      if (lane % 4 == 0) {
        const float largest = state.largest[m][h] * rsqrtf(float(kHeadDim));
        out.lse[heads_first(image, head, position, in.heads, in.queries, 1)] =
            sum == 0 ? -float(kInfinity) : largest + logf(sum);
      }
    }
  }
}

template <typename S, bool kDropout, typename element_t>
void launch(const AttentionInputs& in, const AttentionOutputs& out, void* stream) {
  const dim3 grid((in.queries + S::kRows - 1) / S::kRows, in.heads, in.images);
  DETR_FAST_LAUNCH((attention_kernel<S, kDropout, element_t>), grid, dim3(S::kThreads), 0, stream,
                   in, out);
}

template <typename S, typename element_t>
void launch(const AttentionInputs& in, const AttentionOutputs& out, void* stream) {
  if (in.kept < kKeepLevels) return launch<S, true, element_t>(in, out, stream);
  launch<S, false, element_t>(in, out, stream);
}

template <typename element_t>
void launch(const AttentionInputs& in, const AttentionOutputs& out, void* stream) {
  // by what does not depend on the other images of a batch: else an image's bits would
  const bool few = in.queries <= kFewQueries && in.query_rect == nullptr;
  if (few) return launch<Few, element_t>(in, out, stream);
  launch<Many, element_t>(in, out, stream);
}

}  // namespace

void launch_attention(const AttentionInputs& in, const AttentionOutputs& out, void* stream) {
  if (in.images == 0 || in.heads == 0 || in.queries == 0) return;
  if (in.type == ElementType::kHalf) return launch<__half>(in, out, stream);
  launch<__nv_bfloat16>(in, out, stream);
}

}  // namespace detr_fast
