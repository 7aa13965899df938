// SPDX-License-Identifier: Apache-2.0
// Dropout by random bytes, on the CPU alone: on a GPU torch's own runs at the speed of memory.
//
// dropout_bytes(x (...), random (...) uint8, kept, out (...))
//   out = x * kKeepLevels / kept where random < kept, else 0, whatever x holds there. x is float,
//   double, half or bfloat16, out is of its type and may be x; all three are contiguous and of one
//   shape. kept is 1 to kKeepLevels - 1. It is its own gradient, with the same bytes.
#include <torch/csrc/stable/ops.h>

#include "attention/dropout.h"
#include "common/dispatch.h"
#include "common/elementary.h"
#include "common/library.h"
#include "common/multiversion.h"

namespace detr_fast {
namespace {

// The fewest elements that are worth another thread (about 10 us of work).
constexpr int64_t kElementsPerThread = 32768;

// bfloat16 to float and back in the form that GCC vectorises; rounds to nearest even.
DETR_FAST_HOST_DEVICE float widened(uint16_t bits) {
  return float_of(int32_t(uint32_t(bits) << 16));
}

DETR_FAST_HOST_DEVICE uint16_t narrowed(float value) {
  const uint32_t bits = uint32_t(bits_of(value));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t(value == value ? rounded : 0x7fc0);
}

// out may be x, element by element.
template <typename element_t>
DETR_FAST_MULTIVERSION void keep_some(const element_t* x, const uint8_t* random, uint8_t kept,
                                      arithmetic_t<element_t> scale, int64_t count,
                                      element_t* out) {
  using scalar_t = arithmetic_t<element_t>;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const scalar_t scaled = as<scalar_t>(x[i]) * scale;
    out[i] = static_cast<element_t>(random[i] < kept ? scaled : scalar_t(0));
  }
}

DETR_FAST_MULTIVERSION void keep_some_narrow(const uint16_t* x, const uint8_t* random, uint8_t kept,
                                             float scale, int64_t count, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t scaled = narrowed(widened(x[i]) * scale);
    out[i] = random[i] < kept ? scaled : uint16_t(0);
  }
}

template <>
void keep_some(const torch::headeronly::BFloat16* x, const uint8_t* random, uint8_t kept,
               float scale, int64_t count, torch::headeronly::BFloat16* out) {
  keep_some_narrow(reinterpret_cast<const uint16_t*>(x), random, kept, scale, count,
                   reinterpret_cast<uint16_t*>(out));
}

void check_dropout(const Tensor& x, const Tensor& random, int64_t kept, const Tensor& out) {
  using torch::headeronly::ScalarType;
  check_floating_or_half(x, "x");
  STD_TORCH_CHECK(random.scalar_type() == ScalarType::Byte, "random: expected dtype Byte, got ",
                  random.scalar_type());
  check_alike(out, "out", x, "x");
  check_device(random, "random", x, "x");
  check_shape(random, "random", x.sizes());
  check_shape(out, "out", x.sizes());
  STD_TORCH_CHECK(kept > 0 && kept < kKeepLevels, "kept: expected 1 to ", kKeepLevels - 1, ", got ",
                  kept);
  STD_TORCH_CHECK(x.is_contiguous() && random.is_contiguous() && out.is_contiguous(),
                  "x, random and out: expected contiguous tensors");
}

void dropout_bytes_cpu(const Tensor& x, const Tensor& random, int64_t kept, const Tensor& out) {
  check_dropout(x, random, kept, out);
  const uint8_t* const bytes = random.const_data_ptr<uint8_t>();
  dispatch_floating_or_half(x.scalar_type(), [&](auto zero) {
    using element_t = decltype(zero);
    const element_t* const from = x.const_data_ptr<element_t>();
    element_t* const to = out.mutable_data_ptr<element_t>();
    const auto scale = arithmetic_t<element_t>(kKeepLevels) / arithmetic_t<element_t>(kept);
    torch::stable::parallel_for(0, x.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
      keep_some(from + begin, bytes + begin, uint8_t(kept), scale, end - begin, to + begin);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, CPU, m) {
  m.impl("dropout_bytes", TORCH_BOX(&dropout_bytes_cpu));
}

}  // namespace detr_fast
