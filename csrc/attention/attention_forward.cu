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
  static constexpr int kWords = kKeys / kKeysInWord;  // of a row and step
  using Tiles = TilePair<kKeys, kGroupThreads>;
  static constexpr int kStages = 2 * Tiles::kStage;  // bytes of a group
};

// Many queries: two tiles a warp halve what it reads from shared memory, 128 rows what the blocks
// read from the L2 cache. Few: one image's keys are divided, or most of the GPU would wait.
using Many = Shape<2, 4, 1, 64, 3>;
using Few = Shape<1, 4, 4, 32, 1>;

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

// Sets the scores from column `left` on to minus infinity.
template <int kColumns>
__device__ __forceinline__ void hide(float (&scores)[kColumns][4], int left, int lane) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (n * 8 + lane % 4 * 2 + e % 2 >= left) scores[n][e] = -float(kInfinity);
    }
  }
}

// Scores of tile m become probabilities, not yet divided by their sum, as fragments a.
template <typename element_t, int kTiles, int kColumns>
__device__ __forceinline__ void exponentials(uint32_t (&p)[kColumns / 2][4],
                                             const float (&scores)[kColumns][4],
                                             RunningSoftmax<kTiles>& state, int m) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = state.largest[m][h];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      largest = fmaxf(fmaxf(largest, scores[n][2 * h]), scores[n][2 * h + 1]);
    }
    largest = quad_max(largest);
    state.scale(m, h, exp2_fast((state.largest[m][h] - largest) * kScaleLog2E));
    state.largest[m][h] = largest;
    const float less = -largest * kScaleLog2E;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      p[n / 2][n % 2 * 2 + h] =
          pack<element_t>(exp2_fast(fmaf(scores[n][2 * h], kScaleLog2E, less)),
                          exp2_fast(fmaf(scores[n][2 * h + 1], kScaleLog2E, less)));
    }
  }
}

// Draws which weights of a warp's rows are kept, step by step, stores it and sets the others to 0.
// A lane draws for one row; there are as many rows as lanes, or half as many.
template <typename S>
class Dropout {
 public:
  __device__ __forceinline__ Dropout(const AttentionInputs& in, const AttentionOutputs& out,
                                     const Rows& queries, int image, int head, int first, int word,
                                     int lane)
      : seed_(uint64_t(*out.seed)), row_(first + lane % S::kWarpRows), word_(word) {
    const int words = keep_words(in.keys);
    if (lane < S::kWarpRows && row_ < queries.count) {
      bits_ = out.keep + heads_first(image, head, row_, in.heads, in.queries, words) + word;
    }
  }

  __device__ __forceinline__ void step(uint32_t (&p)[S::kTiles][S::kKeys / 16][4],
                                       const AttentionInputs& in) {
    const int problem = blockIdx.z * in.heads + blockIdx.y, lane = threadIdx.x % kWarpSize;
    uint32_t drawn[S::kWords];
#pragma unroll
    for (int w = 0; w < S::kWords; ++w) {
      drawn[w] = keep_word(seed_, problem, row_, word_ + w, in.kept);
    }
    word_ += S::kWords;
    if (bits_ != nullptr) {
      if constexpr (S::kWords == 2) {
        *reinterpret_cast<uint2*>(bits_) = uint2{drawn[0], drawn[1]};
      } else {
        *bits_ = drawn[0];
      }
      bits_ += S::kWords;
    }
    mask(p, drawn, lane);
  }

 private:
  static __device__ __forceinline__ void mask(uint32_t (&p)[S::kTiles][S::kKeys / 16][4],
                                              const uint32_t (&drawn)[S::kWords], int lane) {
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int w = 0; w < S::kWords; ++w) {
          const int row_steps = 16 * m + 8 * h + lane / 4;
          const uint32_t bits = __shfl_sync(kWholeWarp, drawn[w], row_steps) << (2 * (lane % 4));
#pragma unroll
          for (int n = 0; n < 4; ++n) {  // eights of the word's keys
            p[m][2 * w + n / 2][n % 2 * 2 + h] &=
                spread_signs(bits, bits << 1, 0xcc88 + 0x1111 * n);
          }
        }
      }
    }
  }

  const uint64_t seed_;
  uint32_t* bits_ = nullptr;  // to be stored next; null where this lane's are not
  const int row_;
  int word_;
};

struct NoDropout {
  template <typename... Arguments>
  __device__ __forceinline__ explicit NoDropout(const Arguments&...) {}

  template <typename Weights>
  __device__ __forceinline__ void step(Weights&, const AttentionInputs&) {}
};

// Adds the sums of the other groups of keys to those of the first, in their order.
template <typename S>
__device__ __forceinline__ void merge_groups(RunningSoftmax<S::kTiles>& state, Stage* stage,
                                             int group, int thread) {
  constexpr int kNumbers = S::kTiles * (4 + kColumnTiles * 4);
  static_assert(kNumbers * S::kGroupThreads * (S::kGroups - 1) * 4 <= S::kGroups * S::kStages);
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
            theirs == -float(kInfinity) ? 0 : exp2_fast((theirs - largest) * kScaleLog2E);
        const bool first = state.largest[m][h] == -float(kInfinity);
        state.scale(m, h, first ? 0 : exp2_fast((state.largest[m][h] - largest) * kScaleLog2E));
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

template <typename element_t, int kTiles>
__device__ __forceinline__ void write(const AttentionInputs& in, const AttentionOutputs& out,
                                      const RunningSoftmax<kTiles>& state, bool dropout, int image,
                                      int head, int first, int lane) {
  const Rows queries = queries_of(in, image);  // again: the main loop has no registers for them
  const float unkept = dropout ? float(kKeepLevels) / float(in.kept) : 1;
  auto* const results = static_cast<element_t*>(out.out);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
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
        const float largest = state.largest[m][h] * kScale;
        out.lse[heads_first(image, head, position, in.heads, in.queries, 1)] =
            sum == 0 ? -float(kInfinity) : largest + logf(sum);
      }
    }
  }
}

