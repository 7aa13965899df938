// SPDX-License-Identifier: Apache-2.0
// Runs one body for each element type. A function and not LibTorch's macro: that splits its
// arguments on every comma of the body, those of template arguments and of <<<...>>> included.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/checks.h"
#include "common/element.h"

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

// The same for an element type that check_floating_or_half has accepted.
template <typename Body>
void dispatch_floating_or_half(torch::headeronly::ScalarType type, const Body& body) {
  using torch::headeronly::ScalarType;
  if (type == ScalarType::Half) {
    body(torch::headeronly::Half());
  } else if (type == ScalarType::BFloat16) {
    body(torch::headeronly::BFloat16());
  } else if (type == ScalarType::Double) {
    body(double());
  } else {
    body(float());
  }
}

// That element type as kernels know it.
inline ElementType element_type(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return ElementType::kDouble;
    case ScalarType::Half:
      return ElementType::kHalf;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      return ElementType::kFloat;
  }
}

}  // namespace detr_fast
