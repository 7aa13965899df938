// SPDX-License-Identifier: Apache-2.0
// Host side of hungarian_match on CUDA: checks, allocation, launch. Compiled by the host compiler
// alone. It reads nothing back and waits for nothing.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/device_element.h"
#include "common/library.h"
#include "matcher/matcher.h"
#include "matcher/matcher_kernels.h"

namespace detr_fast {
namespace {

// Shared memory of a block and workspace of a problem: none where the shared memory suffices even
// if no target is padding.
template <typename scalar_t>
void plan_memory(const MatchProblems& problems, const std::vector<Tensor>& logits,
                 MatchArguments<scalar_t>& arguments) {
  size_t most = 0;
  for (const Tensor& layer : logits) {
    const int queries = int(layer.size(1)) / problems.groups;
    most = std::max(
        most, match_bytes<scalar_t>(problems.ties, queries, problems.targets, problems.repeat));
  }
  arguments.shared_bytes = std::min(most, match_shared_limit());
  arguments.workspace_bytes = most > arguments.shared_bytes ? most : 0;
}

template <typename scalar_t>
void match_layers(const MatchInputs& inputs, const MatchProblems& problems,
                  const MatchOutputs& outputs) {
  using torch::headeronly::ScalarType;
  const DeviceScope device(inputs.labels);
  const Tensor labels = dense(inputs.labels), target_boxes = dense(inputs.target_boxes);
  const Tensor count = dense(inputs.count);
  MatchArguments<scalar_t> arguments = {};
  plan_memory(problems, inputs.logits, arguments);
  const int64_t of_layer = int64_t(problems.images) * problems.groups;
  const int64_t at_once = of_layer * std::min(problems.layers, kMostLayers);
  const Tensor workspace = torch::stable::new_empty(
      inputs.labels, {at_once, int64_t(arguments.workspace_bytes)}, ScalarType::Byte);
  arguments.workspace = device.scratch<unsigned char>(workspace);
  arguments.logits_type = element_type(inputs.logits[0]);
  arguments.boxes_type = element_type(inputs.boxes[0]);
  arguments.target_boxes_type = element_type(target_boxes);
  arguments.images = problems.images;
  arguments.groups = problems.groups;
  arguments.repeat = problems.repeat;
  arguments.targets = problems.targets;
  arguments.most_queries = problems.most_queries;
  arguments.labels = device.read<int64_t>(labels);
  arguments.target_boxes = read_elements(device, target_boxes);
  arguments.count = device.read<int>(count);
  arguments.formula = formula_as<scalar_t>(problems.formula);
  arguments.non_finite = problems.non_finite;
  arguments.query_of_target = device.write<int64_t>(outputs.query_of_target);
  arguments.target_of_query = device.write<int64_t>(outputs.target_of_query);
  arguments.total = device.write<scalar_t>(outputs.cost);
  arguments.status = device.write<int>(outputs.status);
  if (!inputs.extra_cost.empty()) arguments.extra_type = element_type(inputs.extra_cost[0]);
  for (int first = 0; first < problems.layers; first += kMostLayers) {
    const int layers = std::min(problems.layers - first, kMostLayers);
    for (int i = 0; i < layers; ++i) {
      const Tensor& logits = inputs.logits[first + i];
      MatchLayer& layer = arguments.layers[i];
      layer.logits = read_layer(device, logits);
      layer.boxes = read_layer(device, inputs.boxes[first + i]);
      if (!inputs.extra_cost.empty())
        layer.extra = read_layer(device, inputs.extra_cost[first + i]);
      layer.queries = int(logits.size(1));
      layer.columns = int(logits.size(2));
    }
    launch_hungarian_match(arguments, problems.ties, layers,
                           problems.most_queries / problems.groups, device.stream());
    arguments.query_of_target += layers * of_layer * problems.slots();
    arguments.target_of_query += int64_t(layers) * problems.images * problems.most_queries;
    arguments.total += layers * of_layer;
    arguments.status += layers * of_layer;
  }
  device.check_launch();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hungarian_match_cuda(
    std::vector<Tensor> logits, std::vector<Tensor> boxes, const Tensor& labels,
    const Tensor& target_boxes, const Tensor& count, std::vector<Tensor> extra_cost,
    std::vector<double> weights, int64_t class_cost, std::vector<double> class_options,
    int64_t groups, int64_t repeat, bool scipy_ties, int64_t non_finite,
    std::vector<double> replacement) {
  const MatchInputs inputs = {logits, boxes, extra_cost, labels, target_boxes, count};
  const MatchProblems problems = check_match(inputs, weights, class_cost, class_options, groups,
                                             repeat, scipy_ties, non_finite, replacement);
  const MatchOutputs outputs = new_match_outputs(problems, logits[0]);
  if (problems.images > 0) {
    if (outputs.cost.scalar_type() == torch::headeronly::ScalarType::Double) {
      match_layers<double>(inputs, problems, outputs);
    } else {
      match_layers<float>(inputs, problems, outputs);
    }
  }
  return {outputs.query_of_target, outputs.target_of_query, outputs.cost, outputs.status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, DETR_FAST_CUDA_KEY, m) {
  m.impl("hungarian_match", TORCH_BOX(&hungarian_match_cuda));
}

}  // namespace detr_fast
