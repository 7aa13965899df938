// SPDX-License-Identifier: Apache-2.0
// The host side of tensors of any of the four types.
#pragma once

#include "common/device.h"
#include "common/dispatch.h"
#include "common/layout.h"

namespace detr_fast {

inline const void* read_elements(const DeviceScope& device, const Tensor& tensor) {
  const void* data = nullptr;
  dispatch_floating_or_half(tensor.scalar_type(),
                            [&](auto zero) { data = device.read<decltype(zero)>(tensor); });
  return data;
}

inline void* write_elements(const DeviceScope& device, const Tensor& tensor) {
  void* data = nullptr;
  dispatch_floating_or_half(tensor.scalar_type(),
                            [&](auto zero) { data = device.write<decltype(zero)>(tensor); });
  return data;
}

inline LayerInput read_layer(const DeviceScope& device, const Tensor& tensor) {
  return layer_input(read_elements(device, tensor), tensor);
}

}  // namespace detr_fast
