// SPDX-License-Identifier: Apache-2.0
// What the passes of attention's backward share: blocks of keys go through the queries and sum up
// the gradients of k and v, blocks of queries go through the keys and sum up that of q. Scores are
// computed in both; in return no block adds to what another one has written, and every sum has one
// order.
//   p = exp(score - lse)  dP = grad v^T  delta = sum(grad * out)  dS = p * (dP - delta)
//   dV = p^T grad         dK = kScale * dS^T q                    dQ = kScale * dS k
// Dropout that keeps a share r of the weights multiplies p in dV and dP by 0 or 1 / r; here all is
// summed up times r.
#pragma once

#include "attention/attention_kernels.h"
#include "attention/dropout.h"
#include "attention/tiles.cuh"

namespace detr_fast {

constexpr int kWarpTiles = 2;  // sixteens of rows: two halve what shared memory has to give
constexpr int kWarpRows = 16 * kWarpTiles;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

using Fragments = uint32_t[kWarpTiles][kSlices][4];  // of a warp's rows: a
using Sums = float[kWarpTiles][kColumnTiles][4];     // d

// Of a pair of queries, counted among real rows; behind the last one all weights shall be 0. Each
// number twice, as the columns of a lane's fragment d.
struct Statistics {
  float exponent[4];  // p = 2^(score in log2 + exponent)
  float less[4];      // dS = p * (dP + less)
};

// Those of a head.
__device__ __forceinline__ Statistics* statistics_of(const AttentionInputs& in,
                                                     const AttentionGradients& out, int image,
                                                     int head) {
  const int64_t pairs = statistics_rows(in.queries) / 2;
  return reinterpret_cast<Statistics*>(out.statistics) + (int64_t(image) * in.heads + head) * pairs;
}

__device__ __forceinline__ float kept_share(const AttentionInputs& in) {
  return float(in.kept) / float(kKeepLevels);
}

// Weights of two neighbours in a fragment of products q k^T.
__device__ __forceinline__ float2 weights(const float* s, float exponent0, float exponent1) {
  return {exp2_fast(fmaf(s[0], kScaleLog2E, exponent0)),
          exp2_fast(fmaf(s[1], kScaleLog2E, exponent1))};
}

// dS of the same two as elements, from dp = dP + less. Bits tell by the sign of byte `byte` whether
// a weight is kept.
template <bool kDropout, typename element_t>
__device__ __forceinline__ uint32_t score_gradients(float2 p, const float* dp, float less0,
                                                    float less1, uint32_t bits0, uint32_t bits1,
                                                    int byte) {
  const auto choose = [&](uint32_t bits, float kept, float dropped) {
    if (!kDropout) return kept;
    const uint32_t mask = spread_signs(bits, 0, 0x8888 + 0x1111 * byte);
    return __uint_as_float((__float_as_uint(kept) & mask) | (__float_as_uint(dropped) & ~mask));
  };
  return pack<element_t>(p.x * choose(bits0, dp[0], less0), p.y * choose(bits1, dp[1], less1));
}

// A gradient: (images, length, heads, kHeadDim), rows `step` elements apart.
struct Gradient {
  void* data;
  int64_t step;
  int length;

  // Unsigned numbers are extended for nothing, signed ones would be kept for it through a main
  // loop.
  template <typename element_t>
  __device__ __forceinline__ element_t* row(unsigned image, unsigned head,
                                            unsigned position) const {
    return static_cast<element_t*>(data) +
           int64_t(uint64_t(image) * unsigned(length) + position) * step + head * kHeadDim;
  }

  // Zeros to those of kRows rows of the padded sequence that are not real.
  template <typename element_t, int kRows>
  __device__ __forceinline__ void clear(const Rows& rows, int image, int head, int first) const {
    each_padded_chunk<kRows, kThreads>(rows, length, first, threadIdx.x,
                                       [&](int position, int chunk) {
                                         clear_chunk(row<element_t>(image, head, position), chunk);
                                       });
  }

  // A warp's sums, times `factor`, to real rows; this lane's first one has number `own`.
  template <typename element_t>
  __device__ __forceinline__ void write(const Sums& sums, float factor, const Rows& rows, int image,
                                        int head, int own, int lane) const {
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int number = own + 16 * m + 8 * h;
        if (number >= rows.count) continue;
        write_row(row<element_t>(image, head, rows.position(number)), sums[m], h, factor, lane);
      }
    }
  }
};

}  // namespace detr_fast
