// SPDX-License-Identifier: Apache-2.0
// How the elements of a tensor lie in memory.
#pragma once

#include <torch/csrc/stable/ops.h>

namespace detr_fast {

using torch::stable::Tensor;

// The tensor, copied only if it is not contiguous.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace detr_fast
