// SPDX-License-Identifier: Apache-2.0
#include "runtime/matrices.h"

#include <cstring>

#include "runtime/checker.h"

namespace cudasim {
namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 16;  // of a product
constexpr int kSide = 8;                              // of a matrix that is loaded
constexpr size_t kRowBytes = 16;

struct Factors {
  float d[4];
  uint32_t a[4], b[2];
};

// Bits of an element, in the lower half, as a float; branches would keep GCC from vectorising.
template <MatrixElement kElement>
float to_float(uint32_t bits) {
  uint32_t word;
  if constexpr (kElement == MatrixElement::kBFloat16) {
    word = bits << 16;
  } else {
    word = (bits & 0x7fff) << 13;
    float scaled;
    std::memcpy(&scaled, &word, sizeof scaled);
    scaled *= 0x1p112f;  // the bias of the exponent is 127 instead of 15
    std::memcpy(&word, &scaled, sizeof word);
    const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // infinity, NaN
    word |= special | (bits & 0x8000) << 16;
  }
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void require_whole_warp(const Lanes& lanes) {
  if (lanes.mask == ~0u) return;
  fail(std::string(lanes.function) + " without all lanes of its warp", lanes.location);
}

template <MatrixElement kElement>
void combine_products(Lanes& lanes) {
  require_whole_warp(lanes);
  uint32_t a_bits[kRows][kDepth], b_bits[kDepth][kColumns];
  float a[kRows][kDepth], b[kDepth][kColumns], d[kRows][kColumns], sums[kRows][kColumns] = {};
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    const Factors& in = *static_cast<const Factors*>(lanes.in[lane]);
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (unsigned i = 0; i < 8; ++i) {
      const unsigned row = group + i / 2 % 2 * 8, k = pair + i % 2 + i / 4 * 8;
      a_bits[row][k] = in.a[i / 2] >> (i % 2 * 16) & 0xffff;
    }
    for (unsigned i = 0; i < 4; ++i) {
      b_bits[pair + i % 2 + i / 2 * 8][group] = in.b[i / 2] >> (i % 2 * 16) & 0xffff;
      d[group + i / 2 * 8][pair + i % 2] = in.d[i];
    }
  }
  for (int i = 0; i < kRows * kDepth; ++i) a[0][i] = to_float<kElement>(a_bits[0][i]);
  for (int i = 0; i < kDepth * kColumns; ++i) b[0][i] = to_float<kElement>(b_bits[0][i]);
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < kColumns; ++column) {
        sums[row][column] += a[row][k] * b[k][column];
      }
    }
  }
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    float* const out = static_cast<float*>(lanes.out[lane]);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      out[i] = d[row][column] + sums[row][column];
    }
  }
}

template <bool kTransposed>
void combine_loads(Lanes& lanes) {
  require_whole_warp(lanes);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[kSide][kSide];
    for (int row = 0; row < kSide; ++row) {
      std::memcpy(elements[row], lanes.in[matrix * kSide + row], kRowBytes);
    }
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      const unsigned first = lane / 4, second = lane % 4 * 2;
      const uint32_t low = kTransposed ? elements[second][first] : elements[first][second];
      const uint32_t high = kTransposed ? elements[second + 1][first] : elements[first][second + 1];
      static_cast<uint32_t*>(lanes.out[lane])[matrix] = low | high << 16;
    }
  }
}

}  // namespace

void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  MatrixElement element, Location location) {
  Factors in;
  std::memcpy(in.d, d, sizeof d);
  std::memcpy(in.a, a, sizeof a);
  in.b[0] = b0;
  in.b[1] = b1;
  const Combine combine = element == MatrixElement::kHalf
                              ? combine_products<MatrixElement::kHalf>
                              : combine_products<MatrixElement::kBFloat16>;
  warp_collective("multiply_add", ~0u, &in, d, combine, false, location);
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Location location,
                   void* pc) {
  if (reinterpret_cast<uintptr_t>(row) % kRowBytes) {
    fail("load_matrices of a row that is not on a 16-byte boundary", location);
  }
  shared_access(row, kRowBytes, false, pc);
  const Combine combine = transposed ? combine_loads<true> : combine_loads<false>;
  warp_collective("load_matrices", ~0u, row, r, combine, false, location);
}

}  // namespace cudasim
