// SPDX-License-Identifier: Apache-2.0
// The one CUDA header of a kernel file. tests/cudasim has its own version, which runs the same
// kernels on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Launches `kernel`; put parentheses round a name with commas: (f_kernel<T, 128>).
#define DETR_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Declares `name`, a T* to the dynamic shared memory of the block.
#define DETR_FAST_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char detr_fast_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(detr_fast_dynamic_shared)
