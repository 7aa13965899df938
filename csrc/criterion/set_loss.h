// SPDX-License-Identifier: Apache-2.0
// Contract of set_loss and its gradient, and the checks that the CPU and CUDA versions share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/layout.h"
#include "criterion/set_sums.h"

namespace detr_fast {

// set_loss(logits L x (B, Q, C), boxes L x (B, Q, 4), labels (B, T) int64, target_boxes (B, T, 4),
//          count (B,) int32, target_of_query (L, B, largest Q) int64, status none or (L, B, *)
//          int32, class_weight none or (C,), num_boxes none or (), class_loss, alpha, gamma)
//     -> losses (L, kLossColumns), softmax (L, B, largest Q, 2), or (L, B, 0, 2) without
//        cross-entropy, divisor (L, kDivisorColumns)
//   target_of_query is negative where a query is free. Layers may differ in Q and C. The logits,
//   all of one type, decide the arithmetic and the type of all results: double for double, float
//   for float, half and bfloat16; class_weight and num_boxes have it already. Boxes may be of any
//   of these types; all may lie in any strides. Targets from count[b] on are not read; a count
//   below 0 is read as 0, one above T as T. num_boxes is by default the sum of the counts, 1 at
//   least. softmax holds the largest logit of each query and the logarithm of the sum of the
//   exponentials less it: one number would lose what matters where logits are large.
//   The losses of a layer and their divisors are NaN if a status has kNoResult, a target is at
//   count[b] or beyond, or its label is no class: a column, other than the last one for
//   cross-entropy.
// set_loss_backward(grad (L, kLossColumns), the inputs, softmax, divisor, ..., needs_logits,
//                   needs_boxes)
//     -> gradients of the logits and of the boxes in their types, contiguous: a list of one tensor
//        (L, B, Q, ...) where all layers are of one shape, of L tensors (B, Q, ...) otherwise, of
//        none where not needed. The columns that count errors have none.
//   No atomics: results depend neither on the schedule nor on the number of threads.
struct SetLossInputs {
  std::vector<Tensor> logits, boxes;
  Tensor labels, target_boxes, count, target_of_query;
  std::optional<Tensor> status, class_weight, num_boxes;
};

struct SetLossProblems {
  int layers, images;
  int targets;       // T
  int most_queries;  // of a layer
  ClassLossFormula<double> formula;

  bool cross_entropy() const { return formula.kind == ClassLossKind::kCrossEntropy; }
};

template <typename scalar_t>
ClassLossFormula<scalar_t> formula_as(const ClassLossFormula<double>& f) {
  return {f.kind, scalar_t(f.positive), scalar_t(f.negative), scalar_t(f.gamma)};
}

inline torch::headeronly::ScalarType arithmetic_type(const Tensor& logits) {
  using torch::headeronly::ScalarType;
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ClassLossFormula<double> check_class_loss(int64_t class_loss, double alpha, double gamma) {
  STD_TORCH_CHECK(class_loss >= 0 && class_loss <= 2, "class_loss: expected 0 to 2, got ",
                  class_loss);
  const auto kind = static_cast<ClassLossKind>(class_loss);
  const bool focal = kind == ClassLossKind::kFocal;
  if (focal && alpha < 0) return {kind, 1, 1, gamma};
  return {kind, alpha, focal ? 1 - alpha : alpha, gamma};
}

// An optional argument of the type of the arithmetic.
inline void check_number(const std::optional<Tensor>& tensor, const char* name,
                         const std::vector<int64_t>& sizes, const Tensor& logits) {
  if (!tensor) return;
  check_shape(*tensor, name, sizes);
  STD_TORCH_CHECK(tensor->scalar_type() == arithmetic_type(logits), name, ": expected dtype ",
                  arithmetic_type(logits), ", got ", tensor->scalar_type());
  check_device(*tensor, name, logits, "logits[0]");
}

inline void check_integers(const Tensor& tensor, const char* name,
                           torch::headeronly::ScalarType type, const std::vector<int64_t>& sizes,
                           const Tensor& logits) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected dtype ", type, ", got ",
                  tensor.scalar_type());
  check_shape(tensor, name, sizes);
  check_device(tensor, name, logits, "logits[0]");
}

