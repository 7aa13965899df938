// SPDX-License-Identifier: Apache-2.0
// The matching kernel: a block takes one problem (layer, image, group) from logits to indices. All
// warps build its costs in shared memory, one warp solves, all write the result. Nothing of it is
// ever in global memory unless it exceeds the shared memory; counts are read on the device.
#include "boxes/box_elements.cuh"
#include "common/cuda.h"
#include "common/element.cuh"
#include "common/warp.cuh"
#include "matcher/matcher_kernels.h"
#include "matcher/non_finite.h"
#include "matcher/warp_lanes.cuh"

namespace detr_fast {
namespace {

constexpr int kFewestThreads = 128;
// Registers are what limits it: about 100 of a thread for float, over 128 for double on some GPUs.
template <typename scalar_t>
constexpr int kMostThreads = sizeof(scalar_t) == sizeof(float) ? 512 : 256;

// Lanes that share a query's logits: 8 floats are the 32 bytes that memory hands out at once.
constexpr int kQueryLanes = 8;

// A target as the costs need it.
template <typename scalar_t>
struct Target {
  Box<scalar_t> box;
  int column;  // of the logits; kFree if there is none
  int twin;    // the first target of the same label, which holds the class costs of all
};

// The matrix of costs, in the order of the solver's rows. An odd distance of the rows keeps the
// lanes of a warp, which go over queries or over targets, on different banks.
template <typename scalar_t>
struct CostMatrix {
  scalar_t* data;
  int query_step, target_step;

