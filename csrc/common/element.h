// SPDX-License-Identifier: Apache-2.0
// Elements of float, double, half or bfloat16 in any strides, and the type that they are computed
// in. No torch: kernels use it, too.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/host_device.h"

namespace detr_fast {

enum class ElementType { kFloat, kDouble, kHalf, kBFloat16 };

// A tensor (images, queries, columns) of some element type, in any strides.
struct LayerInput {
  const void* data;
  int64_t image_step, query_step, column_step;
};

// Layers that one launch takes: as many as the 4 KiB of a kernel's parameters hold.
constexpr int kMostLayers = 32;

// float for half and bfloat16, else the type itself
template <typename source_t>
using arithmetic_t = std::conditional_t<std::is_same_v<source_t, double>, double, float>;

// An element of any of the four types as float or double.
template <typename scalar_t, typename source_t>
DETR_FAST_HOST_DEVICE scalar_t as(source_t value) {
  return static_cast<scalar_t>(static_cast<arithmetic_t<source_t>>(value));
}

}  // namespace detr_fast
