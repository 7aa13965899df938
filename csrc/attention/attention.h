// SPDX-License-Identifier: Apache-2.0
// Contract of attention and its gradient, and the checks of their arguments.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "attention/dropout.h"
#include "attention/rows.h"
#include "common/checks.h"

namespace detr_fast {

// attention(q (B, H, Q, D), k (B, H, K, D), v (B, H, K, D), query_rect none or (B, 2) int32,
//           key_rect none or (B, 2) int32, key_count none or (B,) int32, padded_width, kept,
//           seed none or () int64)
//     -> out (B, Q, H, D), lse (B, H, Q) float, keep (B, H, Q, keep_words(K)) int32, or
//        (B, H, Q, 0) without dropout
//   softmax(q k^T / sqrt(D)) v in half or bfloat16, D = 32; sums, maxima and exponentials are
//   float, probabilities are rounded to the element type, as are results. A rect (h, w) says that
//   of a grid padded_width wide the rows of its upper left h x w cells are real, a count that the
//   first rows are: the others are not read. out is 0 and lse is -inf for a query that is not
//   real or has no keys. Dropout keeps a weight with probability kept / kKeepLevels and divides it
//   by that; kept = kKeepLevels means none, and then there is no seed. q, k and v may lie in any
//   strides; those whose rows are not 16-byte aligned are copied.
//   An image's results do not depend on the others, on how often it is computed, or on padding: but
//   for dropout, which goes by its place in the batch, and up to 128 queries, which without a
//   query_rect are computed by other warps than with one.
// attention_backward(grad (B, Q, H, D), q, k, v, out, lse, keep, query_rect, key_rect, key_count,
//                    padded_width, kept)
//     -> gradients of q, k and v in their type, 0 where a row is not real: one tensor
//        (B, L, 3, H, D) if Q = K = L, else (B, Q, H, D), (B, K, H, D), (B, K, H, D)
//   No atomics: every gradient is summed in one order.
struct AttentionArguments {
  Tensor q, k, v;
  std::optional<Tensor> query_rect, key_rect, key_count;
  int64_t padded_width, kept;
};

inline void check_rows(const std::optional<Tensor>& rows, const char* name,
                       const std::vector<int64_t>& sizes, const Tensor& q) {
  if (!rows) return;
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Int, name, ": expected dtype Int, got ",
                  rows->scalar_type());
  check_shape(*rows, name, sizes);
  check_device(*rows, name, q, "q");
}

inline void check_grid(const std::optional<Tensor>& rect, const char* name, int64_t length,
                       int64_t padded_width) {
  STD_TORCH_CHECK(!rect || (padded_width > 0 && length % padded_width == 0), name,
                  ": a sequence of ", length,
                  " rows is no grid that is padded_width = ", padded_width, " wide");
}

inline void check_attention(const AttentionArguments& a) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = a.q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "q: expected dtype Half or BFloat16, got ", dtype);
  check_shape(a.q, "q", {kAnySize, kAnySize, kAnySize, kHeadDim});
  const int64_t images = a.q.size(0), heads = a.q.size(1), queries = a.q.size(2);
  check_shape(a.k, "k", {images, heads, kAnySize, kHeadDim});
  const int64_t keys = a.k.size(2);
  check_shape(a.v, "v", {images, heads, keys, kHeadDim});
  check_alike(a.k, "k", a.q, "q");
  check_alike(a.v, "v", a.q, "q");
  check_rows(a.query_rect, "query_rect", {images, 2}, a.q);
  check_rows(a.key_rect, "key_rect", {images, 2}, a.q);
  check_rows(a.key_count, "key_count", {images}, a.q);
  STD_TORCH_CHECK(!a.key_rect || !a.key_count, "key_rect and key_count: expected at most one");
  check_grid(a.query_rect, "query_rect", queries, a.padded_width);
  check_grid(a.key_rect, "key_rect", keys, a.padded_width);
  STD_TORCH_CHECK(a.kept > 0 && a.kept <= kKeepLevels, "kept: expected 1 to ", kKeepLevels,
                  ", got ", a.kept);
  // rows that are not real have numbers, too, whose positions shall be no more than an int
  constexpr int64_t most_blocks = 65535, most_rows = 1 << 23;
  STD_TORCH_CHECK(images <= most_blocks && heads <= most_blocks, "q: expected at most ",
                  most_blocks, " images and heads, got ", images, " and ", heads);
  STD_TORCH_CHECK(queries <= most_rows && keys <= most_rows, "expected at most ", most_rows,
                  " rows, got ", queries, " queries and ", keys, " keys");
}

}  // namespace detr_fast