  __device__ __forceinline__ scalar_t& at(int query, int target) const {
    return data[query * query_step + target * target_step];
  }
};

template <typename scalar_t>
__host__ __device__ __forceinline__ size_t cost_bytes(AssignmentShape shape, int targets) {
  const int rows = shape.targets_are_rows ? targets : shape.rows;
  return round_up_16(size_t(rows) * row_stride(shape.columns) * sizeof(scalar_t));
}

// What a block knows of its problem.
template <typename scalar_t>
struct Problem {
  int index;                         // of the launch
  int image, group, queries, count;  // queries of the group, targets
  long long first;                   // query of the group in its layer
  AssignmentShape shape;
  Target<scalar_t>* targets;  // (count)
  CostMatrix<scalar_t> costs;
};

// Loads the targets; returns kLabel if a label has no column.
template <typename scalar_t>
__device__ int load_targets(const MatchArguments<scalar_t>& arguments,
                            const Problem<scalar_t>& problem, int columns) {
  const long long first = static_cast<long long>(problem.image) * arguments.targets;
  const int64_t* const labels = arguments.labels + first;
  int bits = 0;
  for (int t = threadIdx.x; t < problem.count; t += blockDim.x) {
    Target<scalar_t> target;
    target.box =
        load_box<scalar_t>(arguments.target_boxes, arguments.target_boxes_type, (first + t) * 4, 1);
    const int64_t label = labels[t];
    target.column = label >= 0 && label < columns ? int(label) : kFree;
    target.twin = t;
    for (int other = t - 1; other >= 0; --other) {
      if (labels[other] == label) target.twin = other;
    }
    problem.targets[t] = target;
    if (target.column == kFree) bits = kLabel;
  }
  return arguments.formula.class_weight != 0 ? bits : 0;
}

// The class term by one logit.
template <typename scalar_t>
__device__ scalar_t class_term_of(scalar_t x, const CostFormula<scalar_t>& formula) {
  if (formula.kind == ClassCostKind::kIouAware) {
    return class_term<ClassCostKind::kIouAware, true>(x, formula);
  }
  const bool squared = formula.gamma == 2;
  if (formula.kind == ClassCostKind::kFocal) {
    return squared ? class_term<ClassCostKind::kFocal, true>(x, formula)
                   : class_term<ClassCostKind::kFocal, false>(x, formula);
  }
  return squared ? class_term<ClassCostKind::kFocalLogits, true>(x, formula)
                 : class_term<ClassCostKind::kFocalLogits, false>(x, formula);
}

// The largest of a query's logits and the sum of their exponentials less it.
template <typename scalar_t>
struct SoftmaxSum {
  scalar_t most, sum;
};

// By kQueryLanes neighbours, who all get it; all lanes of the warp take part.
template <typename scalar_t, typename source_t>
__device__ __forceinline__ SoftmaxSum<scalar_t> softmax_sum(const source_t* logits, long long step,
                                                            int columns, int lane) {
  scalar_t most = -scalar_t(kInfinity), sum = 0;
  for (int c = lane; c < columns; c += kQueryLanes) {
    most = larger(most, scalar_t(number(logits[c * step])));
  }
  for (int distance = kQueryLanes / 2; distance > 0; distance /= 2) {
    most = larger(most, __shfl_xor_sync(kWholeWarp, most, distance));
  }
  // a NaN that the maximum has passed over comes back here
  for (int c = lane; c < columns; c += kQueryLanes) {
    sum += exponential(scalar_t(number(logits[c * step])) - most);
  }
  for (int distance = kQueryLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kWholeWarp, sum, distance);
  }
  return {most, sum};
}

// The class terms of one query, once for each label that occurs, where the first target of the
// label has its cost. By kQueryLanes neighbours; all lanes of the warp take part, `write` or not.
template <typename source_t, typename scalar_t>
__device__ void query_class_costs(const CostFormula<scalar_t>& formula, const LayerInput& logits,
                                  long long offset, int columns, const Problem<scalar_t>& problem,
                                  int q, bool write) {
  const source_t* const row = static_cast<const source_t*>(logits.data) + offset;
  const int lane = threadIdx.x % kQueryLanes;
  SoftmaxSum<scalar_t> softmax = {0, 1};
  if (formula.kind == ClassCostKind::kSoftmax) {
    softmax = softmax_sum<scalar_t>(row, logits.column_step, columns, lane);
  }
  for (int t = lane; write && t < problem.count; t += kQueryLanes) {
    const int column = problem.targets[t].column;
    if (problem.targets[t].twin != t) continue;
    scalar_t term = scalar_t(__builtin_nanf(""));
    if (column != kFree) {
      const scalar_t x = number(row[column * logits.column_step]);
      term = formula.kind == ClassCostKind::kSoftmax
                 ? -(exponential(x - softmax.most) / softmax.sum)
                 : class_term_of(x, formula);
    }
    problem.costs.at(q, t) = term;
  }
}

template <typename scalar_t>
__device__ void class_costs(const MatchArguments<scalar_t>& arguments, const MatchLayer& layer,
                            const Problem<scalar_t>& problem) {
  const LayerInput& logits = layer.logits;
  const int queries_at_once = blockDim.x / kQueryLanes;
  // all lanes of a warp turn as often: those beyond the end look at the last query
  for (int base = 0; base < problem.queries; base += queries_at_once) {
    const int wanted = base + int(threadIdx.x) / kQueryLanes;
    const int q = min(wanted, problem.queries - 1);
    const long long offset =
        problem.image * logits.image_step + (problem.first + q) * logits.query_step;
    dispatch_source<scalar_t>(arguments.logits_type, [&](auto zero) {
      query_class_costs<decltype(zero)>(arguments.formula, logits, offset, layer.columns, problem,
                                        q, wanted == q);
    });
  }
}

// The costs of all pairs: a thread takes a query and goes through its targets from the last to the
// first, so that it meets the class term of a label last where it lies. Returns what is not finite.
template <typename scalar_t>
__device__ int pair_costs(const MatchArguments<scalar_t>& arguments, const MatchLayer& layer,
                          const Problem<scalar_t>& problem) {
  const CostFormula<scalar_t>& formula = arguments.formula;
  const LayerInput &boxes = layer.boxes, &extra = layer.extra;
  int bits = 0;
  for (int q = threadIdx.x; q < problem.queries; q += blockDim.x) {
    const long long query = problem.first + q;
    const Box<scalar_t> box = load_box<scalar_t>(
        boxes.data, arguments.boxes_type,
        problem.image * boxes.image_step + query * boxes.query_step, boxes.column_step);
    const Box<scalar_t> corners = corners_of(box);
    for (int t = problem.count - 1; t >= 0; --t) {
      const Target<scalar_t> target = problem.targets[t];
      const Box<scalar_t> target_corners = corners_of(target.box);
      scalar_t total = 0;
      int found = kSum;
      if (formula.bbox_weight != 0) {
        const scalar_t term = l1_distance(box, target.box);
        found |= term_status(term, kCostBbox);
        total = product(formula.bbox_weight, term);
      }
      if (formula.class_weight != 0) {
        scalar_t term = problem.costs.at(q, target.twin);
        if (formula.kind == ClassCostKind::kIouAware) {
          const scalar_t iou = similarity<Hull::kNone>(corners, target_corners, scalar_t(0));
          term = product(term, power<false>(iou, formula.alpha));
        }
        found |= term_status(term, kCostClass);
        total += product(formula.class_weight, term);
      }
      if (formula.giou_weight != 0) {
        const scalar_t term = similarity<Hull::kClamped>(corners, target_corners, scalar_t(0));
        found |= term_status(term, kCostGiou);
        total += product(formula.giou_weight, -term);
      }
      if (extra.data != nullptr) {
        const scalar_t term = load<scalar_t>(
            extra.data, arguments.extra_type,
            problem.image * extra.image_step + query * extra.query_step + t * extra.column_step);
        found |= term_status(term, kExtraCost);
        total += term;
      }
      if (!is_finite(total)) bits |= found;
      problem.costs.at(q, t) = total;
      if (problem.shape.targets_are_rows) continue;
      for (int r = 1; r < arguments.repeat; ++r) {
        problem.costs.at(q, r * problem.count + t) = total;
      }
    }
  }
  return bits;
}

// The bits of all threads of the block.
__device__ int block_bits(int bits) {
  if (!__syncthreads_or(bits)) return 0;
  int all = 0;
  for (int bit = 1; bit <= kLabel; bit *= 2) {
    if (__syncthreads_or(bits & bit)) all |= bit;
  }
  return all;
}

// Solves the problem whose costs stand; returns the status.
template <Ties kTies, typename scalar_t>
__device__ int solve(const MatchArguments<scalar_t>& arguments, const Problem<scalar_t>& problem,
                     const AssignmentState& state, int status) {
  const WarpLanes lanes;
  const int warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  const AssignmentShape shape = problem.shape;
  const CostRows<scalar_t> rows = {problem.costs.data, row_stride(shape.columns),
                                   shape.targets_are_rows ? problem.count : shape.rows};
  if (status != 0) {
    if (arguments.non_finite.policy == NonFinitePolicy::kError) return status;
    if (warp == 0) {
      replace_non_finite(lanes, rows, shape.rows, shape.columns, arguments.non_finite);
    }
    __syncthreads();
  }
  if constexpr (kTies == Ties::kAny) {
    find_row_minima(lanes, rows, state, warp, warps);
    __syncthreads();
  }
  const bool solved = warp != 0 || shortest_paths<kTies>(lanes, rows, state);
  return __syncthreads_and(solved) ? status : status | kInfeasible;
}

// Writes the result; `solved` is false where there is none. The last group of a layer with fewer
// queries than others fills the rest of its row, too.
template <typename scalar_t>
__device__ void write_result(const MatchArguments<scalar_t>& arguments,
                             const Problem<scalar_t>& problem, const AssignmentState& state,
                             bool solved) {
  const bool by_targets = problem.shape.targets_are_rows;
  const int* const query_of_slot = by_targets ? state.column_of_row : state.row_of_column;
  const int* const slot_of_query = by_targets ? state.row_of_column : state.column_of_row;
  const int width = arguments.targets, slots = arguments.repeat * width, count = problem.count;
  int64_t* const queries =
      arguments.query_of_target + static_cast<long long>(problem.index) * slots;
  for (int i = threadIdx.x; i < slots; i += blockDim.x) {
    const int r = i / width, t = i % width;
    const int query = solved && t < count ? query_of_slot[r * count + t] : kFree;
    queries[i] = query == kFree ? kFree : problem.first + query;
  }
  const int layer_image = problem.index / arguments.groups;
  int64_t* const targets = arguments.target_of_query +
                           static_cast<long long>(layer_image) * arguments.most_queries +
                           problem.first;
  const bool last = problem.group + 1 == arguments.groups;
  const int end = last ? arguments.most_queries - int(problem.first) : problem.queries;
  for (int q = threadIdx.x; q < end; q += blockDim.x) {
    const int slot = solved && q < problem.queries ? slot_of_query[q] : kFree;
    targets[q] = slot == kFree ? kFree : slot % count;
  }
  if (threadIdx.x >= kWarpSize) return;
  double sum = 0;
  for (int slot = threadIdx.x; solved && slot < arguments.repeat * count; slot += kWarpSize) {
    const int query = query_of_slot[slot];
    if (query != kFree) sum += problem.costs.at(query, slot % count);
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) arguments.total[problem.index] = scalar_t(sum);
}

// kShared: the shared memory suffices for every problem.
template <Ties kTies, bool kShared, typename scalar_t>
__global__ void __launch_bounds__(kMostThreads<scalar_t>, 1)
    hungarian_match_kernel(const MatchArguments<scalar_t> arguments) {
  DETR_FAST_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const workspace = arguments.workspace + blockIdx.x * arguments.workspace_bytes;
  Problem<scalar_t> problem;
  problem.index = blockIdx.x;
  problem.group = problem.index % arguments.groups;
  problem.image = problem.index / arguments.groups % arguments.images;
  const MatchLayer& layer = arguments.layers[problem.index / arguments.groups / arguments.images];
  problem.queries = layer.queries / arguments.groups;
  problem.first = static_cast<long long>(problem.group) * problem.queries;
  const int count = arguments.count[problem.image];
  problem.count = count < 0 ? 0 : count > arguments.targets ? arguments.targets : count;
  const AssignmentShape shape = assignment_shape(problem.queries, problem.count * arguments.repeat);
  problem.shape = shape;

  // what comes first lies in shared memory as long as there is room
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    unsigned char* const from =
        kShared || used + bytes <= arguments.shared_bytes ? shared : workspace;
    unsigned char* const piece = from + used;
    used += bytes;
    return piece;
  };
  problem.targets = reinterpret_cast<Target<scalar_t>*>(
      take(round_up_16(problem.count * sizeof(Target<scalar_t>))));
  const AssignmentState state = place_state<kTies>(
      take(state_bytes<kTies>(shape.rows, shape.columns)), shape.rows, shape.columns);
  problem.costs.data =
      reinterpret_cast<scalar_t*>(take(cost_bytes<scalar_t>(shape, problem.count)));
  const int row_step = row_stride(shape.columns);
  problem.costs.query_step = shape.targets_are_rows ? 1 : row_step;
  problem.costs.target_step = shape.targets_are_rows ? row_step : 1;

