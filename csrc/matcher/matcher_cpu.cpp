// SPDX-License-Identifier: Apache-2.0
// CPU twin of hungarian_match: threads over problems, each with a scratch of its own.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/library.h"
#include "matcher/assignment.h"
#include "matcher/cost_rows.h"
#include "matcher/matcher.h"
#include "matcher/non_finite.h"
#include "matcher/solve_rows.h"

namespace detr_fast {
namespace {

// The fewest costs and logits that are worth another thread (about 10 us of work).
constexpr int64_t kNumbersPerThread = 8192;

// A call of the op; source_t is the element type of the logits.
template <typename source_t>
struct HungarianMatch {
  using scalar_t = arithmetic_t<source_t>;

  const MatchProblems& problems;
  const std::vector<MatchLayer>& layers;
  torch::headeronly::ScalarType boxes_type, extra_type;
  CostFormula<scalar_t> formula;
  std::vector<ImageTargets<scalar_t>> images;
  int64_t *query_of_target, *target_of_query;
  scalar_t* total;
  int* status;

  // Costs (count, size), a row for each target; returns their status.
  int costs(const MatchLayer& layer, int image, int group, Scratch& scratch,
            Rows<scalar_t> rows) const {
    const ImageTargets<scalar_t>& targets = images[image];
    const int size = layer.queries / problems.groups, first = group * size;
    const auto input = [&](const LayerInput& from, auto zero) {
      using element_t = decltype(zero);
      const auto* data = static_cast<const element_t*>(from.data);
      return QueryInput<element_t>{data + image * from.image_step + first * from.query_step,
                                   from.query_step, from.column_step};
    };
    const Rows<scalar_t> sides = {scratch.take<scalar_t>(kBoxRows * size_t(rows.stride)),
                                  rows.stride};
    dispatch_floating_or_half(
        boxes_type, [&](auto zero) { load_boxes(input(layer.boxes, zero), size, sides); });
    const BoxRows<scalar_t> boxes = box_rows(sides);
    const int labels = int(targets.labels.size());
    const Rows<scalar_t> class_costs = {scratch.take<scalar_t>(labels * size_t(rows.stride)),
                                        rows.stride};
    int bits = 0;
    if (formula.class_weight != 0) {
      const QueryInput<source_t> logits = input(layer.logits, source_t());
      if (formula.kind == ClassCostKind::kSoftmax) {
        softmax_rows(logits, size, layer.columns, targets.labels.data(), labels, class_costs,
                     scratch.take<scalar_t>(rows.stride),
                     scratch.take<scalar_t>(padded(layer.columns)));
      } else {
        gather_logits(logits, size, layer.columns, targets.labels, class_costs);
        class_rows(formula, size, labels, class_costs);
      }
      for (const int64_t label : targets.labels) {
        if (label < 0 || label >= layer.columns) bits |= kLabel;
      }
    }
    scalar_t* const iou_aware = scratch.take<scalar_t>(rows.stride);
    scalar_t* const extra = scratch.take<scalar_t>(rows.stride);
    for (int t = 0; t < targets.count; ++t) {
      const Box<scalar_t> target = targets.boxes[t];
      TermRows<scalar_t> terms = {nullptr, nullptr};
      if (formula.class_weight != 0) terms.class_cost = class_costs[targets.label_of[t]];
      if (formula.class_weight != 0 && formula.kind == ClassCostKind::kIouAware) {
        iou_aware_row(formula.alpha, boxes, size, corners_of(target), terms.class_cost, iou_aware);
        terms.class_cost = iou_aware;
      }
      if (layer.extra.data != nullptr) {
        dispatch_floating_or_half(extra_type, [&](auto zero) {
          const auto from = input(layer.extra, zero);
          const auto* column = from.data + t * from.column_step;
          for (int q = 0; q < size; ++q) extra[q] = as<scalar_t>(column[q * from.query_step]);
        });
        terms.extra = extra;
      }
      if (!cost_row(formula, boxes, size, target, terms, rows[t])) {
        bits |= row_status(formula, boxes, size, target, terms, rows[t]);
      }
    }
    return problem_status(bits);
  }

  // The costs of all slots as the solver's rows.
  CostRows<scalar_t> solver_rows(AssignmentShape shape, Rows<scalar_t> costs, int count,
                                 Scratch& scratch) const {
    if (shape.targets_are_rows) return {costs.data, costs.stride, count};
    const CostRows<scalar_t> rows = {scratch.take<scalar_t>(size_t(shape.rows) * shape.columns),
                                     shape.columns, shape.rows};
    for (int q = 0; q < shape.rows; ++q) {
      scalar_t* row = rows.row(q);
      for (int slot = 0; slot < shape.columns; ++slot) row[slot] = costs[slot % count][q];
    }
    return rows;
  }

