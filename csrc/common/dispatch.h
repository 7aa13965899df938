// SPDX-License-Identifier: Apache-2.0
// Runs one body for each element type. A function and not LibTorch's macro: that splits its
// arguments on every comma of the body, those of template arguments and of <<<...>>> included.
#pragma once

#include "common/checks.h"

namespace detr_fast {

// Calls body(scalar_t()) with the element type of `tensor`, which check_floating has accepted:
//   dispatch_floating(boxes, [&](auto zero) { using scalar_t = decltype(zero); ... });
template <typename Body>
void dispatch_floating(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == torch::headeronly::ScalarType::Double) {
    body(double());
  } else {
    body(float());
  }
}

}  // namespace detr_fast