  int status = 0;
  const bool empty = problem.count == 0 || problem.queries == 0;
  if (!empty) {
    clear_state(state, threadIdx.x, blockDim.x);
    int bits = load_targets(arguments, problem, layer.columns);
    __syncthreads();
    if (arguments.formula.class_weight != 0) {
      class_costs(arguments, layer, problem);
      __syncthreads();
    }
    bits |= pair_costs(arguments, layer, problem);
    status = solve<kTies>(arguments, problem, state, problem_status(block_bits(bits)));
  }
  const bool failed = (status & kInfeasible) ||
                      (status != 0 && arguments.non_finite.policy == NonFinitePolicy::kError);
  write_result(arguments, problem, state, !empty && !failed);
  if (threadIdx.x == 0) arguments.status[problem.index] = failed ? status | kNoResult : status;
}

// Threads for a group of queries: those of a turn through all queries, no more turns than needed.
int threads_for(int queries, int most) {
  const int turns = queries > most ? (queries + most - 1) / most : 1;
  const int warps = (queries + turns * kWarpSize - 1) / (turns * kWarpSize);
  return warps * kWarpSize < kFewestThreads ? kFewestThreads : warps * kWarpSize;
}

template <Ties kTies, bool kShared, typename scalar_t>
void launch(const MatchArguments<scalar_t>& arguments, int problems, int threads, void* stream) {
  const size_t bytes = arguments.shared_bytes;
  DETR_FAST_ALLOW_SHARED((hungarian_match_kernel<kTies, kShared, scalar_t>), bytes);
  DETR_FAST_LAUNCH((hungarian_match_kernel<kTies, kShared, scalar_t>), problems, threads, bytes,
                   stream, arguments);
}

}  // namespace

