// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/cuda.h: a launch goes to the interpreter of nvcc's PTX. The simulator's
// header lets g++ read the kernels; what it makes of them is not run.
#pragma once

#include <tuple>
#include <typeinfo>
#include <utility>

#include "../../common/cuda.h"

namespace ptx {

// Runs the kernel whose mangled name stands in `tag`; throws what the interpreter reports.
void launch(const char* tag, dim3 grid, dim3 block, size_t shared_bytes, int count,
            const void* const* arguments, const size_t* sizes);

template <auto kernel>
struct Tag {};

template <typename Kernel>
struct Launcher;

template <typename... Parameters>
struct Launcher<void (*)(Parameters...)> {
  template <typename... Arguments>
  static void run(const char* tag, dim3 grid, dim3 block, size_t shared_bytes,
                  Arguments... arguments) {
    const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
    std::apply(
        [&](const auto&... value) {
          const void* data[] = {&value...};
          const size_t sizes[] = {sizeof value...};
          launch(tag, grid, block, shared_bytes, sizeof...(value), data, sizes);
        },
        values);
  }
};

}  // namespace ptx

#undef DETR_FAST_LAUNCH
#define DETR_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                   \
  ((void)(stream),                                                                         \
   ::ptx::Launcher<decltype(&(kernel))>::run(typeid(::ptx::Tag<&(kernel)>).name(), (grid), \
                                             (block), (shared_bytes), __VA_ARGS__))