  void match(int64_t problem, Scratch& scratch) const {
    const int group = int(problem % problems.groups);
    const int image = int(problem / problems.groups % problems.images);
    const MatchLayer& layer = layers[problem / problems.groups / problems.images];
    const int count = images[image].count, slots = problems.repeat * count;
    const int size = layer.queries / problems.groups, width = problems.targets;
    int64_t* const queries = query_of_target + problem * problems.slots();
    std::fill_n(queries, problems.slots(), kFree);
    // the last group of a layer with fewer queries than others fills the rest, too
    int64_t* const all_targets =
        target_of_query + problem / problems.groups * problems.most_queries;
    int64_t* const targets = all_targets + group * size;
    std::fill(targets,
              group + 1 == problems.groups ? all_targets + problems.most_queries : targets + size,
              kFree);
    total[problem] = 0;
    status[problem] = 0;
    if (count == 0 || size == 0) return;

    const AssignmentShape shape = assignment_shape(size, slots);
    const auto state_size =
        problems.ties == Ties::kScipy ? state_bytes<Ties::kScipy> : state_bytes<Ties::kAny>;
    const auto place =
        problems.ties == Ties::kScipy ? place_state<Ties::kScipy> : place_state<Ties::kAny>;
    const auto solve_by =
        problems.ties == Ties::kScipy ? solve<Ties::kScipy, scalar_t> : solve<Ties::kAny, scalar_t>;
    // an odd multiple of a vector's numbers spreads a column over the sets of a cache
    const int stride = padded(size) | kLanes;
    const size_t labels = images[image].labels.size();
    const size_t transposed = shape.targets_are_rows ? 0 : size_t(shape.rows) * shape.columns;
    const size_t numbers =
        (kBoxRows + labels + 3 + count) * stride + padded(layer.columns) + transposed;
    const size_t bytes = state_size(shape.rows, shape.columns);
    scratch.reset(numbers * sizeof(scalar_t) + bytes, 9);

    const Rows<scalar_t> rows = {scratch.take<scalar_t>(size_t(count) * stride), stride};
    status[problem] = costs(layer, image, group, scratch, rows);
    if (status[problem] != 0) {
      if (problems.non_finite.policy == NonFinitePolicy::kError) {
        status[problem] |= kNoResult;
        return;
      }
      replace_non_finite(OneLane(), CostRows<scalar_t>{rows.data, stride, count}, count, size,
                         problems.non_finite);
    }
    const AssignmentState state = place(scratch.take<char>(bytes), shape.rows, shape.columns);
    if (!solve_by(solver_rows(shape, rows, count, scratch), state)) {
      status[problem] |= kInfeasible | kNoResult;
      return;
    }
    const int* const query_of_slot =
        shape.targets_are_rows ? state.column_of_row : state.row_of_column;
    double sum = 0;
    for (int slot = 0; slot < slots; ++slot) {
      const int query = query_of_slot[slot], t = slot % count;
      if (query == kFree) continue;
      queries[slot / count * width + t] = group * size + query;
      targets[query] = t;
      sum += rows[t][query];
    }
    total[problem] = scalar_t(sum);
  }
};

template <typename scalar_t>
std::vector<ImageTargets<scalar_t>> all_image_targets(const MatchInputs& inputs, int width) {
  const Tensor labels = dense(inputs.labels), boxes = dense(inputs.target_boxes);
  const int* counts = inputs.count.const_data_ptr<int>();
  std::vector<ImageTargets<scalar_t>> images;
  dispatch_floating_or_half(boxes.scalar_type(), [&](auto zero) {
    using element_t = decltype(zero);
    const auto* box_data = static_cast<const element_t*>(boxes.const_data_ptr());
    const auto* label_data = labels.const_data_ptr<int64_t>();
    for (int64_t image = 0; image < labels.size(0); ++image) {
      const int count = std::clamp(counts[image * inputs.count.stride(0)], 0, width);
      images.push_back(
          image_targets<scalar_t>(label_data + image * width, box_data + image * width * 4, count));
    }
  });
  return images;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hungarian_match_cpu(
    std::vector<Tensor> logits, std::vector<Tensor> boxes, const Tensor& labels,
    const Tensor& target_boxes, const Tensor& count, std::vector<Tensor> extra_cost,
    std::vector<double> weights, int64_t class_cost, std::vector<double> class_options,
    int64_t groups, int64_t repeat, bool scipy_ties, int64_t non_finite,
    std::vector<double> replacement) {
  const MatchInputs inputs = {logits, boxes, extra_cost, labels, target_boxes, count};
  const MatchProblems problems = check_match(inputs, weights, class_cost, class_options, groups,
                                             repeat, scipy_ties, non_finite, replacement);
  const MatchOutputs outputs = new_match_outputs(problems, logits[0]);
  std::vector<MatchLayer> layers;
  int64_t most_numbers = 1;
  for (int i = 0; i < problems.layers; ++i) {
    layers.push_back({layer_input(logits[i].const_data_ptr(), logits[i]),
                      layer_input(boxes[i].const_data_ptr(), boxes[i]), LayerInput{},
                      int(logits[i].size(1)), int(logits[i].size(2))});
    if (!extra_cost.empty()) {
      layers[i].extra = layer_input(extra_cost[i].const_data_ptr(), extra_cost[i]);
    }
    most_numbers =
        std::max(most_numbers, logits[i].size(1) / groups * (logits[i].size(2) + problems.targets));
  }
  dispatch_floating_or_half(logits[0].scalar_type(), [&](auto zero) {
    using source_t = decltype(zero);
    using scalar_t = arithmetic_t<source_t>;
    const HungarianMatch<source_t> call = {
        problems,
        layers,
        boxes[0].scalar_type(),
        (extra_cost.empty() ? boxes[0] : extra_cost[0]).scalar_type(),
        formula_as<scalar_t>(problems.formula),
        all_image_targets<scalar_t>(inputs, problems.targets),
        outputs.query_of_target.mutable_data_ptr<int64_t>(),
        outputs.target_of_query.mutable_data_ptr<int64_t>(),
        outputs.cost.mutable_data_ptr<scalar_t>(),
        outputs.status.mutable_data_ptr<int>()};
    const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / most_numbers);
    torch::stable::parallel_for(0, problems.problems(), grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t problem = begin; problem < end; ++problem) call.match(problem, scratch);
    });
  });
  return {outputs.query_of_target, outputs.target_of_query, outputs.cost, outputs.status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, CPU, m) {
  m.impl("hungarian_match", TORCH_BOX(&hungarian_match_cpu));
}

}  // namespace detr_fast