template <typename scalar_t>
size_t match_bytes(Ties ties, int queries, int targets, int repeat) {
  const AssignmentShape shape = assignment_shape(queries, targets * repeat);
  const size_t state = ties == Ties::kScipy ? state_bytes<Ties::kScipy>(shape.rows, shape.columns)
                                            : state_bytes<Ties::kAny>(shape.rows, shape.columns);
  return round_up_16(targets * sizeof(Target<scalar_t>)) + state +
         cost_bytes<scalar_t>(shape, targets);
}

size_t match_shared_limit() { return max_shared_bytes(); }

template <typename scalar_t>
void launch_hungarian_match(const MatchArguments<scalar_t>& arguments, Ties ties, int layers,
                            int largest_group, void* stream) {
  static_assert(sizeof arguments <= 4096, "a kernel has 4 KiB of parameters");
  const int problems = layers * arguments.images * arguments.groups;
  const int threads = threads_for(largest_group, kMostThreads<scalar_t>);
  const bool shared = arguments.workspace_bytes == 0;
  if (ties == Ties::kScipy) {
    shared ? launch<Ties::kScipy, true>(arguments, problems, threads, stream)
           : launch<Ties::kScipy, false>(arguments, problems, threads, stream);
  } else {
    shared ? launch<Ties::kAny, true>(arguments, problems, threads, stream)
           : launch<Ties::kAny, false>(arguments, problems, threads, stream);
  }
}

#define DETR_FAST_INSTANTIATE(T)                       \
  template size_t match_bytes<T>(Ties, int, int, int); \
  template void launch_hungarian_match<T>(const MatchArguments<T>&, Ties, int, int, void*);
DETR_FAST_INSTANTIATE(float)
DETR_FAST_INSTANTIATE(double)
#undef DETR_FAST_INSTANTIATE

}  // namespace detr_fast
