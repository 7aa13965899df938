// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/common/device.h: tells the interpreter what a launch may read and write.
#pragma once

#include <string>

#include "common/checks.h"
#include "common/extent.h"

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

  template <typename T>
  T* scratch(const Tensor& tensor) const {
    track(tensor, "scratch", true);
    return tensor.mutable_data_ptr<T>();
  }

  void check_launch() const {}

 private:
  static void track(const Tensor& tensor, const char* role, bool writable) {
    const std::string name = role + (" " + shape_string(tensor.sizes()));
    ptx::track(tensor.const_data_ptr(), extent_bytes(tensor), name.c_str(), writable);
  }
};

}  // namespace detr_fast
