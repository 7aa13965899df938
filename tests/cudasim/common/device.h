// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/device.h: tells the checker what a launch may read and must write.
#pragma once

#include <string>
#include <vector>

#include "common/checks.h"
#include "common/extent.h"
#include "runtime/checker.h"

namespace detr_fast {

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) { cudasim::untrack_all(); }

  void* stream() const { return nullptr; }

  template <typename T>
  const T* read(const Tensor& tensor) const {
    track(tensor, "input", false);
    return tensor.const_data_ptr<T>();
  }

  template <typename T>
  T* write(const Tensor& tensor) const {
    track(tensor, "output", true);
    outputs_.push_back(tensor);
    return tensor.mutable_data_ptr<T>();
  }

  template <typename T>
  T* scratch(const Tensor& tensor) const {
    track(tensor, "scratch", true);
    return tensor.mutable_data_ptr<T>();
  }

  void check_launch() const {
    for (const Tensor& output : outputs_) {
      const size_t bytes = cudasim::unwritten_bytes(output.const_data_ptr());
      STD_TORCH_CHECK(bytes == 0, bytes, " bytes of the output ", shape_string(output.sizes()),
                      " were never written");
    }
  }

 private:
  static void track(const Tensor& tensor, const char* role, bool output) {
    cudasim::track(tensor.const_data_ptr(), extent_bytes(tensor),
                   role + (" " + shape_string(tensor.sizes())), output, output);
  }

  mutable std::vector<Tensor> outputs_;
};

}  // namespace detr_fast
