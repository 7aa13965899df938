// SPDX-License-Identifier: Apache-2.0
// CPU twin of linear_sum_assignment: threads over problems, each with a scratch of its own.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/library.h"
#include "common/multiversion.h"
#include "matcher/assignment.h"
#include "matcher/assignment_checks.h"
#include "matcher/auction.h"
#include "matcher/non_finite.h"
#include "matcher/solve_rows.h"

namespace detr_fast {
namespace {

// The fewest costs that are worth another thread (about 10 us of work).
constexpr int64_t kCostsPerThread = 8192;
// Columns that are laid out as rows at a time: their cache lines are read once.
constexpr int kTile = 16;

// Lays the cost out as rows; returns what it holds beside finite numbers.
template <typename scalar_t>
DETR_FAST_MULTIVERSION int lay_out(CostView<scalar_t> view, AssignmentShape shape,
                                   CostRows<scalar_t> costs) {
  int64_t row_step = view.query_step, column_step = view.target_step;
  if (shape.targets_are_rows) std::swap(row_step, column_step);
  for (int first = 0; first < shape.columns; first += kTile) {
    const int last = std::min(first + kTile, shape.columns);
    for (int i = 0; i < shape.rows; ++i) {
      const scalar_t* from = view.data + i * row_step;
      scalar_t* __restrict to = costs.row(i);
      for (int j = first; j < last; ++j) to[j] = from[j * column_step];
    }
  }
  int bits = 0;
  for (int i = 0; i < shape.rows; ++i) {
    const scalar_t* row = costs.row(i);
#pragma omp simd reduction(| : bits)
    for (int j = 0; j < shape.columns; ++j) bits |= non_finite_bits(row[j]);
  }
  return bits;
}

template <typename scalar_t>
DETR_FAST_MULTIVERSION bool solve_by_auction(CostRows<scalar_t> costs, AssignmentState state) {
  clear_state(state, 0, 1);
  return assign_by_auction(OneLane(), costs, state);
}

// Solves one problem of `targets` targets; writes the query of each; returns its status.
template <Algorithm kAlgorithm, Ties kTies, typename scalar_t>
int assign(CostView<scalar_t> view, int queries, int targets, NonFinite non_finite,
           Scratch& scratch, int64_t* query_of_target) {
  std::fill_n(query_of_target, targets, kFree);
  const AssignmentShape shape = assignment_shape(queries, targets);
  const size_t bytes = state_bytes<kTies>(shape.rows, shape.columns);
  const size_t count = size_t(shape.rows) * shape.columns;
  scratch.reset(bytes + count * sizeof(scalar_t), 2);
  const AssignmentState state =
      place_state<kTies>(scratch.take<char>(bytes), shape.rows, shape.columns);
  const CostRows<scalar_t> costs = {scratch.take<scalar_t>(count), shape.columns, shape.rows};
  const int bits = lay_out(view, shape, costs);
  if (non_finite.policy == NonFinitePolicy::kError) {
    if (bits & kInvalid) return kExtraCost;
  } else if (bits != 0) {
    replace_non_finite(OneLane(), costs, shape.rows, shape.columns, non_finite);
  }
  bool solved;
  if constexpr (kAlgorithm == Algorithm::kAuction) {
    solved = solve_by_auction(costs, state);
  } else {
    solved = solve<kTies>(costs, state);
  }
  if (!solved) return kInfeasible;
  std::copy_n(shape.targets_are_rows ? state.column_of_row : state.row_of_column, targets,
              query_of_target);
  return 0;
}

std::tuple<Tensor, Tensor> linear_sum_assignment_cpu(const Tensor& cost,
                                                     std::optional<Tensor> count, int64_t algorithm,
                                                     bool scipy_ties, int64_t non_finite,
                                                     std::vector<double> replacement) {
  using torch::headeronly::ScalarType;
  const AssignmentProblems problems =
      check_assignment(cost, count, algorithm, scipy_ties, non_finite, replacement);
  const int width = problems.targets;
  const Tensor query_of_target =
      torch::stable::new_empty(cost, {problems.problems, width}, ScalarType::Long);
  const Tensor status = torch::stable::new_empty(cost, {problems.problems}, ScalarType::Int);
  auto* found = query_of_target.mutable_data_ptr<int64_t>();
  auto* statuses = status.mutable_data_ptr<int>();
  const int* counts = count ? count->const_data_ptr<int>() : nullptr;
  const int64_t count_step = count ? count->stride(0) : 0;
  dispatch_floating(cost, [&](auto zero) {
    using scalar_t = decltype(zero);
    const CostView<scalar_t> view = cost_view(cost, cost.const_data_ptr<scalar_t>());
    const auto assign_by = problems.algorithm == Algorithm::kAuction
                               ? assign<Algorithm::kAuction, Ties::kAny, scalar_t>
                           : scipy_ties ? assign<Algorithm::kShortestPath, Ties::kScipy, scalar_t>
                                        : assign<Algorithm::kShortestPath, Ties::kAny, scalar_t>;
    const auto run = [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t p = begin; p < end; ++p) {
        const int targets = counts ? std::clamp(counts[p * count_step], 0, width) : width;
        CostView<scalar_t> problem = view;
        problem.data += p * view.problem_step;
        int64_t* row = found + p * width;
        statuses[p] =
            assign_by(problem, problems.queries, targets, problems.non_finite, scratch, row);
        if (statuses[p] != 0) std::fill_n(row, targets, kFree);
        std::fill(row + targets, row + width, kFree);
      }
    };
    const int64_t costs = std::max<int64_t>(1, int64_t(problems.queries) * width);
    torch::stable::parallel_for(0, problems.problems, std::max<int64_t>(1, kCostsPerThread / costs),
                                run);
  });
  return {query_of_target, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, CPU, m) {
  m.impl("linear_sum_assignment", TORCH_BOX(&linear_sum_assignment_cpu));
}

}  // namespace detr_fast
