// SPDX-License-Identifier: Apache-2.0
// The one CUDA header of a kernel file. tests/cudasim has its own version, which runs the same
// kernels on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// Launches `kernel`; put parentheses round a name with commas: (f_kernel<T, 128>).
#define DETR_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Lets `kernel`, which has no static shared memory, be launched with `bytes` of dynamic shared
// memory on the current device. Where that is more than the 48 KiB that every kernel has, it opts
// in to all there is: the setting is the kernel's, and less could be too little for another
// thread's launch. What goes wrong is reported by check_launch().
#define DETR_FAST_ALLOW_SHARED(kernel, bytes)                                         \
  ((bytes) <= (48 << 10) ? void()                                                     \
                         : static_cast<void>(cudaFuncSetAttribute(                    \
                               (kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, \
                               static_cast<int>(detr_fast::max_shared_bytes()))))

// Declares `name`, a T* to the dynamic shared memory of the block.
#define DETR_FAST_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char detr_fast_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(detr_fast_dynamic_shared)

namespace detr_fast {

// The most shared memory, static and dynamic, that a block may have on the current device.
inline size_t max_shared_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(bytes);
}

}  // namespace detr_fast
