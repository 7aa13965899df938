// SPDX-License-Identifier: Apache-2.0
// exp, log and log1p: of float, on the host, as plain arithmetic, so that GCC makes vector code of
// a loop that calls them, and without fused multiply-add, so that every instruction set computes
// the same. Of double and on a GPU they are those of the mathematical library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace detr_fast {

#if defined(__CUDA_ARCH__)

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ float log_plus_one(float x) { return log1pf(x); }

#else

constexpr float kLog2High = 0.693145752f;   // log(2), whose products with exponents are exact,
constexpr float kLog2Low = 1.42860677e-6f;  // and the rest of it

// A float's bits as a number and back; GCC vectorises this form.
DETR_FAST_HOST_DEVICE int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

DETR_FAST_HOST_DEVICE float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 2^n for n in [-126, 127]
DETR_FAST_HOST_DEVICE float power_of_two(int32_t n) { return float_of((n + 127) << 23); }

// exp(x) within 0.92 ulp; results below 2^-126 are rounded to denormal numbers.
DETR_FAST_HOST_DEVICE float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;  // exp is 0 from there on, and infinite from 89 on; a NaN stays
  x = x > 89.0f ? 89.0f : x;
  // exp(x) = 2^n exp(r) with |r| <= log(2) / 2; adding 1.5 * 2^23 rounds to an integer
  constexpr float rounder = 12582912.0f;
  const float shifted = x * 1.44269502f + rounder;
  const float n = shifted - rounder;
  const float high = x - n * kLog2High, low = n * kLog2Low;
  const float r = high - low, lost = (high - r) - low;
  float p = 1.39505998e-3f;  // (exp(r) - 1 - r) / r^2
  p = p * r + 8.36895406e-3f;
  p = p * r + 4.16662060e-2f;
  p = p * r + 0.166665182f;
  p = p * r + 0.5f;
  const float result = 1.0f + (r + ((r * r) * p + lost));
  // in two factors, as 2^n alone is no float at either end
  const int32_t exponent = bits_of(shifted) - bits_of(rounder), half = exponent >> 1;
  return result * power_of_two(half) * power_of_two(exponent - half);
}

// log(x * 2^shift) of a normal number within 0.87 ulp; any number for others.
DETR_FAST_HOST_DEVICE float logarithm_of_normal(float x, int32_t shift) {
  // x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)]
  const uint32_t bits = uint32_t(bits_of(x));
  const int32_t exponent = int32_t(bits - uint32_t(bits_of(0.707106769f))) >> 23;
  const float f = float_of(int32_t(bits - (uint32_t(exponent) << 23))) - 1.0f;
  const float n = float(exponent + shift);
  float p = 6.74660131e-2f;  // (log(1 + f) - f + f^2 / 2) / f^3
  p = p * f - 0.116756409f;
  p = p * f + 0.118881747f;
  p = p * f - 0.124055915f;
  p = p * f + 0.142195508f;
  p = p * f - 0.166679963f;
  p = p * f + 0.200021192f;
  p = p * f - 0.250000089f;
  p = p * f + 0.333333135f;
  const float square = f * f;
  return n * kLog2High + (f + (n * kLog2Low + (square * (f * p) - 0.5f * square)));
}

// log(x) within 0.87 ulp; -inf of 0, NaN of negative numbers
DETR_FAST_HOST_DEVICE float logarithm(float x) {
  const bool denormal = x < 1.17549435e-38f;
  const float result = logarithm_of_normal(denormal ? x * 8388608.0f : x, denormal ? -23 : 0);
  const float infinity = float_of(0x7f800000);
  const float edge = x == 0.0f ? -infinity : x < 0.0f ? x - x - (infinity - infinity) : x;
  return x > 0.0f && x < infinity ? result : edge;
}

// log(1 + x) for x in [0, 1] within 1.25 ulp; without the edges of a logarithm GCC vectorises it
DETR_FAST_HOST_DEVICE float log_plus_one(float x) {
  const float sum = 1.0f + x;
  return logarithm_of_normal(sum, 0) + (x - (sum - 1.0f)) / sum;  // what the sum has lost; or NaN
}

#endif

DETR_FAST_HOST_DEVICE double exponential(double x) { return std::exp(x); }
DETR_FAST_HOST_DEVICE double logarithm(double x) { return std::log(x); }
DETR_FAST_HOST_DEVICE double log_plus_one(double x) { return std::log1p(x); }

}  // namespace detr_fast
