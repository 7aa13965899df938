// SPDX-License-Identifier: Apache-2.0
// The one CUDA header of a kernel file. tests/cudasim has its own version, which runs the same
// kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Launches `kernel`; put parentheses round a name with commas: (f_kernel<T, 128>).
#define DETR_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
