// SPDX-License-Identifier: Apache-2.0
// Elements of the four types in a kernel.
#pragma once

#include "common/cuda.h"
#include "common/element.h"

namespace detr_fast {

__device__ __forceinline__ float number(float value) { return value; }
__device__ __forceinline__ double number(double value) { return value; }
__device__ __forceinline__ float number(__half value) { return __half2float(value); }
__device__ __forceinline__ float number(__nv_bfloat16 value) { return __bfloat162float(value); }

// Makes a number an element, rounded to the nearest.
__device__ __forceinline__ void put(float& element, float value) { element = value; }
__device__ __forceinline__ void put(double& element, double value) { element = value; }
__device__ __forceinline__ void put(__half& element, float value) { element = __float2half(value); }
__device__ __forceinline__ void put(__nv_bfloat16& element, float value) {
  element = __float2bfloat16(value);
}

// Calls body(element_t()).
template <typename Body>
__device__ __forceinline__ void dispatch_element(ElementType type, const Body& body) {
  if (type == ElementType::kFloat) return body(float());
  if (type == ElementType::kDouble) return body(double());
  if (type == ElementType::kHalf) return body(__half());
  body(__nv_bfloat16());
}

// The same for elements that scalar_t is the arithmetic of: there are fewer.
template <typename scalar_t, typename Body>
__device__ __forceinline__ void dispatch_source(ElementType type, const Body& body) {
  if constexpr (sizeof(scalar_t) == sizeof(double)) return body(double());
  if (type == ElementType::kHalf) return body(__half());
  if (type == ElementType::kBFloat16) return body(__nv_bfloat16());
  body(float());
}

template <typename scalar_t>
__device__ __forceinline__ scalar_t load(const void* data, ElementType type, long long index) {
  scalar_t value;
  dispatch_element(type, [&](auto zero) {
    value = scalar_t(number(static_cast<const decltype(zero)*>(data)[index]));
  });
  return value;
}

}  // namespace detr_fast
