// SPDX-License-Identifier: Apache-2.0
// Functions of one thread that CUDA has beside <cmath>: bit casts, integer and float intrinsics,
// loads with a cache hint. Approximate ones (__expf) are exact here: compare with a tolerance.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

namespace cudasim {

template <typename To, typename From>
To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace cudasim

inline int __float_as_int(float value) { return ::cudasim::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return ::cudasim::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return ::cudasim::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return ::cudasim::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) {
  return ::cudasim::bit_cast<long long>(value);
}
inline double __longlong_as_double(long long bits) { return ::cudasim::bit_cast<double>(bits); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __brev(unsigned bits) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1u) << (31 - i);
  return reversed;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float a) { return a > 1.0f ? 1.0f : a > 0.0f ? a : 0.0f; }  // NaN: 0
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

using std::isfinite;
using std::isinf;
using std::isnan;

template <typename A, typename B>
constexpr auto min(A a, B b) -> std::common_type_t<A, B> {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr auto max(A a, B b) -> std::common_type_t<A, B> {
  return a < b ? b : a;
}

// inlined, as a fault in them is their caller's
template <typename T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}
template <typename T>
__forceinline__ T __ldcs(const T* address) {
  return *address;
}
template <typename T>
__forceinline__ void __stcs(T* address, T value) {
  *address = value;
}
