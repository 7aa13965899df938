// SPDX-License-Identifier: Apache-2.0
// CUDA C++ for g++: keywords, built-in variables and launches, one fiber per CUDA thread. The
// functions that CUDA has beside C++ are in warp_functions.h and scalar_functions.h.
#pragma once

#if defined(__CUDACC__)
#error "cudasim.h stands in for CUDA under g++; nvcc takes csrc/common/cuda.h"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <tuple>
#include <type_traits>

#include "runtime/scheduler.h"

// CUDA's host headers make these unknown attributes, which would turn a shared array into a
// private one without an error; hence they are defined anew, after those headers.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
// static: one copy per block, as blocks run one by one. thread_local: the linker gathers all shared
// arrays, those of templates included, in one segment that the runtime finds, poisons and shadows.
#define __shared__ static thread_local
#define __constant__ static const
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

// Dynamic initialisers cannot run per block, hence macros instead of variables.
#define threadIdx (::cudasim::current_thread->index)
#define blockIdx (::cudasim::current_block.index)
#define blockDim (::cudasim::current_block.size)
#define gridDim (::cudasim::current_block.grid)
constexpr int warpSize = 32;

// Code of the simulator itself in a kernel's translation unit: its accesses are not the kernel's.
#define CUDASIM_UNCHECKED __attribute__((no_sanitize("thread")))

namespace cudasim {

#if defined(__SANITIZE_THREAD__)
constexpr bool kCheckedBuild = true;
#else
constexpr bool kCheckedBuild = false;
#endif

// kernel<<<grid, size, shared_bytes>>>(arguments...); returns when all blocks are done.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 size,
            size_t shared_bytes, Arguments&&... arguments) {
  using Values = std::tuple<std::decay_t<Parameters>...>;
  struct Call {
    void (*kernel)(Parameters...);
    Values values;
  } call{kernel, Values(static_cast<std::decay_t<Parameters>>(arguments)...)};
  Launch description;
  description.name = name;
  description.kernel = reinterpret_cast<const void*>(kernel);
  description.grid = grid;
  description.size = size;
  description.shared_bytes = shared_bytes;
  description.checked = kCheckedBuild;
  description.call = &call;
  description.call_bytes = sizeof call;
  description.run_thread = [](void* data) CUDASIM_UNCHECKED {
    Call* const thread_call = static_cast<Call*>(data);
    std::apply(thread_call->kernel, thread_call->values);
  };
  run_grid(description);
}

}  // namespace cudasim

#include "scalar_functions.h"
#include "warp_functions.h"
