// SPDX-License-Identifier: Apache-2.0
// Contract of hungarian_match, and the checks that its CPU and CUDA versions share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/layout.h"
#include "matcher/assignment_checks.h"
#include "matcher/cost.h"

namespace detr_fast {

// hungarian_match(logits L x (B, Q, C), boxes L x (B, Q, 4), labels (B, T) int64, target_boxes
//                 (B, T, 4), count (B,) int32, extra_cost none or L x (B, Q, T), weights (class,
//                 bbox, giou), class_cost, class_options (alpha, gamma, eps), groups, repeat,
//                 scipy_ties, non_finite, replacement)
//     -> query_of_target (L, B, groups * repeat * T) int64, -1 = free; slot (g * repeat + r) * T +
//     t
//        target_of_query (L, B, largest Q) int64, -1 = free
//        cost (L, B, groups) of the matched pairs; status (L, B, groups) int32, bits of MatchStatus
//   Layers may differ in Q and C. The logits, all of one type, decide the arithmetic: double for
//   double, float for float, half and bfloat16. Boxes and extra costs may be of any of these types
//   and, like the logits, in any strides. Targets from count[b] on are padding and not read; a
//   count below 0 is read as 0, one above T as T.
struct MatchProblems {
  int layers, images, groups, repeat;
  int targets;       // T
  int most_queries;  // of a layer
  Ties ties;
  NonFinite non_finite;
  CostFormula<double> formula;

  int64_t problems() const { return int64_t(layers) * images * groups; }
  int64_t slots() const { return int64_t(repeat) * targets; }  // of a group
};

struct MatchInputs {
  std::vector<Tensor> logits, boxes, extra_cost;
  Tensor labels, target_boxes, count;
};

template <typename scalar_t>
CostFormula<scalar_t> formula_as(const CostFormula<double>& f) {
  return {f.kind,
          scalar_t(f.alpha),
          scalar_t(f.one_less_alpha),
          scalar_t(f.gamma),
          scalar_t(f.eps),
          scalar_t(f.class_weight),
          scalar_t(f.bbox_weight),
          scalar_t(f.giou_weight)};
}

inline CostFormula<double> check_formula(const std::vector<double>& weights, int64_t class_cost,
                                         const std::vector<double>& class_options,
                                         bool has_extra_cost) {
  STD_TORCH_CHECK(weights.size() == 3, "weights: expected cost_class, cost_bbox and cost_giou, ",
                  "got ", weights.size(), " numbers");
  STD_TORCH_CHECK(weights[0] != 0 || weights[1] != 0 || weights[2] != 0 || has_extra_cost,
                  "all weights are 0 and there is no extra cost: nothing to match by");
  STD_TORCH_CHECK(class_cost >= 0 && class_cost <= 3, "class_cost: expected 0 to 3, got ",
                  class_cost);
  STD_TORCH_CHECK(class_options.size() == 3, "class_options: expected alpha, gamma and eps, got ",
                  class_options.size(), " numbers");
  const double alpha = class_options[0];
  return {static_cast<ClassCostKind>(class_cost),
          alpha,
          1 - alpha,
          class_options[1],
          class_options[2],
          weights[0],
          weights[1],
          weights[2]};
}

inline MatchProblems check_match(const MatchInputs& inputs, const std::vector<double>& weights,
                                 int64_t class_cost, const std::vector<double>& class_options,
                                 int64_t groups, int64_t repeat, bool scipy_ties,
                                 int64_t non_finite, const std::vector<double>& replacement) {
  using torch::headeronly::ScalarType;
  const auto& [logits, boxes, extra_cost, labels, target_boxes, count] = inputs;
  const size_t layers = logits.size();
  STD_TORCH_CHECK(layers > 0, "logits: expected at least one layer");
  STD_TORCH_CHECK(boxes.size() == layers, "boxes: expected one tensor for each of the ", layers,
                  " layers of logits, got ", boxes.size());
  STD_TORCH_CHECK(extra_cost.empty() || extra_cost.size() == layers,
                  "extra_cost: expected one tensor for each of the ", layers,
                  " layers of logits, got ", extra_cost.size());
  STD_TORCH_CHECK(groups >= 1, "groups: expected at least 1, got ", groups);
  STD_TORCH_CHECK(repeat >= 1, "repeat: expected at least 1, got ", repeat);
  check_shape(labels, "labels", {kAnySize, kAnySize});
  const int64_t images = labels.size(0), targets = labels.size(1);
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels: expected dtype Long, got ",
                  labels.scalar_type());
  check_floating_or_half(target_boxes, "target_boxes");
  check_shape(target_boxes, "target_boxes", {images, targets, 4});
  check_shape(count, "count", {images});
  STD_TORCH_CHECK(count.scalar_type() == ScalarType::Int, "count: expected dtype Int, got ",
                  count.scalar_type());
  int64_t most_queries = 0;
  for (size_t layer = 0; layer < layers; ++layer) {
    check_layer(logits, layer, "logits", {images, kAnySize, kAnySize}, logits[0]);
    const int64_t queries = logits[layer].size(1);
    check_layer(boxes, layer, "boxes", {images, queries, 4}, logits[0]);
    if (!extra_cost.empty()) {
      check_layer(extra_cost, layer, "extra_cost", {images, queries, targets}, logits[0]);
    }
    STD_TORCH_CHECK(queries % groups == 0, "logits[", layer, "]: ", queries,
                    " queries cannot be cut into ", groups, " equal groups");
    most_queries = std::max(most_queries, queries);
  }
  check_device(labels, "labels", logits[0], "logits[0]");
  check_device(target_boxes, "target_boxes", logits[0], "logits[0]");
  check_device(count, "count", logits[0], "logits[0]");
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  STD_TORCH_CHECK(repeat <= most && targets <= most / repeat &&
                      groups <= most / std::max<int64_t>(1, images) &&
                      most_queries / groups <= most / std::max<int64_t>(1, repeat * targets),
                  "expected at most ", most, " pairs of an image, got ", most_queries, " queries, ",
                  repeat, " x ", targets, " targets");
  return {int(layers),
          int(images),
          int(groups),
          int(repeat),
          int(targets),
          int(most_queries),
          scipy_ties ? Ties::kScipy : Ties::kAny,
          check_non_finite(non_finite, replacement),
          check_formula(weights, class_cost, class_options, !extra_cost.empty())};
}

struct MatchOutputs {
  Tensor query_of_target, target_of_query, cost, status;
};

inline MatchOutputs new_match_outputs(const MatchProblems& p, const Tensor& logits) {
  using torch::headeronly::ScalarType;
  const ScalarType type =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto empty = [&](int64_t columns, ScalarType dtype) {
    return torch::stable::new_empty(logits, {p.layers, p.images, columns}, dtype);
  };
  return {empty(p.groups * p.slots(), ScalarType::Long), empty(p.most_queries, ScalarType::Long),
          empty(p.groups, type), empty(p.groups, ScalarType::Int)};
}

}  // namespace detr_fast
