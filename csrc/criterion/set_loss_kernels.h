// SPDX-License-Identifier: Apache-2.0
// Launchers of set_loss and its gradient: device pointers, no torch. `stream` is a cudaStream_t.
// Instantiated for float (logits of float, half or bfloat16) and double (logits of double).
#pragma once

#include <cstdint>

#include "common/element.h"
#include "criterion/set_sums.h"

namespace detr_fast {

// Queries of an image that one block takes.
constexpr int kChunkQueries = 32;

struct LossLayer {
  LayerInput logits;  // (images, queries, columns)
  LayerInput boxes;   // (images, queries, 4), centre and size
  int queries, columns;
  // Rows of logits, and of a contiguous gradient, are whole groups of four numbers that one access
  // may take: of 16 bytes or, if smaller, of their own size.
  bool by_four;
};

// What both read; as in set_loss.h, from the first of these layers on.
template <typename scalar_t>
struct LossArguments {
  LossLayer layers[kMostLayers];
  ElementType logits_type, boxes_type, target_boxes_type;
  int images, targets, most_queries;
  int chunks;                      // of most_queries
  const int64_t* labels;           // (images, targets)
  const void* target_boxes;        // (images, targets, 4), centre and size
  const int* count;                // (images)
  const int64_t* target_of_query;  // (layers, images, most_queries)
  const scalar_t* class_weight;    // (columns), or nullptr
  ClassLossFormula<scalar_t> formula;
};

template <typename scalar_t>
struct LossResults {
  const int* status;          // (layers, images, groups), or nullptr
  int groups;                 // of status
  const scalar_t* num_boxes;  // one number, or nullptr
  QuerySums* sums;            // (layers, images, chunks), workspace
  scalar_t* losses;           // (layers, kLossColumns)
  scalar_t* softmax;          // (layers, images, most_queries, 2) with cross-entropy
  scalar_t* divisor;          // (layers, kDivisorColumns)
};

template <typename scalar_t>
struct LossGradients {
  const scalar_t* grad;     // (layers, kLossColumns)
  const scalar_t* softmax;  // as LossResults has them
  const scalar_t* divisor;
  bool needs_logits, needs_boxes;
  void* logits[kMostLayers];  // (images, queries, columns), contiguous, in their type
  void* boxes[kMostLayers];   // the same of the boxes
};

// Two launches.
template <typename scalar_t>
void launch_set_loss(const LossArguments<scalar_t>& arguments, const LossResults<scalar_t>& results,
                     int layers, void* stream);

// One launch.
template <typename scalar_t>
void launch_set_loss_backward(const LossArguments<scalar_t>& arguments,
                              const LossGradients<scalar_t>& gradients, int layers, void* stream);

}  // namespace detr_fast
