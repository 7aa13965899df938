// SPDX-License-Identifier: Apache-2.0
// What Python sees of the runtime beside the ops: faults, and kernels of tests by name.
#pragma once

#include <functional>
#include <map>

#include "runtime/scheduler.h"

namespace cudasim {

// Keeps the faults of the last launch for Python.
void record_faults(const std::vector<std::string>& faults);

// An argument from Python: an array (data and bytes) or a number (in both forms).
struct Argument {
  void* data;
  size_t bytes;
  long long integer;
  double real;
};

struct TestKernel {
  std::vector<bool> is_output;  // of every parameter
  std::function<void(dim3 grid, dim3 size, size_t shared_bytes, const std::vector<Argument>&)>
      launch;
};

// By name, and whether it was compiled with the checker.
CUDASIM_EXPORT std::map<std::pair<std::string, bool>, TestKernel>& test_kernels();

}  // namespace cudasim
