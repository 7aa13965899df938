// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/cuda.h: kernels run on the CPU, one fiber per CUDA thread.
#pragma once

#include <cstdint>

#include "cudasim.h"

#define DETR_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream),                                                       \
   ::cudasim::launch(#kernel, &(kernel), (grid), (block), (shared_bytes), __VA_ARGS__))

#define DETR_FAST_ALLOW_SHARED(kernel, bytes) \
  ::cudasim::allow_shared(reinterpret_cast<const void*>(&(kernel)), (bytes))

#define DETR_FAST_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(::cudasim::dynamic_shared_memory())

namespace detr_fast {

inline size_t max_shared_bytes() { return ::cudasim::max_shared_bytes(); }

}  // namespace detr_fast
