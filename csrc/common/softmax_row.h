// SPDX-License-Identifier: Apache-2.0
// The parts of a softmax over a row on the CPU, as vector code: in a function that is marked
// DETR_FAST_MULTIVERSION. A row is filled up to a multiple of kLanes with minus infinity. Sums do
// not depend on where a row stands, nor on the instruction set.
#pragma once

#include "common/elementary.h"
#include "common/host_device.h"

namespace detr_fast {

// Numbers that one step of a vector loop handles.
constexpr int kLanes = 16;

constexpr int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// The largest number of a row; a NaN may be passed over.
template <typename scalar_t>
DETR_FAST_HOST_DEVICE scalar_t largest_of_row(const scalar_t* row, int filled) {
  scalar_t lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = -scalar_t(kInfinity);
  for (int c = 0; c < filled; c += kLanes) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) lanes[k] = larger(row[c + k], lanes[k]);
  }
  scalar_t most = lanes[0];
  for (int k = 1; k < kLanes; ++k) most = larger(lanes[k], most);
  return most;
}

// Makes a row its exponentials less `most`, and returns their sum: a NaN is in it.
template <typename scalar_t>
DETR_FAST_HOST_DEVICE scalar_t exponentials_of_row(scalar_t* row, int filled, scalar_t most) {
  scalar_t lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = 0;
  for (int c = 0; c < filled; c += kLanes) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) {
      row[c + k] = exponential(row[c + k] - most);
      lanes[k] += row[c + k];
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

}  // namespace detr_fast
