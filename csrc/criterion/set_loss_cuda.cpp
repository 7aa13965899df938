// SPDX-License-Identifier: Apache-2.0
// Host side of set_loss and its gradient on CUDA: checks, allocation, launch. Compiled by the host
// compiler alone. It reads nothing back and waits for nothing.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/device_element.h"
#include "common/library.h"
#include "criterion/set_loss.h"
#include "criterion/set_loss_kernels.h"

namespace detr_fast {
namespace {

std::optional<Tensor> dense_or_none(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(dense(*tensor)) : std::nullopt;
}

// Contiguous but for the layers, which kernels read in any strides.
SetLossInputs laid_out(const SetLossInputs& in) {
  return {in.logits,
          in.boxes,
          dense(in.labels),
          dense(in.target_boxes),
          dense(in.count),
          dense(in.target_of_query),
          dense_or_none(in.status),
          dense_or_none(in.class_weight),
          in.num_boxes};
}

template <typename T>
const T* read_optional(const DeviceScope& device, const std::optional<Tensor>& tensor) {
  return tensor ? device.read<T>(*tensor) : nullptr;
}

// Whether LossLayer::by_four holds.
bool by_four(const LayerInput& logits, const Tensor& tensor) {
  const size_t bytes = std::min<size_t>(4 * tensor.element_size(), 16);
  return logits.column_step == 1 && tensor.size(2) % 4 == 0 && logits.image_step % 4 == 0 &&
         logits.query_step % 4 == 0 && reinterpret_cast<uintptr_t>(logits.data) % bytes == 0;
}

template <typename scalar_t>
LossArguments<scalar_t> common_arguments(const DeviceScope& device, const SetLossProblems& problems,
                                         const SetLossInputs& inputs) {
  LossArguments<scalar_t> arguments = {};
  arguments.logits_type = element_type(inputs.logits[0]);
  arguments.boxes_type = element_type(inputs.boxes[0]);
  arguments.target_boxes_type = element_type(inputs.target_boxes);
  arguments.images = problems.images;
  arguments.targets = problems.targets;
  arguments.most_queries = problems.most_queries;
  arguments.chunks = (problems.most_queries + kChunkQueries - 1) / kChunkQueries;
  arguments.labels = device.read<int64_t>(inputs.labels);
  arguments.target_boxes = read_elements(device, inputs.target_boxes);
  arguments.count = device.read<int>(inputs.count);
  arguments.target_of_query = device.read<int64_t>(inputs.target_of_query);
  arguments.class_weight = read_optional<scalar_t>(device, inputs.class_weight);
  arguments.formula = formula_as<scalar_t>(problems.formula);
  return arguments;
}

// Calls launch(first layer, layers) for as many layers at a time as a launch takes.
template <typename scalar_t, typename Launch>
void each_launch(const DeviceScope& device, const SetLossProblems& problems,
                 const SetLossInputs& inputs, LossArguments<scalar_t>& arguments,
                 const Launch& launch) {
  for (int first = 0; first < problems.layers; first += kMostLayers) {
    const int layers = std::min(problems.layers - first, kMostLayers);
    for (int i = 0; i < layers; ++i) {
      const Tensor &logits = inputs.logits[first + i], &boxes = inputs.boxes[first + i];
      LossLayer& layer = arguments.layers[i];
      layer.logits = read_layer(device, logits);
      layer.boxes = read_layer(device, boxes);
      layer.queries = int(logits.size(1));
      layer.columns = int(logits.size(2));
      layer.by_four = by_four(layer.logits, logits);
    }
    launch(first, layers);
    arguments.target_of_query += int64_t(layers) * problems.images * problems.most_queries;
  }
  device.check_launch();
}

template <typename scalar_t>
void forward(const SetLossProblems& problems, const SetLossInputs& inputs,
             const SetLossOutputs& outputs) {
  const DeviceScope device(inputs.logits[0]);
  auto arguments = common_arguments<scalar_t>(device, problems, inputs);
  const int64_t rows_at_once = int64_t(problems.images) * std::min(problems.layers, kMostLayers);
  const Tensor workspace = torch::stable::new_empty(
      inputs.labels, {rows_at_once * arguments.chunks, int64_t(sizeof(QuerySums))},
      torch::headeronly::ScalarType::Byte);
  LossResults<scalar_t> results = {};
  results.status = read_optional<int>(device, inputs.status);
  results.groups = inputs.status ? int(inputs.status->size(2)) : 0;
  results.num_boxes = read_optional<scalar_t>(device, inputs.num_boxes);
  results.sums = reinterpret_cast<QuerySums*>(device.scratch<unsigned char>(workspace));
  results.losses = device.write<scalar_t>(outputs.losses);
  results.softmax = device.write<scalar_t>(outputs.softmax);
  results.divisor = device.write<scalar_t>(outputs.divisor);
  each_launch(device, problems, inputs, arguments, [&](int, int layers) {
    launch_set_loss(arguments, results, layers, device.stream());
    const int64_t rows = int64_t(layers) * problems.images;
    results.status += rows * results.groups;
    results.losses += layers * kLossColumns;
    results.softmax += rows * problems.most_queries * 2;
    results.divisor += layers * kDivisorColumns;
  });
}

std::tuple<Tensor, Tensor, Tensor> set_loss_cuda(
    std::vector<Tensor> logits, std::vector<Tensor> boxes, const Tensor& labels,
    const Tensor& target_boxes, const Tensor& count, const Tensor& target_of_query,
    std::optional<Tensor> status, std::optional<Tensor> class_weight,
    std::optional<Tensor> num_boxes, int64_t class_loss, double alpha, double gamma) {
  const SetLossInputs inputs = {logits,          boxes,  labels,       target_boxes, count,
                                target_of_query, status, class_weight, num_boxes};
  const SetLossProblems problems = check_set_loss(inputs, class_loss, alpha, gamma);
  const SetLossOutputs outputs = new_set_loss_outputs(problems, logits[0]);
  if (arithmetic_type(logits[0]) == torch::headeronly::ScalarType::Double) {
    forward<double>(problems, laid_out(inputs), outputs);
  } else {
    forward<float>(problems, laid_out(inputs), outputs);
  }
  return {outputs.losses, outputs.softmax, outputs.divisor};
}

template <typename scalar_t>
void backward(const SetLossProblems& problems, const SetLossInputs& inputs, const Tensor& grad,
              const Tensor& softmax, const Tensor& divisor, const std::vector<Tensor>& grad_logits,
              const std::vector<Tensor>& grad_boxes) {
  const DeviceScope device(inputs.logits[0]);
  auto arguments = common_arguments<scalar_t>(device, problems, inputs);
  LossGradients<scalar_t> gradients = {};
  gradients.grad = device.read<scalar_t>(grad);
  gradients.softmax = device.read<scalar_t>(softmax);
  gradients.divisor = device.read<scalar_t>(divisor);
  gradients.needs_logits = !grad_logits.empty();
  gradients.needs_boxes = !grad_boxes.empty();
  each_launch(device, problems, inputs, arguments, [&](int first, int layers) {
    for (int i = 0; i < layers; ++i) {
      if (gradients.needs_logits) {
        gradients.logits[i] = write_elements(device, grad_logits[first + i]);
      }
      if (gradients.needs_boxes) {
        gradients.boxes[i] = write_elements(device, grad_boxes[first + i]);
      }
    }
    launch_set_loss_backward(arguments, gradients, layers, device.stream());
    gradients.grad += layers * kLossColumns;
    gradients.softmax += int64_t(layers) * problems.images * problems.most_queries * 2;
    gradients.divisor += layers * kDivisorColumns;
  });
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> set_loss_backward_cuda(
    const Tensor& grad, std::vector<Tensor> logits, std::vector<Tensor> boxes, const Tensor& labels,
    const Tensor& target_boxes, const Tensor& count, const Tensor& target_of_query,
    std::optional<Tensor> class_weight, const Tensor& softmax, const Tensor& divisor,
    int64_t class_loss, double alpha, double gamma, bool needs_logits, bool needs_boxes) {
  const SetLossInputs inputs = {logits, boxes,        labels, target_boxes, count, target_of_query,
                                {},     class_weight, {}};
  const SetLossProblems problems = check_set_loss(inputs, class_loss, alpha, gamma);
  check_set_loss_backward(problems, grad, softmax, divisor, logits[0]);
  LayerGradients grad_logits, grad_boxes;
  if (needs_logits) grad_logits = LayerGradients(logits);
  if (needs_boxes) grad_boxes = LayerGradients(boxes);
  if (needs_logits || needs_boxes) {
    const SetLossInputs dense_inputs = laid_out(inputs);
    const Tensor weights = dense(grad), saved = dense(softmax), by = dense(divisor);
    if (arithmetic_type(logits[0]) == torch::headeronly::ScalarType::Double) {
      backward<double>(problems, dense_inputs, weights, saved, by, grad_logits.layers,
                       grad_boxes.layers);
    } else {
      backward<float>(problems, dense_inputs, weights, saved, by, grad_logits.layers,
                      grad_boxes.layers);
    }
  }
  return {grad_logits.results, grad_boxes.results};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, DETR_FAST_CUDA_KEY, m) {
  m.impl("set_loss", TORCH_BOX(&set_loss_cuda));
  m.impl("set_loss_backward", TORCH_BOX(&set_loss_backward_cuda));
}

}  // namespace detr_fast
