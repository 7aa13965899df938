// SPDX-License-Identifier: Apache-2.0
// The lane policy of assignment.h for a GPU: one warp solves one problem. More warps would not be
// faster below about 1000 columns: a barrier between them costs what they would save.
#pragma once

#include "common/cuda.h"
#include "common/warp.cuh"
#include "matcher/assignment.h"

namespace detr_fast {

// Integers that are ordered as the numbers are, for the integer minimum that a warp has as one
// instruction. Not for NaN.
__device__ __forceinline__ unsigned ordered(float value) {
  const int bits = __float_as_int(value);
  return unsigned(bits) ^ (unsigned(bits >> 31) | 0x80000000u);
}

__device__ __forceinline__ float from_ordered(unsigned key) {
  const int bits = int(key);
  return __int_as_float(bits < 0 ? int(key ^ 0x80000000u) : ~bits);
}

__device__ __forceinline__ unsigned long long ordered(double value) {
  const long long bits = __double_as_longlong(value);
  return static_cast<unsigned long long>(bits) ^
         (static_cast<unsigned long long>(bits >> 63) | 0x8000000000000000ull);
}

__device__ __forceinline__ double from_ordered(unsigned long long key) {
  const long long bits = static_cast<long long>(key);
  return __longlong_as_double(bits < 0 ? static_cast<long long>(key ^ 0x8000000000000000ull)
                                       : ~bits);
}

// The distance of two rows of costs in a kernel's memory: odd, so that neither rows nor columns
// fall into one bank of the shared memory.
__host__ __device__ __forceinline__ int row_stride(int columns) { return columns | 1; }

__host__ __device__ __forceinline__ size_t round_up_16(size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

struct WarpLanes {
  static constexpr int kLanes = kWarpSize;

  __device__ __forceinline__ int lane() const { return int(threadIdx.x % kWarpSize); }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ unsigned ballot(bool bit) const {
    return __ballot_sync(kWholeWarp, bit);
  }
  __device__ __forceinline__ bool leads(int key) const {
    return __ffs(int(__match_any_sync(kWholeWarp, key))) - 1 == lane();
  }

  __device__ __forceinline__ unsigned least(unsigned value) const {
    return __reduce_min_sync(kWholeWarp, value);
  }
  __device__ __forceinline__ float least(float value) const {
    return from_ordered(least(ordered(value)));
  }
  __device__ __forceinline__ double least(double value) const {
    const unsigned long long key = ordered(value);
    const unsigned high = least(unsigned(key >> 32));
    const unsigned low = least(unsigned(key >> 32) == high ? unsigned(key) : ~0u);
    return from_ordered(static_cast<unsigned long long>(high) << 32 | low);
  }

  template <typename scalar_t>
  __device__ __forceinline__ RowMinimum<scalar_t> row_minimum(const scalar_t* row,
                                                              int columns) const {
    scalar_t value = scalar_t(kInfinity);
    unsigned column = unsigned(kFree);
    for (int j = lane(); j < columns; j += kLanes) {
      if (row[j] < value) {
        value = row[j];
        column = unsigned(j);
      }
    }
    const scalar_t minimum = least(value);
    return {minimum, int(least(value == minimum ? column : unsigned(kFree)))};
  }

  template <Ties kTies, typename scalar_t>
  __device__ __forceinline__ Nearest advance(const scalar_t* cost, const AssignmentState& state,
                                             Front front) const {
    if (front.first) {
      for (int j = lane(); j < state.columns; j += kLanes) state.length[j] = kInfinity;
    }
    Own own[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) own[k] = {kInfinity, kFree, 0};
    int j = lane();
    const int last = state.columns - 1, step = kTogether * kLanes;
    for (int end = state.columns / step * step; j < end; j += step) {
      look<kTies, false>(cost, state, front, j, last, own);
    }
    if (last % step != step - 1) look<kTies, true>(cost, state, front, j, last, own);
#pragma unroll
    for (int k = 1; k < kTogether; ++k) own[0] = nearer_of(own[0], own[k]);
    const double nearest = least(own[0].length);
    unsigned rank = kNoRank;
    if (own[0].length == nearest && own[0].column != kFree) {
      rank = rank_of<kTies>(state, own[0].column);
      for (j = lane(); own[0].again && j <= last; j += kLanes) {
        if (state.length[j] == nearest) rank = min(rank, rank_of<kTies>(state, j));
      }
    }
    return {nearest, least(rank)};
  }

 private:
  // Columns of a lane that are read before the first of them is written: a load from shared memory
  // must not be moved over a store, and each column would wait for the one before. They are also
  // compared in as many chains, as one comparison in float64 waits for the other.
  static constexpr int kTogether = kPadding / kLanes;

  // The nearest of some columns of a lane, and whether another of them is as near.
  struct Own {
    double length;
    int column, again;
  };

  static __device__ __forceinline__ Own nearer_of(Own a, Own b) {
    const bool nearer = b.length < a.length, equal = b.length == a.length;
    return {nearer ? b.length : a.length, nearer ? b.column : a.column,
            nearer ? b.again : a.again | int(equal)};
  }

  // Looks at the columns j, j + 32, ...; kGuarded: those beyond the last one are left out.
  template <Ties kTies, bool kGuarded, typename scalar_t>
  static __device__ __forceinline__ void look(const scalar_t* cost, const AssignmentState& state,
                                              Front front, int j, int last, Own (&own)[kTogether]) {
    double over_row[kTogether], length[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int column = j + k * kLanes;
      const int inside = kGuarded ? min(column, last) : column;
      over_row[k] = path_length<kTies>(front, double(cost[inside]), state.column_dual[inside]);
      length[k] = state.length[column];
      if (kGuarded && column > last) over_row[k] = kInfinity;
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int column = j + k * kLanes;
      if (over_row[k] < length[k]) {
        length[k] = over_row[k];
        state.length[column] = over_row[k];
        state.path[column] = front.row;
      }
      own[k] = nearer_of(own[k], {length[k], column, 0});
    }
  }
};

}  // namespace detr_fast
