// SPDX-License-Identifier: Apache-2.0
// Tiles of rows in shared memory and fragments in registers: what the kernels of both directions
// share. A warp takes rows in sixteens; a lane holds rows lane / 4 and lane / 4 + 8 of each.
#pragma once

#include "attention/rows.h"
#include "common/mma.cuh"
#include "common/warp.cuh"

namespace detr_fast {

constexpr float kLog2E = 1.44269504f;
constexpr float kScaleLog2E = kScale * kLog2E;  // 2^(this * product) = exp(score)
constexpr int kTileRow = 2 * kHeadDim;          // bytes
constexpr int kChunk = 16;                      // bytes of a copy and of a row of a matrix
constexpr int kChunks = kTileRow / kChunk;      // of a row
constexpr int kSlices = kHeadDim / 16;          // products that a row's dot product takes
constexpr int kColumnTiles = kHeadDim / 8;      // fragments b and d that the columns of a row take
static_assert(kChunks == 4 && kSlices == 2);    // what the swizzle and the loads below count on

using Stage = unsigned char;  // shared memory, on a 128-byte boundary

// Where a chunk of a row lies in a tile: the eight rows of a matrix lie in different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kTileRow + ((chunk ^ (row / 2 % kChunks)) * kChunk);
}

// What a walk through real rows needs to know at each step. It is the same for all threads of a
// block and stands in shared memory, as the main loops have no registers left.
struct RowSteps {
  int width, padding;      // of a row of the rectangle, and what follows it
  int columns, positions;  // a step is so many columns further in the rectangle, or less a row
  int end;                 // of the positions of real rows

  __device__ __forceinline__ void set(const Rows& rows, int step) {
    width = rows.width;
    padding = rows.padded_width - rows.width;
    columns = step % rows.width;
    positions = rows.position(step);
    end = rows.end();
  }
};

// Walks through real rows; divides once.
class RowWalk {
 public:
  __device__ __forceinline__ RowWalk(const Rows& rows, int first)
      : position_(rows.position(first)), column_(first % rows.width) {}

  // In the padded sequence; at the end or beyond it there are no more rows.
  __device__ __forceinline__ int position() const { return position_; }

  __device__ __forceinline__ void next(const RowSteps& by) {
    position_ += by.positions;
    column_ += by.columns;
    if (column_ >= by.width) {
      column_ -= by.width;
      position_ += by.padding;
    }
  }

 private:
  int position_, column_;
};

// A head of an image of two sequences of the same rows, which go to shared memory tile by tile:
// into two stages by turns, each a tile of the first sequence and one of the second.
template <int kRows, int kThreads>
class TilePair {
 public:
  static constexpr int kTile = kRows * kTileRow;  // bytes
  static constexpr int kStage = 2 * kTile;
  static_assert((kStage & (kStage - 1)) == 0);  // offsets change stages by ^
  // rows of a pass are eight or a multiple apart, so that each has the same swizzle
  static constexpr int kPassRows = kThreads / kChunks;
  static_assert(kPassRows % 8 == 0 && kRows % kPassRows == 0);

  // Begins at row `first`; `thread` counts the kThreads threads that copy: a warp eight rows, a
  // lane what lies at its columns_slot.
  __device__ __forceinline__ TilePair(const Rows& rows, int first, const HeadsInput& a,
                                      const HeadsInput& b, int image, int head, int thread)
      : walk_(rows, first + thread / kWarpSize * 8 + thread % 8),
        a_(in_register(chunk_of(a, image, head, thread))),
        b_(in_register(chunk_of(b, image, head, thread))),
        a_step_(2 * a.row_step),
        b_step_(2 * b.row_step) {}

  // Starts to copy the next kRows rows, zeros behind the last; commits nothing. `to` is the stage's
  // columns_slot, `shared` is set to steps of kPassRows rows.
  __device__ __forceinline__ void copy(Stage* to, const RowSteps& shared) {
    const RowSteps steps = shared;
    if (kThreads > kWarpSize) to += in_register(threadIdx.x) % kThreads / kWarpSize * 8 * kTileRow;
#pragma unroll
    for (int pass = 0; pass < kRows / kPassRows; ++pass) {
      const int position = walk_.position();
      const bool real = position < steps.end;
      copy_16_async(to, a_ + wide_product(position, a_step_), real);
      copy_16_async(to + kTile, b_ + wide_product(position, b_step_), real);
      walk_.next(steps);
      to += kPassRows * kTileRow;
    }
  }

