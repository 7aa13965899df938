// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/mma.cuh: tensor cores and asynchronous copies of the simulator.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "common/cuda.h"
#include "runtime/copies.h"
#include "runtime/matrices.h"

// Calls, never inlined: their return address is the line of the kernel.
#define CUDASIM_CALL inline CUDASIM_UNCHECKED __attribute__((noinline))

namespace detr_fast {

template <typename element_t>
CUDASIM_UNCHECKED void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    CUDASIM_CALLER) {
  using ::cudasim::MatrixElement;
  constexpr MatrixElement kElement =
      std::is_same_v<element_t, __half> ? MatrixElement::kHalf : MatrixElement::kBFloat16;
  ::cudasim::multiply_add(d, a, b0, b1, kElement, caller);
}

CUDASIM_CALL void load_matrices(uint32_t (&r)[4], const void* row, CUDASIM_CALLER) {
  ::cudasim::load_matrices(r, row, false, caller, __builtin_return_address(0));
}

CUDASIM_CALL void load_matrices_transposed(uint32_t (&r)[4], const void* row, CUDASIM_CALLER) {
  ::cudasim::load_matrices(r, row, true, caller, __builtin_return_address(0));
}

CUDASIM_CALL void copy_16_async(void* shared, const void* global, bool real) {
  ::cudasim::start_copy(shared, global, 16, real, __builtin_return_address(0));
}

inline void commit_copies() { ::cudasim::commit_copies(); }

template <int kPending>
void wait_for_copies() {
  ::cudasim::wait_for_copies(kPending);
}

CUDASIM_UNCHECKED inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0 : y;
}

// prmt: a nibble selects one of eight bytes or, with its highest bit, the sign of one.
CUDASIM_UNCHECKED inline uint32_t spread_signs(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    const uint32_t byte = uint32_t(bytes >> (8 * (nibble & 7))) & 0xff;
    mask |= (nibble < 8 ? byte : byte >> 7 ? 0xffu : 0u) << (8 * i);
  }
  return mask;
}

template <typename T>
T in_register(T value) {
  return value;
}

inline int64_t wide_product(int a, int b) { return int64_t(a) * b; }

template <typename element_t>
constexpr uint32_t kOnes = 0;
template <>
constexpr uint32_t kOnes<__half> = 0x3c003c00;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80;

template <typename element_t>
CUDASIM_UNCHECKED uint32_t pack(float first, float second) {
  const element_t both[2] = {element_t(first), element_t(second)};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof bits);
  return bits;
}

}  // namespace detr_fast

#undef CUDASIM_CALL
