// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/device.h: tells the checker what a launch may read and must write.
#pragma once

#include <string>
#include <vector>

#include "common/checks.h"

extern "C" {
void cudasim_track(const void* data, size_t bytes, const char* name, int writable, int unwritten);
void cudasim_untrack_all();
long long cudasim_unwritten(const void* data);
}

namespace detr_fast {

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) { cudasim_untrack_all(); }

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

  void check_launch() const {
    for (const Tensor& output : outputs_) {
      const long long bytes = cudasim_unwritten(output.const_data_ptr());
      STD_TORCH_CHECK(bytes <= 0, bytes, " bytes of the output ", shape_string(output.sizes()),
                      " were never written");
    }
  }

 private:
  static void track(const Tensor& tensor, const char* role, bool writable) {
    const std::string name = role + (" " + shape_string(tensor.sizes()));
    cudasim_track(tensor.const_data_ptr(), tensor.numel() * tensor.element_size(), name.c_str(),
                  writable, writable);
  }

  mutable std::vector<Tensor> outputs_;
};

}  // namespace detr_fast
