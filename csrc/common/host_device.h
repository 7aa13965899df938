// SPDX-License-Identifier: Apache-2.0
// Marks a function that the CPU twin, the CUDA kernel and the simulator share.
// On the host it must be inlined to take on the instruction set of its caller (see multiversion.h).
#pragma once

#if defined(__CUDACC__)
#define DETR_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DETR_FAST_HOST_DEVICE inline __attribute__((always_inline))
#endif
