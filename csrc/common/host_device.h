// SPDX-License-Identifier: Apache-2.0
// Marks a function that the CPU twin, the CUDA kernel and the simulator share, and the arithmetic
// that compilers for the two sides have to be told in different words.
// On the host it must be inlined to take on the instruction set of its caller (see multiversion.h).
#pragma once

#if defined(__CUDACC__)
#define DETR_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DETR_FAST_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace detr_fast {

constexpr double kInfinity = __builtin_huge_val();

// The smaller and the larger of two numbers; of a NaN and a number either may come out. Compares
// are what GCC makes vector minima of, fmin is one instruction on a GPU.
template <typename T>
DETR_FAST_HOST_DEVICE T smaller(T a, T b) {
#if defined(__CUDA_ARCH__)
  return fmin(a, b);
#else
  return a < b ? a : b;
#endif
}

template <typename T>
DETR_FAST_HOST_DEVICE T larger(T a, T b) {
#if defined(__CUDA_ARCH__)
  return fmax(a, b);
#else
  return a > b ? a : b;
#endif
}

// A product that is rounded before anything is added to it: nvcc would make a * b + c one fma, and
// the GPU's elements would differ from those of the CPU twin and of the eager formula.
template <typename T>
DETR_FAST_HOST_DEVICE T product(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) return __fmul_rn(a, b);
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace detr_fast