template <typename S, bool kDropout, typename element_t>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    attention_kernel(const AttentionInputs in, const AttentionOutputs out) {
  __shared__ __align__(128) Stage stages[S::kGroups * S::kStages];
  __shared__ RowSteps row_steps;
  const int image = blockIdx.z, head = blockIdx.y, block_first = blockIdx.x * S::kRows;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = S::kGroups > 1 ? warp / S::kQueryWarps : 0,
            thread = threadIdx.x % S::kGroupThreads;
  const int first = block_first + warp % S::kQueryWarps * S::kWarpRows;
  const Rows keys = keys_of(in, image);
  const int steps = (keys.count + S::kKeys - 1) / S::kKeys;
  const int group_steps = (steps + S::kGroups - 1) / S::kGroups, begin = group * group_steps;
  const Rows queries = queries_of(in, image);
  clear<S, kDropout, element_t>(in, out, queries, steps * S::kWords, image, head, block_first);
  if (block_first >= queries.count) return;

  uint32_t q[S::kTiles][kSlices][4];
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m) {
    read_rows(q[m], in.q, image, head, queries, first + 16 * m, lane);
  }
  std::conditional_t<kDropout, Dropout<S>, NoDropout> dropout(in, out, queries, image, head, first,
                                                              begin * S::kWords, lane);
  Stage* const own = stages + group * S::kStages;
  typename S::Tiles tiles(keys, begin * S::kKeys, in.k, in.v, image, head, thread);
  if (threadIdx.x == 0) row_steps.set(keys, S::Tiles::kPassRows);
  __syncthreads();
  int k_slot = columns_slot(lane), v_slot = S::Tiles::kTile + rows_slot(lane);
  if (group_steps > 0) tiles.copy(own + k_slot, row_steps);
  commit_copies();
  // keys of the first group that are to come, and of how many more or less this one knows
  int ahead = S::kGroups > 1 ? group_steps * S::kKeys : keys.count;
  const int more = S::kGroups > 1 ? keys.count - (begin + group_steps) * S::kKeys : 0;
  RunningSoftmax<S::kTiles> state;
#pragma unroll 1
  for (; ahead > 0; ahead -= S::kKeys) {
    wait_for_copies<0>();
    __syncthreads();  // all have this tile, and have read the one before
    if (ahead > S::kKeys) tiles.copy(own + (k_slot ^ S::Tiles::kStage), row_steps);
    commit_copies();
    const int left = ahead + more;
    if (S::kGroups > 1 && left <= 0) continue;

    // The tiles of a warp one after the other, though keys are read twice: the scores of both at a
    // time need more registers than there are, and one's exponentials hide the other's products.
    uint32_t p[S::kTiles][S::kKeys / 16][4];
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) {
      float scores[S::kKeys / 8][4];
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; ++n) {
        uint32_t k[4];
        load_matrices(k, own + k_slot + n * 8 * kTileRow);
        dot_products<element_t>(scores[n], q[m], k);
      }
      if (left < S::kKeys) hide(scores, left, lane);
      exponentials<element_t>(p[m], scores, state, m);
      // the sums are those of all weights, dropped or not, as rounded: a product with ones
#pragma unroll
      for (int c = 0; c < S::kKeys / 16; ++c) {
        multiply_add<element_t>(state.sum[m], p[m][c], kOnes<element_t>, kOnes<element_t>);
      }
    }
    dropout.step(p, in);
#pragma unroll
    for (int c = 0; c < S::kKeys / 16; ++c) {
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        uint32_t v[4];
        load_matrices_transposed(v, own + (v_slot ^ slice * kSliceStep) + c * 16 * kTileRow);
#pragma unroll
        for (int m = 0; m < S::kTiles; ++m) add_rows<element_t>(state.out[m], p[m][c], v, slice);
      }
    }
    k_slot ^= S::Tiles::kStage;
    v_slot ^= S::Tiles::kStage;
  }
  if constexpr (S::kGroups > 1) {
    merge_groups<S>(state, stages, group, thread);
    if (group > 0) return;
  }

  write<element_t>(in, out, state, kDropout, image, head, first, lane);
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
  if (few_queries(in)) return launch<Few, element_t>(in, out, stream);
  launch<Many, element_t>(in, out, stream);
}

}  // namespace

void launch_attention(const AttentionInputs& in, const AttentionOutputs& out, void* stream) {
  if (in.images == 0 || in.heads == 0 || in.queries == 0) return;
  if (in.type == ElementType::kHalf) return launch<__half>(in, out, stream);
  launch<__nv_bfloat16>(in, out, stream);
}

}  // namespace detr_fast
