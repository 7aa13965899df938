// SPDX-License-Identifier: Apache-2.0
// One block for each problem: all its threads fetch the costs, its warps find the row minima, its
// first warp solves.
#include "common/cuda.h"
#include "common/warp.cuh"
#include "matcher/assignment.h"
#include "matcher/assignment_kernels.h"
#include "matcher/auction.h"
#include "matcher/non_finite.h"
#include "matcher/warp_lanes.cuh"

namespace detr_fast {
namespace {

constexpr unsigned kFewestThreads = 64, kMostThreads = 512;
// Costs that a thread shall fetch at least: a load from memory takes as long as 16 from the cache.
constexpr unsigned kCostsPerThread = 16;
// Of these a thread waits for so many at a time.
constexpr unsigned kTogether = 4;

template <typename scalar_t>
__host__ __device__ size_t cost_bytes(AssignmentShape shape) {
  return round_up_16(sizeof(scalar_t) * size_t(shape.rows) * row_stride(shape.columns));
}

// State and costs of a block, of which either may lie in the workspace.
template <Ties kTies, bool kShared, typename scalar_t>
struct Placed {
  AssignmentState state;
  CostRows<scalar_t> costs;

  __device__ Placed(AssignmentShape shape, unsigned char* shared, size_t shared_bytes,
                    unsigned char* workspace) {
    const size_t first = state_bytes<kTies>(shape.rows, shape.columns);
    unsigned char* state_data = shared;
    unsigned char* cost_data = shared + first;
    if constexpr (!kShared) {
      if (first > shared_bytes) state_data = workspace;
      if (first + cost_bytes<scalar_t>(shape) > shared_bytes) cost_data = workspace + first;
    }
    state = place_state<kTies>(state_data, shape.rows, shape.columns);
    costs = {reinterpret_cast<scalar_t*>(cost_data), row_stride(shape.columns), shape.rows};
  }
};

// All threads of a block fetch the costs of its problem; returns what this thread has seen beside
// finite numbers. Neighbours read what lies closest together.
template <typename scalar_t>
__device__ int fetch(CostView<scalar_t> view, AssignmentShape shape, CostRows<scalar_t> costs) {
  const long long row_step = shape.targets_are_rows ? view.target_step : view.query_step;
  const long long column_step = shape.targets_are_rows ? view.query_step : view.target_step;
  const bool along_columns = column_step < row_step;
  const unsigned inner = unsigned(along_columns ? shape.columns : shape.rows);
  const unsigned total = unsigned(shape.rows) * unsigned(shape.columns);
  int bits = 0;
  for (unsigned first = threadIdx.x; first < total; first += kTogether * blockDim.x) {
    scalar_t cost[kTogether];
    size_t place[kTogether];
#pragma unroll
    for (unsigned k = 0; k < kTogether; ++k) {
      const unsigned e = first + k * blockDim.x;
      const unsigned i = along_columns ? e / inner : e % inner;
      const unsigned j = along_columns ? e % inner : e / inner;
      place[k] = size_t(i) * costs.stride + j;
      cost[k] = e < total ? view.data[i * row_step + j * column_step] : scalar_t(0);
    }
#pragma unroll
    for (unsigned k = 0; k < kTogether; ++k) {
      bits |= non_finite_bits(cost[k]);
      if (first + k * blockDim.x < total) costs.data[place[k]] = cost[k];
    }
  }
  return bits;
}

// kShared: state and costs of every problem fit into shared memory.
template <Algorithm kAlgorithm, Ties kTies, bool kShared, typename scalar_t>
__global__ void __launch_bounds__(kMostThreads, 1)
    linear_sum_assignment_kernel(AssignmentCall<scalar_t> call) {
  DETR_FAST_DYNAMIC_SHARED(unsigned char, shared);
  const size_t problem = blockIdx.x;
  const int count = call.count == nullptr ? call.targets : call.count[problem * call.count_step];
  const int targets = max(0, min(count, call.targets));
  const AssignmentShape shape = assignment_shape(call.queries, targets);
  const Placed<kTies, kShared, scalar_t> placed(
      shape, shared, call.memory.shared_bytes,
      call.workspace + problem * call.memory.workspace_bytes);
  const AssignmentState& state = placed.state;
  call.cost.data += problem * call.cost.problem_step;

  const WarpLanes lanes;
  const int warp = int(threadIdx.x) / kWarpSize, warps = int(blockDim.x) / kWarpSize;
  clear_state(state, int(threadIdx.x), int(blockDim.x));
  const int bits = fetch(call.cost, shape, placed.costs);
  int found = 0;
  if (__syncthreads_or(bits)) {
    if (call.non_finite.policy == NonFinitePolicy::kError) {
      if (__syncthreads_or(bits & kInvalid)) found = kExtraCost;
    } else {
      if (warp == 0) {
        replace_non_finite(lanes, placed.costs, shape.rows, shape.columns, call.non_finite);
      }
      __syncthreads();
    }
  }
  if constexpr (kAlgorithm == Algorithm::kShortestPath && kTies == Ties::kAny) {
    find_row_minima(lanes, placed.costs, state, warp, warps);
    __syncthreads();
  }
  if (warp != 0) return;
  if (found == 0) {
    bool solved;
    if constexpr (kAlgorithm == Algorithm::kAuction) {
      solved = assign_by_auction(lanes, placed.costs, state);
    } else {
      solved = shortest_paths<kTies>(lanes, placed.costs, state);
    }
    if (!solved) found = kInfeasible;
  }
  const int* column = shape.targets_are_rows ? state.column_of_row : state.row_of_column;
  for (int t = lanes.lane(); t < call.targets; t += kWarpSize) {
    call.query_of_target[problem * call.targets + t] =
        found == 0 && t < targets ? column[t] : kFree;
  }
  if (lanes.lane() == 0) call.status[problem] = found;
}

template <Algorithm kAlgorithm, Ties kTies, bool kShared, typename scalar_t>
void launch(const AssignmentCall<scalar_t>& call, void* stream) {
  const auto wanted = unsigned(call.queries) * unsigned(call.targets) / kCostsPerThread;
  unsigned threads = kFewestThreads;
  while (threads < kMostThreads && threads < wanted) threads *= 2;
  const size_t bytes = call.memory.shared_bytes;
  DETR_FAST_ALLOW_SHARED((linear_sum_assignment_kernel<kAlgorithm, kTies, kShared, scalar_t>),
                         bytes);
  DETR_FAST_LAUNCH((linear_sum_assignment_kernel<kAlgorithm, kTies, kShared, scalar_t>),
                   unsigned(call.problems), threads, bytes, stream, call);
}

template <Algorithm kAlgorithm, Ties kTies, typename scalar_t>
void launch(const AssignmentCall<scalar_t>& call, void* stream) {
  if (call.memory.workspace_bytes == 0) {
    launch<kAlgorithm, kTies, true>(call, stream);
  } else {
    launch<kAlgorithm, kTies, false>(call, stream);
  }
}

}  // namespace

template <typename scalar_t>
AssignmentMemory assignment_memory(Ties ties, int queries, int targets) {
  // the largest count needs most
  const AssignmentShape shape = assignment_shape(queries, targets);
  const size_t bytes = cost_bytes<scalar_t>(shape) +
                       (ties == Ties::kScipy ? state_bytes<Ties::kScipy>(shape.rows, shape.columns)
                                             : state_bytes<Ties::kAny>(shape.rows, shape.columns));
  const size_t most = max_shared_bytes();
  return bytes <= most ? AssignmentMemory{bytes, 0} : AssignmentMemory{most, bytes};
}

template <typename scalar_t>
void launch_linear_sum_assignment(const AssignmentCall<scalar_t>& call, Algorithm algorithm,
                                  Ties ties, void* stream) {
  if (algorithm == Algorithm::kAuction) {
    launch<Algorithm::kAuction, Ties::kAny>(call, stream);
  } else if (ties == Ties::kScipy) {
    launch<Algorithm::kShortestPath, Ties::kScipy>(call, stream);
  } else {
    launch<Algorithm::kShortestPath, Ties::kAny>(call, stream);
  }
}

#define DETR_FAST_INSTANTIATE(T)                                  \
  template AssignmentMemory assignment_memory<T>(Ties, int, int); \
  template void launch_linear_sum_assignment<T>(const AssignmentCall<T>&, Algorithm, Ties, void*);
DETR_FAST_INSTANTIATE(float)
DETR_FAST_INSTANTIATE(double)
#undef DETR_FAST_INSTANTIATE

}  // namespace detr_fast