 private:
  static __device__ __forceinline__ const char* chunk_of(const HeadsInput& input, int image,
                                                         int head, int thread) {
    return static_cast<const char*>(input.data) + 2 * offset(input, image, head, 0) +
           thread % kWarpSize / 8 * kChunk;
  }

  RowWalk walk_;
  const char *a_, *b_;
  int a_step_, b_step_;  // bytes
};

// Sixteen rows from global memory as fragments a of kSlices products, zeros where not real.
__device__ __forceinline__ void read_rows(uint32_t (&a)[kSlices][4], const HeadsInput& input,
                                          int image, int head, const Rows& rows, int first,
                                          int lane) {
  const auto* const data = static_cast<const char*>(input.data);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int number = first + lane / 4 + 8 * half;
    const bool real = number < rows.count;
    const int64_t at = real ? offset(input, image, head, rows.position(number)) : 0;
    const auto* const row = reinterpret_cast<const uint32_t*>(data + at * 2) + lane % 4;
#pragma unroll
    for (int i = 0; i < 2 * kSlices; ++i) {
      a[i / 2][half + 2 * (i % 2)] = real ? row[4 * i] : 0;
    }
  }
}

// Writes a lane's part of a row, d[..][2 * half] and its neighbour of the columns' fragments.
template <typename element_t>
__device__ __forceinline__ void write_row(element_t* row, const float (&d)[kColumnTiles][4],
                                          int half, float factor, int lane) {
  auto* const pairs = reinterpret_cast<uint32_t*>(row) + lane % 4;
#pragma unroll
  for (int i = 0; i < kColumnTiles; ++i) {
    pairs[4 * i] = pack<element_t>(d[i][2 * half] * factor, d[i][2 * half + 1] * factor);
  }
}

// Where a lane's row of load_matrices begins in a tile whose rows are the columns of a fragment b:
// eight rows, all slices. Add 8 * kTileRow for the next eight.
__device__ __forceinline__ int columns_slot(int lane) { return swizzled(lane % 8, lane / 8); }

// The same of load_matrices_transposed in a tile whose rows are the rows of b: sixteen rows,
// columns 0 to 15. Add 16 * kTileRow for the next sixteen rows; ^ kSliceStep for columns 16 to 31.
__device__ __forceinline__ int rows_slot(int lane) { return swizzled(lane % 16, lane / 16); }
constexpr int kSliceStep = 2 * kChunk;

// d (16 x 8) = a (16 rows) times the eight rows of a tile, transposed: dot products, plus c.
template <typename element_t>
__device__ __forceinline__ void dot_products(float (&d)[4], const uint32_t (&a)[kSlices][4],
                                             const uint32_t (&b)[4], const float (&c)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  multiply_add<element_t>(d, a[0], b[0], b[1]);
  multiply_add<element_t>(d, a[1], b[2], b[3]);
}

template <typename element_t>
__device__ __forceinline__ void dot_products(float (&d)[4], const uint32_t (&a)[kSlices][4],
                                             const uint32_t (&b)[4]) {
  dot_products<element_t>(d, a, b, {0, 0, 0, 0});
}

// d (16 x 32) += a (16 x 16) times sixteen rows of a tile; b[slice] is of load_matrices_transposed.
template <typename element_t>
__device__ __forceinline__ void add_rows(float (&d)[kColumnTiles][4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4], int slice) {
  multiply_add<element_t>(d[2 * slice], a, b[0], b[1]);
  multiply_add<element_t>(d[2 * slice + 1], a, b[2], b[3]);
}

// Calls body(position, chunk) for every chunk of the rows [first, first + kRows) of the padded
// sequence that are not real.
template <int kRows, int kThreads, typename Body>
__device__ __forceinline__ void each_padded_chunk(const Rows& rows, int length, int first,
                                                  int thread, const Body& body) {
  for (int i = thread; i < kRows * kChunks; i += kThreads) {
    const int position = first + i / kChunks;
    if (position < length && !rows.real(position)) body(position, i % kChunks);
  }
}

template <typename element_t>
__device__ __forceinline__ void clear_chunk(element_t* row, int chunk) {
  reinterpret_cast<uint4*>(row)[chunk] = uint4{0, 0, 0, 0};
}

}  // namespace detr_fast
