// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/device.h: tells the interpreter what a launch may read and write.
#pragma once

#include <string>

#include "common/checks.h"

namespace ptx {

void track(const void* data, size_t bytes, const char* name, bool writable);
void untrack_all();

}  // namespace ptx

namespace detr_fast {

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) { ptx::untrack_all(); }

  void* stream() const { return nullptr; }

  template <typename T>
  const T* read(const Tensor& tensor) const {
    track(tensor, "input", false);
    return tensor.const_data_ptr<T>();
  }

  template <typename T>
  T* write(const Tensor& tensor) const {
    track(tensor, "output", true);
    return tensor.mutable_data_ptr<T>();
  }

  void check_launch() const {}

 private:
  static void track(const Tensor& tensor, const char* role, bool writable) {
    const std::string name = role + (" " + shape_string(tensor.sizes()));
    int64_t elements = 1;  // an expanded dimension has a stride of 0
    for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
    const size_t bytes = tensor.numel() == 0 ? 0 : elements * tensor.element_size();
    ptx::track(tensor.const_data_ptr(), bytes, name.c_str(), writable);
  }
};

}  // namespace detr_fast
