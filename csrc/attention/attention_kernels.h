// SPDX-License-Identifier: Apache-2.0
// Launches of the attention kernels on raw pointers; the contract is attention.h.
#pragma once

#include "attention/rows.h"
#include "common/element.h"

namespace detr_fast {

// What forward and backward read.
struct AttentionInputs {
  ElementType type;  // kHalf or kBFloat16
  int images, heads, queries, keys;
  HeadsInput q, k, v;                                // rows on 16-byte boundaries
  const int32_t *query_rect, *key_rect, *key_count;  // null where not given
  int padded_width;
  int kept;  // of kKeepLevels; all of them: no dropout
};

DETR_FAST_HOST_DEVICE Rows queries_of(const AttentionInputs& in, int image) {
  return rows_of(in.query_rect, nullptr, image, in.queries, in.padded_width);
}

DETR_FAST_HOST_DEVICE Rows keys_of(const AttentionInputs& in, int image) {
  return rows_of(in.key_rect, in.key_count, image, in.keys, in.padded_width);
}

struct AttentionOutputs {
  const int64_t* seed;  // null without dropout
  void* out;            // (images, queries, heads, kHeadDim)
  float* lse;           // (images, heads, queries)
  uint32_t* keep;       // (images, heads, queries, keep_words(keys)); null without dropout
};

struct AttentionGradients {
  HeadsInput grad, out;
  const float* lse;
  const uint32_t* keep;
  float* statistics;  // workspace (images, heads, statistics_rows(queries), 4)
  // (images, rows, heads, kHeadDim)
  void *grad_q, *grad_k, *grad_v;
  int64_t query_step, key_step;  // from row to row
};

constexpr int kStatisticsRows = 64;  // multiples of which are stored
DETR_FAST_HOST_DEVICE int statistics_rows(int queries) {
  return (queries + kStatisticsRows - 1) / kStatisticsRows * kStatisticsRows;
}

// Few queries: an image's keys are divided among warps, or most of the GPU would wait. Not where
// queries may be padding: an image's bits would depend on how many those are.
DETR_FAST_HOST_DEVICE bool few_queries(const AttentionInputs& in) {
  return in.queries <= 128 && in.query_rect == nullptr;
}

void launch_attention(const AttentionInputs&, const AttentionOutputs&, void* stream);
void launch_attention_backward(const AttentionInputs&, const AttentionGradients&, void* stream);

}  // namespace detr_fast
