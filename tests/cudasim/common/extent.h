// SPDX-License-Identifier: Apache-2.0
// Which bytes a kernel may touch of a tensor.
#pragma once

#include "common/checks.h"

namespace detr_fast {

// From the first element of a tensor to the end of its last: a stride may be 0 or leave gaps.
inline size_t extent_bytes(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t elements = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
  return size_t(elements) * tensor.element_size();
}

}  // namespace detr_fast
