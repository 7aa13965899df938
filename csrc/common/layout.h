// SPDX-License-Identifier: Apache-2.0
// How the elements of a tensor lie in memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/element.h"

namespace detr_fast {

using torch::stable::Tensor;

// The tensor, copied only if it is not contiguous.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline LayerInput layer_input(const void* data, const Tensor& tensor) {
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

}  // namespace detr_fast
