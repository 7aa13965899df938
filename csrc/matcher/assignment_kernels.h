// SPDX-License-Identifier: Apache-2.0
// Launcher of the assignment kernel: device pointers, no torch; `stream` is a cudaStream_t.
// Instantiated for float and double.
#pragma once

#include "matcher/assignment.h"
#include "matcher/options.h"

namespace detr_fast {

// Bytes of a problem at most. Where they do not fit into shared memory there is a workspace, and
// each block finds out by its count which of the two it needs.
struct AssignmentMemory {
  size_t shared_bytes, workspace_bytes;
};

template <typename scalar_t>
AssignmentMemory assignment_memory(Ties ties, int queries, int targets);

template <typename scalar_t>
struct AssignmentCall {
  CostView<scalar_t> cost;  // (problems, queries, targets), below 2^31 costs in a problem
  const int* count;         // (problems); nullptr: no target is padding
  int64_t count_step;
  int problems, queries, targets;
  NonFinite non_finite;
  AssignmentMemory memory;
  unsigned char* workspace;  // (problems, workspace_bytes), aligned to 16 bytes
  int64_t* query_of_target;  // (problems, targets)
  int* status;               // (problems)
};

template <typename scalar_t>
void launch_linear_sum_assignment(const AssignmentCall<scalar_t>& call, Algorithm algorithm,
                                  Ties ties, void* stream);

}  // namespace detr_fast
