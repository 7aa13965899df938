// SPDX-License-Identifier: Apache-2.0
// Warp-wide building blocks. Every lane of the warp has to take part.
#pragma once

#include "common/cuda.h"

namespace detr_fast {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over the lanes, in every lane; always added in the same order.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

}  // namespace detr_fast
