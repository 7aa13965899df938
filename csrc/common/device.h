// SPDX-License-Identifier: Apache-2.0
// The host side of a CUDA op: device guard, stream, pointers for the kernels, launch check.
// tests/cudasim has its own version, which tells the checker what each launch may touch.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace detr_fast {

using torch::stable::Tensor;

// Makes the device of a tensor current for as long as it lives.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    // getCurrentStream(i).id() is not a cudaStream_t; this shim is the way that torch 2.10 has.
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  // torch's current stream on the device, a cudaStream_t
  void* stream() const { return stream_; }

  // A tensor that the kernel only reads.
  template <typename T>
  const T* read(const Tensor& tensor) const {
    return tensor.const_data_ptr<T>();
  }

  // A tensor that the kernel fills completely.
  template <typename T>
  T* write(const Tensor& tensor) const {
    return tensor.mutable_data_ptr<T>();
  }

  // A tensor that the kernel writes, in part or not at all, and reads again.
  template <typename T>
  T* scratch(const Tensor& tensor) const {
    return tensor.mutable_data_ptr<T>();
  }

  void check_launch() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace detr_fast
