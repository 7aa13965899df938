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
    double own = kInfinity;
    int column = kFree;
    bool again = false;  // whether a second column of this lane has the length `own`
    for (int j = lane(); j < state.columns; j += kLanes) {
      const double over_row = path_length<kTies>(front, double(cost[j]), state.column_dual[j]);
      double length = front.first ? kInfinity : state.length[j];
      const bool shorter = over_row < length;
      if (shorter) {
        length = over_row;
        state.path[j] = front.row;
      }
      if (shorter || front.first) state.length[j] = length;
      again = length == own || (again && !(length < own));
      if (length < own) {
        own = length;
        column = j;
      }
    }
    const double nearest = least(own);
    unsigned rank = kNoRank;
    if (own == nearest && column != kFree) {
      rank = rank_of<kTies>(state, column);
      for (int j = column + kLanes; again && j < state.columns; j += kLanes) {
        if (state.length[j] == nearest) rank = min(rank, rank_of<kTies>(state, j));
      }
    }
    return {nearest, least(rank)};
  }
};

}  // namespace detr_fast
