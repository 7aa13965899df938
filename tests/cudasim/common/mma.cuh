// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/mma.cuh: tensor cores and asynchronous copies on the CPU, with the
// fragments of the PTX ISA. Products are exact in float, sums are float in the order of k.
#pragma once

#include <cstring>

#include "common/cuda.h"

namespace cudasim {

template <typename element_t>
CUDASIM_UNCHECKED float element_of(uint32_t pair, int half) {
  const uint16_t bits = uint16_t(half ? pair >> 16 : pair);
  element_t element;
  std::memcpy(&element, &bits, sizeof bits);
  return float(element);
}

struct MmaInput {
  float d[4];
  uint32_t a[4], b[2];
};

struct MmaOutput {
  float d[4];
};

template <typename element_t>
CUDASIM_UNCHECKED void combine_mma(Lanes& lanes) {
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    const auto& in = input_of<MmaInput>(lanes, lane);
    const int group = int(lane) / 4, pair = int(lane) % 4 * 2;
    for (int i = 0; i < 8; ++i) {
      a[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] =
          element_of<element_t>(in.a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      b[pair + i % 2 + i / 2 * 8][group] = element_of<element_t>(in.b[i / 2], i % 2);
    }
  }
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    const int group = int(lane) / 4, pair = int(lane) % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i / 2 * 8, column = pair + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      output_of<MmaOutput>(lanes, lane).d[i] = input_of<MmaInput>(lanes, lane).d[i] + sum;
    }
  }
}

template <bool kTransposed>
CUDASIM_UNCHECKED void combine_load_matrices(Lanes& lanes) {
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t pair = 0;
      for (int half = 0; half < 2; ++half) {
        const int first = int(lane) / 4, second = int(lane) % 4 * 2 + half;
        const int row = kTransposed ? second : first, column = kTransposed ? first : second;
        uint16_t element;
        const auto* const from = input_of<const char*>(lanes, unsigned(matrix * 8 + row));
        std::memcpy(&element, from + column * 2, sizeof element);
        pair |= uint32_t(element) << (16 * half);
      }
      output_of<uint32_t[4]>(lanes, lane)[matrix] = pair;
    }
  }
}

}  // namespace cudasim

namespace detr_fast {

template <typename element_t>
CUDASIM_UNCHECKED void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    CUDASIM_CALLER) {
  ::cudasim::MmaInput in;
  ::cudasim::MmaOutput out;
  std::memcpy(in.d, d, sizeof d);
  std::memcpy(in.a, a, sizeof a);
  in.b[0] = b0;
  in.b[1] = b1;
  ::cudasim::warp_collective("mma", ~0u, &in, &out, ::cudasim::combine_mma<element_t>, false,
                             caller);
  std::memcpy(d, out.d, sizeof d);
}

template <bool kTransposed>
CUDASIM_UNCHECKED void simulated_load_matrices(uint32_t (&r)[4], const void* row,
                                               ::cudasim::Location caller) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    ::cudasim::fail("ldmatrix: row is not on 16 bytes", caller);
  const char* const in = static_cast<const char*>(row);
  uint32_t out[4];
  ::cudasim::warp_collective("ldmatrix", ~0u, &in, &out,
                             ::cudasim::combine_load_matrices<kTransposed>, false, caller);
  std::memcpy(r, out, sizeof r);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, CUDASIM_CALLER) {
  simulated_load_matrices<false>(r, row, caller);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, CUDASIM_CALLER) {
  simulated_load_matrices<true>(r, row, caller);
}

inline void copy_16_async(void* shared, const void* global, bool real) {
  float4 value = {};
  if (real) value = *static_cast<const float4*>(global);
  *static_cast<float4*>(shared) = value;
}
inline void commit_copies() {}
template <int kPending>
void wait_for_copies() {}

inline float exp2_fast(float x) { return std::exp2(x); }

inline uint32_t spread_signs(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = selector >> (4 * i) & 7;
    if (bytes >> (8 * byte + 7) & 1) mask |= 0xffu << (8 * i);
  }
  return mask;
}

template <typename T>
T* in_register(T* pointer) {
  return pointer;
}

template <typename element_t>
constexpr uint32_t kOnes = 0;
template <>
constexpr uint32_t kOnes<__half> = 0x3c003c00;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80;

template <typename element_t>
uint32_t pack(float first, float second) {
  const element_t both[2] = {element_t(first), element_t(second)};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof bits);
  return bits;
}

}  // namespace detr_fast
