// SPDX-License-Identifier: Apache-2.0
// CUDASIM_TEST_KERNEL(f): lets Python launch a kernel by its name; nothing under nvcc. A pointer to
// const takes an array that the kernel reads, another pointer one that it fills.
#pragma once

#if defined(__CUDACC__)
#define CUDASIM_TEST_KERNEL(kernel)
#else

#include <utility>

#include "cudasim.h"
#include "runtime/control.h"

#define CUDASIM_TEST_KERNEL(kernel) \
  static const bool registered_##kernel = ::cudasim::register_test_kernel(#kernel, &kernel);

namespace cudasim {

template <typename Parameter>
Parameter from_python(const Argument& argument) {
  if constexpr (std::is_pointer_v<Parameter>) {
    return static_cast<Parameter>(argument.data);
  } else if constexpr (std::is_floating_point_v<Parameter>) {
    return static_cast<Parameter>(argument.real);
  } else {
    return static_cast<Parameter>(argument.integer);
  }
}

template <typename... Parameters>
bool register_test_kernel(const char* name, void (*kernel)(Parameters...)) {
  TestKernel& entry = test_kernels()[{name, kCheckedBuild}];
  (entry.is_output.push_back(std::is_pointer_v<Parameters> &&
                             !std::is_const_v<std::remove_pointer_t<Parameters> >),
   ...);
  entry.launch = [=](dim3 grid, dim3 size, size_t shared_bytes,
                     const std::vector<Argument>& arguments) {
    [&]<size_t... I>(std::index_sequence<I...>) {
      launch(name, kernel, grid, size, shared_bytes, from_python<Parameters>(arguments[I])...);
    }(std::index_sequence_for<Parameters...>());
  };
  return true;
}

}  // namespace cudasim

#endif

// A kernel of selfcheck*.cu.
#define SELFCHECK(name)                              \
  __global__ void name(const int* values, int* out); \
  CUDASIM_TEST_KERNEL(name)                          \
  __global__ void name(const int* values, int* out)
