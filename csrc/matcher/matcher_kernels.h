// SPDX-License-Identifier: Apache-2.0
// Launcher of the matching kernel: device pointers, no torch. `stream` is a cudaStream_t.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matcher/assignment.h"
#include "matcher/cost.h"
#include "matcher/options.h"

namespace detr_fast {

template <typename scalar_t>
struct MatchArguments {
  MatchLayer layers[kMostLayers];
  ElementType logits_type, boxes_type, extra_type, target_boxes_type;
  int images, groups, repeat, targets, most_queries;
  const int64_t* labels;     // (images, targets)
  const void* target_boxes;  // (images, targets, 4), centre and size
  const int* count;          // (images)
  CostFormula<scalar_t> formula;
  NonFinite non_finite;
  // as in matcher.h, from the first of these layers on
  int64_t* query_of_target;
  int64_t* target_of_query;
  scalar_t* total;
  int* status;
  size_t shared_bytes;       // of a block
  size_t workspace_bytes;    // of a problem, a multiple of 16
  unsigned char* workspace;  // (problems, workspace_bytes), aligned to 16 bytes, or nullptr
};

// The bytes that a problem takes: targets, state of the solver, costs.
template <typename scalar_t>
size_t match_bytes(Ties ties, int queries, int targets, int repeat);

// The most shared memory that a block of the kernel may have on the current device.
size_t match_shared_limit();

// Instantiated for float (logits of float, half or bfloat16) and double (logits of double).
// `largest_group` is the most queries of a group.
template <typename scalar_t>
void launch_hungarian_match(const MatchArguments<scalar_t>& arguments, Ties ties, int layers,
                            int largest_group, void* stream);

}  // namespace detr_fast
