// SPDX-License-Identifier: Apache-2.0
// A row of logits in the registers of the lanes that share it, some columns at a time. Eight lanes
// take a row: a warp has four of them under way, all their loads are independent, and to add up
// takes three exchanges. Up to 96 columns, which is what most detectors have, are one turn.
#pragma once

#include "common/element.cuh"

namespace detr_fast {

constexpr int kRowLanes = 8;
constexpr int kHeld = 12;  // columns that a lane holds in a turn
constexpr int kTurnColumns = kHeld * kRowLanes;

// Four neighbours of a row, as one access of at most 16 bytes.
template <typename element_t>
struct alignas(sizeof(element_t) < 4 ? 4 * sizeof(element_t) : 16) Four {
  element_t elements[4];
};

// The columns of a lane in one turn: groups of four neighbours where rows allow it, else every
// eighth column. Either way neighbouring lanes read neighbouring bytes, and `i` goes upwards.
struct Turn {
  int first;  // column
  int held;   // columns, at most kHeld
  bool by_four;

  __device__ __forceinline__ int column(int i) const {
    return first + (by_four ? i / 4 * (4 * kRowLanes) + i % 4 : i * kRowLanes);
  }

  // Which of its columns is `wanted`; -1 if none is.
  __device__ __forceinline__ int index_of(int wanted) const {
    const int distance = wanted - first, width = by_four ? 4 : 1;
    const int group = distance / (width * kRowLanes), within = distance % (width * kRowLanes);
    const int i = group * width + within;
    return distance >= 0 && within < width && i < held ? i : -1;
  }
};

// `lane` of a row of `columns`, which may be none, in the turn that begins with column `begin`.
__device__ __forceinline__ Turn turn_of(int lane, int begin, int columns, bool by_four) {
  const int width = by_four ? 4 : 1, step = width * kRowLanes;
  const int first = begin + lane * width;
  const int held = (columns - first + step - width) / step * width;
  return {first, max(0, min(held, kHeld)), by_four};
}

// Columns beyond the end of the row become minus infinity.
template <typename source_t, typename scalar_t>
__device__ __forceinline__ void load_turn(const source_t* row, long long step, Turn turn,
                                          scalar_t (&values)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) values[i] = -scalar_t(kInfinity);
  if (turn.by_four) {
#pragma unroll
    for (int i = 0; i < kHeld; i += 4) {
      if (i >= turn.held) continue;
      const auto four = *reinterpret_cast<const Four<source_t>*>(row + turn.column(i));
#pragma unroll
      for (int k = 0; k < 4; ++k) values[i + k] = number(four.elements[k]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i < turn.held) values[i] = number(row[turn.column(i) * step]);
    }
  }
}

// To a contiguous row.
template <typename source_t, typename scalar_t>
__device__ __forceinline__ void store_turn(source_t* row, Turn turn,
                                           const scalar_t (&values)[kHeld]) {
  if (turn.by_four) {
#pragma unroll
    for (int i = 0; i < kHeld; i += 4) {
      if (i >= turn.held) continue;
      Four<source_t> four;
#pragma unroll
      for (int k = 0; k < 4; ++k) put(four.elements[k], values[i + k]);
      *reinterpret_cast<Four<source_t>*>(row + turn.column(i)) = four;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i < turn.held) put(row[turn.column(i)], values[i]);
    }
  }
}

}  // namespace detr_fast
