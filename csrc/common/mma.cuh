// SPDX-License-Identifier: Apache-2.0
// Tensor cores, asynchronous copies and what else kernels have to write in PTX (compute capability
// 8.0 and later). tests/cudasim has its own version, which the simulator runs on the CPU.
//
// Fragments of a warp (PTX ISA, "Matrix Fragments for mma.m16n8k16"), with group = lane / 4 and
// pair = 2 * (lane % 4):
//   a[i], two elements: row group + 8 * (i % 2), columns pair and pair + 1, + 8 * (i / 2)
//   b0, b1, two elements each: rows pair and pair + 1 (+ 8 for b1), column group
//   d[i]: row group + 8 * (i / 2), column pair + i % 2
// Two neighbouring d of 16 x 8, packed, are thus an a of 16 x 16.
#pragma once

#include "common/cuda.h"

namespace detr_fast {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// d (16 x 8, float) += a (16 x 16) * b (16 x 8); element_t is __half or __nv_bfloat16.
template <typename element_t>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 x 8 elements of 16 bits from shared memory. `row` of lane 8 * i + j is row j
// of matrix i, 16 bytes on a 16-byte boundary. r[i] of a lane: row lane / 4 of matrix i, columns
// 2 * (lane % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: rows 2 * (lane % 4) and the next, column lane / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts a copy of 16 bytes from global to shared memory, both on 16-byte boundaries; zeros, and
// nothing read, if not `real`. It is done when the group that it is committed to is waited for.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(real ? 16 : 0)
               : "memory");
}

// Makes a group of the copies that this thread has started since the last one.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's groups but the last kPending; others see them after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 2^x within 2 ulp; denormal numbers are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four bytes, each all ones or zeros as the sign of one of the eight bytes of `low` and `high`:
// nibble i of `selector` is 8 + the number of the byte that byte i of the result follows.
__device__ __forceinline__ uint32_t spread_signs(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(mask) : "r"(low), "r"(high), "r"(selector));
  return mask;
}

// The pointer or number, of which the compiler no longer knows where it comes from: it keeps it in
// a register and does not compute it anew in a loop.
template <typename T>
__device__ __forceinline__ T* in_register(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}
__device__ __forceinline__ float in_register(float number) {
  asm volatile("" : "+f"(number));
  return number;
}
__device__ __forceinline__ uint32_t in_register(uint32_t number) {
  asm volatile("" : "+r"(number));
  return number;
}

// a * b, without the 64-bit product that the compiler makes of it once b is extended ahead of a
// loop
__device__ __forceinline__ int64_t wide_product(int a, int b) {
  int64_t product;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// Two elements that are 1.
template <typename element_t>
constexpr uint32_t kOnes = 0;
template <>
constexpr uint32_t kOnes<__half> = 0x3c003c00;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80;

// Two floats as elements, rounded to the nearest, the first one in the lower half.
template <typename element_t>
__device__ __forceinline__ uint32_t pack(float first, float second);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}

}  // namespace detr_fast
