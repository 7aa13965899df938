// SPDX-License-Identifier: Apache-2.0
// Contract of linear_sum_assignment, and the checks that its CPU and CUDA versions share.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "matcher/assignment.h"
#include "matcher/options.h"

namespace detr_fast {

// linear_sum_assignment(cost (P, Q, T), count (P,)?, algorithm, scipy_ties, non_finite,
// replacement)
//     -> query_of_target (P, T) int64, -1 = free; status (P,) int32, bits of MatchStatus
//   Costs are float or double, in any layout. Columns from count[p] on are padding; a count below 0
//   is read as 0, one above T as T. +inf forbids a pair. A problem whose status is not 0 has no
//   assignment.
struct AssignmentProblems {
  int problems, queries, targets;
  Algorithm algorithm;
  Ties ties;
  NonFinite non_finite;
};

inline NonFinite check_non_finite(int64_t policy, const std::vector<double>& replacement) {
  STD_TORCH_CHECK(policy >= 0 && policy <= 2, "non_finite: expected 0 to 2, got ", policy);
  const auto chosen = static_cast<NonFinitePolicy>(policy);
  if (chosen != NonFinitePolicy::kReplace) return {chosen, 0, 0, 0};
  STD_TORCH_CHECK(replacement.size() == 3, "non_finite: expected what replaces NaN, +inf and ",
                  "-inf, got ", replacement.size(), " numbers");
  for (const double value : replacement) {
    STD_TORCH_CHECK(!std::isnan(value) && value >= std::numeric_limits<float>::lowest(),
                    "non_finite: expected numbers of float32 or inf, got ", value);
  }
  return {chosen, replacement[0], replacement[1], replacement[2]};
}

inline int check_count_of(int64_t size, const char* what) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  STD_TORCH_CHECK(size <= most, "cost: expected at most ", most, " ", what, ", got ", size);
  return static_cast<int>(size);
}

inline AssignmentProblems check_assignment(const Tensor& cost, const std::optional<Tensor>& count,
                                           int64_t algorithm, bool scipy_ties, int64_t non_finite,
                                           const std::vector<double>& replacement) {
  check_shape(cost, "cost", {kAnySize, kAnySize, kAnySize});
  check_floating(cost, "cost");
  if (count) {
    check_shape(*count, "count", {cost.size(0)});
    STD_TORCH_CHECK(count->scalar_type() == torch::headeronly::ScalarType::Int,
                    "count: expected dtype Int, got ", count->scalar_type());
    check_device(*count, "count", cost, "cost");
  }
  STD_TORCH_CHECK(algorithm >= 0 && algorithm <= 2, "algorithm: expected 0 to 2, got ", algorithm);
  STD_TORCH_CHECK(!scipy_ties || algorithm != int(Algorithm::kAuction),
                  "algorithm: the auction does not know scipy's ties");
  return {check_count_of(cost.size(0), "problems"), check_count_of(cost.size(1), "queries"),
          check_count_of(cost.size(2), "targets"),  static_cast<Algorithm>(algorithm),
          scipy_ties ? Ties::kScipy : Ties::kAny,   check_non_finite(non_finite, replacement)};
}

template <typename scalar_t>
CostView<scalar_t> cost_view(const Tensor& cost, const scalar_t* data) {
  return {data, cost.stride(0), cost.stride(1), cost.stride(2)};
}

}  // namespace detr_fast