inline SetLossProblems check_set_loss(const SetLossInputs& inputs, int64_t class_loss, double alpha,
                                      double gamma) {
  using torch::headeronly::ScalarType;
  const auto& [logits, boxes, labels, target_boxes, count, target_of_query, status, class_weight,
               num_boxes] = inputs;
  const int64_t layers = int64_t(logits.size());
  STD_TORCH_CHECK(layers > 0, "logits: expected at least one layer");
  STD_TORCH_CHECK(int64_t(boxes.size()) == layers, "boxes: expected one tensor for each of the ",
                  layers, " layers of logits, got ", boxes.size());
  const ClassLossFormula<double> formula = check_class_loss(class_loss, alpha, gamma);
  const bool cross_entropy = formula.kind == ClassLossKind::kCrossEntropy;
  check_integers(labels, "labels", ScalarType::Long, {kAnySize, kAnySize}, logits[0]);
  const int64_t images = labels.size(0), targets = labels.size(1);
  check_floating_or_half(target_boxes, "target_boxes");
  check_shape(target_boxes, "target_boxes", {images, targets, 4});
  check_device(target_boxes, "target_boxes", logits[0], "logits[0]");
  check_integers(count, "count", ScalarType::Int, {images}, logits[0]);
  int64_t most_queries = 0;
  for (size_t layer = 0; layer < logits.size(); ++layer) {
    check_layer(logits, layer, "logits", {images, kAnySize, kAnySize}, logits[0]);
    const int64_t queries = logits[layer].size(1), columns = logits[layer].size(2);
    check_layer(boxes, layer, "boxes", {images, queries, 4}, logits[0]);
    STD_TORCH_CHECK(columns > 0, "logits[", layer, "]: expected at least one column");
    most_queries = std::max(most_queries, queries);
    STD_TORCH_CHECK(!class_weight || cross_entropy,
                    "class_weight: only cross-entropy has weights of classes");
    check_number(class_weight, "class_weight", {columns}, logits[0]);
  }
  check_integers(target_of_query, "target_of_query", ScalarType::Long,
                 {layers, images, most_queries}, logits[0]);
  if (status) {
    check_integers(*status, "status", ScalarType::Int, {layers, images, kAnySize}, logits[0]);
  }
  check_number(num_boxes, "num_boxes", {}, logits[0]);
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  STD_TORCH_CHECK(images * layers <= most / std::max<int64_t>(1, most_queries) && targets <= most,
                  "expected at most ", most, " queries, got ", layers, " x ", images, " x ",
                  most_queries);
  return {int(layers), int(images), int(targets), int(most_queries), formula};
}

struct SetLossOutputs {
  Tensor losses, softmax, divisor;
};

inline SetLossOutputs new_set_loss_outputs(const SetLossProblems& p, const Tensor& logits) {
  const auto empty = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_empty(logits, sizes, arithmetic_type(logits));
  };
  return {empty({p.layers, kLossColumns}),
          empty({p.layers, p.images, p.cross_entropy() ? p.most_queries : 0, 2}),
          empty({p.layers, kDivisorColumns})};
}

// What set_loss_backward reads beside the inputs.
inline void check_set_loss_backward(const SetLossProblems& p, const Tensor& grad,
                                    const Tensor& softmax, const Tensor& divisor,
                                    const Tensor& logits) {
  check_number(grad, "grad", {p.layers, kLossColumns}, logits);
  check_number(softmax, "softmax", {p.layers, p.images, p.cross_entropy() ? p.most_queries : 0, 2},
               logits);
  check_number(divisor, "divisor", {p.layers, kDivisorColumns}, logits);
}

// The gradients of `layers`: one block of memory (L, ...) where all are of one shape, so that
// whoever stacks them again has nothing to copy. An op must not return its slices, which are one
// tensor's.
struct LayerGradients {
  std::vector<Tensor> results;  // what the op returns: the block, or a tensor for each layer
  std::vector<Tensor> layers;

  LayerGradients() = default;  // not needed

  explicit LayerGradients(const std::vector<Tensor>& like) {
    const auto first = like[0].sizes();
    const bool alike = std::all_of(like.begin(), like.end(), [&](const Tensor& layer) {
      const auto sizes = layer.sizes();
      return std::equal(sizes.begin(), sizes.end(), first.begin());
    });
    if (!alike) {
      for (const Tensor& layer : like) {
        layers.push_back(torch::stable::new_empty(layer, layer.sizes()));
      }
      results = layers;
      return;
    }
    std::vector<int64_t> sizes = {int64_t(like.size())};
    sizes.insert(sizes.end(), first.begin(), first.end());
    results.push_back(torch::stable::new_empty(like[0], sizes));
    for (size_t i = 0; i < like.size(); ++i) {
      layers.push_back(torch::stable::select(results[0], 0, int64_t(i)));
    }
  }
};

}  // namespace detr_fast
