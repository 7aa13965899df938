// SPDX-License-Identifier: Apache-2.0
// CPU twin of set_loss and its gradient: threads over the images of all layers.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "boxes/box_math.h"
#include "common/dispatch.h"
#include "common/library.h"
#include "criterion/class_rows.h"
#include "criterion/set_loss.h"

namespace detr_fast {
namespace {

// The fewest logits that are worth another thread (about 10 us of work).
constexpr int64_t kLogitsPerThread = 8192;

// The number at `data`, of any of the four types.
template <typename scalar_t>
scalar_t number_at(const void* data, torch::headeronly::ScalarType type, int64_t index) {
  scalar_t value = 0;
  dispatch_floating_or_half(type, [&](auto zero) {
    value = as<scalar_t>(static_cast<const decltype(zero)*>(data)[index]);
  });
  return value;
}

template <typename scalar_t>
Box<scalar_t> box_at(const void* data, torch::headeronly::ScalarType type, int64_t index,
                     int64_t step) {
  return {number_at<scalar_t>(data, type, index), number_at<scalar_t>(data, type, index + step),
          number_at<scalar_t>(data, type, index + 2 * step),
          number_at<scalar_t>(data, type, index + 3 * step)};
}

struct Layer {
  LayerInput logits, boxes;
  int queries, columns;
};

// What a call of either op reads; source_t is the element type of the logits.
template <typename source_t>
struct SetLoss {
  using scalar_t = arithmetic_t<source_t>;

  const SetLossProblems& problems;
  const SetLossInputs& inputs;
  ClassLossFormula<scalar_t> formula;
  Tensor labels, target_boxes, target_of_query;  // contiguous
  std::vector<Layer> layers;
  std::vector<int> counts;
  std::vector<scalar_t> class_weight;  // of each column; none: 1

  SetLoss(const SetLossProblems& p, const SetLossInputs& in)
      : problems(p),
        inputs(in),
        formula(formula_as<scalar_t>(p.formula)),
        labels(dense(in.labels)),
        target_boxes(dense(in.target_boxes)),
        target_of_query(dense(in.target_of_query)) {
    for (int i = 0; i < p.layers; ++i) {
      const Tensor &logits = in.logits[i], &boxes = in.boxes[i];
      layers.push_back({layer_input(logits.const_data_ptr(), logits),
                        layer_input(boxes.const_data_ptr(), boxes), int(logits.size(1)),
                        int(logits.size(2))});
    }
    const int* const count = in.count.const_data_ptr<int>();
    for (int image = 0; image < p.images; ++image) {
      counts.push_back(std::clamp(count[image * in.count.stride(0)], 0, p.targets));
    }
    for (int c = 0; in.class_weight && c < layers[0].columns; ++c) {
      class_weight.push_back(
          in.class_weight->const_data_ptr<scalar_t>()[c * in.class_weight->stride(0)]);
    }
  }

  scalar_t weight_of(int column) const {
    return class_weight.empty() ? scalar_t(1) : class_weight[column];
  }

  scalar_t num_boxes() const {
    if (inputs.num_boxes) return *inputs.num_boxes->const_data_ptr<scalar_t>();
    int64_t sum = 0;
    for (const int count : counts) sum += count;
    return scalar_t(std::max<int64_t>(sum, 1));
  }

  const int64_t* targets_of(int layer, int image) const {
    const int64_t row = int64_t(layer) * problems.images + image;
    return target_of_query.const_data_ptr<int64_t>() + row * problems.most_queries;
  }

  Box<scalar_t> target_box(int image, int64_t target) const {
    const int64_t index = int64_t(image) * problems.targets + target;
    return box_at<scalar_t>(target_boxes.const_data_ptr(), target_boxes.scalar_type(), index * 4,
                            1);
  }

  Box<scalar_t> query_box(int layer, int image, int query) const {
    const LayerInput& boxes = layers[layer].boxes;
    return box_at<scalar_t>(boxes.data, inputs.boxes[0].scalar_type(),
                            image * boxes.image_step + query * boxes.query_step, boxes.column_step);
  }

  void load_row(int layer, int image, int query, scalar_t* row) const {
    const LayerInput& logits = layers[layer].logits;
    const source_t* const data = static_cast<const source_t*>(logits.data) +
                                 image * logits.image_step + query * logits.query_step;
    const int size = layers[layer].columns;
    if (logits.column_step == 1) {
      for (int c = 0; c < size; ++c) row[c] = as<scalar_t>(data[c]);
    } else {
      for (int c = 0; c < size; ++c) row[c] = as<scalar_t>(data[c * logits.column_step]);
    }
    std::fill(row + size, row + padded(size), -scalar_t(kInfinity));
  }

  // The column of a query's class; -1 if it is free, or its target or label is none.
  int column_of(int layer, int image, int64_t target) const {
    if (target < 0 || target >= counts[image]) return -1;
    const int64_t label =
        labels.const_data_ptr<int64_t>()[int64_t(image) * problems.targets + target];
    const int classes = layers[layer].columns - (problems.cross_entropy() ? 1 : 0);
    return label >= 0 && label < classes ? int(label) : -1;
  }

  Term<scalar_t> matched_term(scalar_t x, scalar_t quality) const {
    Term<scalar_t> term;
    dispatch_sigmoid(formula, [&](auto kind, auto squared) {
      term = positive_term<kind(), squared()>(x, quality, formula);
    });
    return term;
  }

  scalar_t quality_of(int layer, int image, int query, int64_t target) const {
    if (formula.kind != ClassLossKind::kVarifocal) return 1;
    return similarity<Hull::kNone>(corners_of(query_box(layer, image, query)),
                                   corners_of(target_box(image, target)), scalar_t(0));
  }

  QuerySums forward(int layer, int image, scalar_t* row, scalar_t* softmax) const {
    const int64_t* const targets = targets_of(layer, image);
    const int size = layers[layer].columns, filled = padded(size);
    QuerySums sums = {};
    for (int q = 0; q < layers[layer].queries; ++q) {
      const int64_t target = targets[q];
      const int column = column_of(layer, image, target);
      load_row(layer, image, q, row);
      int best;
      if (problems.cross_entropy()) {
        const int expected = column >= 0 ? column : size - 1;
        const scalar_t logit = row[expected], weight = weight_of(expected);
        const Softmax<scalar_t> s = softmax_row(row, size, filled);
        softmax[2 * q] = s.most;
        softmax[2 * q + 1] = s.log_sum;
        sums.class_loss += weight * (s.log_sum - (logit - s.most));
        sums.weight += weight;
        best = s.best;
      } else {
        best = argmax_of_row(row, size, filled);
        const scalar_t positive =
            column >= 0 ? matched_term(row[column], quality_of(layer, image, q, target)).loss
                        : scalar_t(0);
        dispatch_sigmoid(formula, [&](auto kind, auto squared) {
          sums.class_loss += sigmoid_loss<kind(), squared()>(formula, size, column, positive, row);
        });
      }
      sums.predicted += best != size - 1;
      if (column < 0) {
        sums.wrong += target >= 0;
        continue;
      }
      const BoxLosses<scalar_t> losses =
          matched_box_losses(query_box(layer, image, q), target_box(image, target));
      sums.bbox += losses.l1;
      sums.giou += losses.giou;
      ++sums.matched;
      sums.correct += best == column;
    }
    std::fill(softmax + softmax_size(layers[layer].queries), softmax + softmax_size(), scalar_t(0));
    return sums;
  }

  // Numbers of an image in the tensor `softmax`.
  int64_t softmax_size(int queries) const { return problems.cross_entropy() ? 2 * queries : 0; }
  int64_t softmax_size() const { return softmax_size(problems.most_queries); }

  // Writes the gradient of the logits of one image; `scale` is that of the sum of the losses.
  void logits_backward(int layer, int image, scalar_t scale, const scalar_t* softmax, scalar_t* row,
                       source_t* out) const {
    const int64_t* const targets = targets_of(layer, image);
    const int size = layers[layer].columns;
    for (int q = 0; q < layers[layer].queries; ++q, out += size) {
      const int64_t target = targets[q];
      const int column = column_of(layer, image, target);
      load_row(layer, image, q, row);
      if (problems.cross_entropy()) {
        const int expected = column >= 0 ? column : size - 1;
        const scalar_t weight = scale * weight_of(expected);
        softmax_slopes(weight, softmax[2 * q], softmax[2 * q + 1], size, row);
        row[expected] -= weight;
      } else {
        const scalar_t slope =
            column >= 0 ? matched_term(row[column], quality_of(layer, image, q, target)).slope
                        : scalar_t(0);
        dispatch_sigmoid(formula, [&](auto kind, auto squared) {
          sigmoid_slopes<kind(), squared()>(formula, scale, size, row);
        });
        if (column >= 0) row[column] = scale * slope;
      }
      for (int c = 0; c < size; ++c) out[c] = static_cast<source_t>(row[c]);
    }
  }

  // The same of the boxes; `scale` is that of the sums of both losses.
  template <typename element_t>
  void boxes_backward(int layer, int image, BoxLosses<scalar_t> scale, element_t* out) const {
    const int64_t* const targets = targets_of(layer, image);
    for (int q = 0; q < layers[layer].queries; ++q, out += 4) {
      const int64_t target = targets[q];
      Box<scalar_t> slope = {0, 0, 0, 0};
      if (column_of(layer, image, target) >= 0) {
        slope = matched_box_losses_gradient(query_box(layer, image, q), target_box(image, target),
                                            scale)
                    .first;
      }
      out[0] = static_cast<element_t>(slope.x0);
      out[1] = static_cast<element_t>(slope.y0);
      out[2] = static_cast<element_t>(slope.x1);
      out[3] = static_cast<element_t>(slope.y1);
    }
  }

  // Calls body(layer, image, room for a row) for the images of all layers, on several threads.
  template <typename Body>
  void each_image(const Body& body) const {
    int most_columns = 0;
    for (const Layer& layer : layers) most_columns = std::max(most_columns, layer.columns);
    const int64_t logits = std::max<int64_t>(1, int64_t(problems.most_queries) * most_columns);
    const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / logits);
    torch::stable::parallel_for(
        0, int64_t(problems.layers) * problems.images, grain, [&](int64_t begin, int64_t end) {
          std::vector<scalar_t> row(padded(most_columns));
          for (int64_t i = begin; i < end; ++i) {
            body(int(i / problems.images), int(i % problems.images), row.data());
          }
        });
  }
};

template <typename source_t>
void forward(const SetLossProblems& problems, const SetLossInputs& inputs,
             const SetLossOutputs& outputs) {
  using scalar_t = arithmetic_t<source_t>;
  const SetLoss<source_t> call(problems, inputs);
  scalar_t* const softmax = outputs.softmax.mutable_data_ptr<scalar_t>();
  std::vector<QuerySums> sums(size_t(problems.layers) * problems.images);
  call.each_image([&](int layer, int image, scalar_t* row) {
    const int64_t index = int64_t(layer) * problems.images + image;
    sums[index] = call.forward(layer, image, row, softmax + index * call.softmax_size());
  });
  const scalar_t num_boxes = call.num_boxes();
  for (int layer = 0; layer < problems.layers; ++layer) {
    LayerSums total = {};
    for (int image = 0; image < problems.images; ++image) {
      int bits = 0;
      if (inputs.status) {
        const Tensor& status = *inputs.status;
        const int* const of_image =
            status.const_data_ptr<int>() + layer * status.stride(0) + image * status.stride(1);
        for (int64_t g = 0; g < status.size(2); ++g) bits |= of_image[g * status.stride(2)];
      }
      const QuerySums& of_image = sums[size_t(layer) * problems.images + image];
      total = sum_of(total, image_sums(of_image, call.counts[image], bits));
    }
    write_layer(total, problems.cross_entropy(), problems.images, num_boxes,
                outputs.losses.mutable_data_ptr<scalar_t>() + layer * kLossColumns,
                outputs.divisor.mutable_data_ptr<scalar_t>() + layer * kDivisorColumns);
  }
}

std::tuple<Tensor, Tensor, Tensor> set_loss_cpu(
    std::vector<Tensor> logits, std::vector<Tensor> boxes, const Tensor& labels,
    const Tensor& target_boxes, const Tensor& count, const Tensor& target_of_query,
    std::optional<Tensor> status, std::optional<Tensor> class_weight,
    std::optional<Tensor> num_boxes, int64_t class_loss, double alpha, double gamma) {
  const SetLossInputs inputs = {logits,          boxes,  labels,       target_boxes, count,
                                target_of_query, status, class_weight, num_boxes};
  const SetLossProblems problems = check_set_loss(inputs, class_loss, alpha, gamma);
  const SetLossOutputs outputs = new_set_loss_outputs(problems, logits[0]);
  dispatch_floating_or_half(logits[0].scalar_type(),
                            [&](auto zero) { forward<decltype(zero)>(problems, inputs, outputs); });
  return {outputs.losses, outputs.softmax, outputs.divisor};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> set_loss_backward_cpu(
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
  const Tensor weights = dense(grad), saved = dense(softmax), by = dense(divisor);
  dispatch_floating_or_half(logits[0].scalar_type(), [&](auto zero) {
    using source_t = decltype(zero);
    using scalar_t = arithmetic_t<source_t>;
    const SetLoss<source_t> call(problems, inputs);
    call.each_image([&](int layer, int image, scalar_t* row) {
      const scalar_t* const losses = weights.const_data_ptr<scalar_t>() + layer * kLossColumns;
      const scalar_t* const divisors = by.const_data_ptr<scalar_t>() + layer * kDivisorColumns;
      const int64_t queries = call.layers[layer].queries;
      if (needs_logits) {
        const int64_t at = int64_t(layer) * problems.images + image;
        auto* out = static_cast<source_t*>(grad_logits.layers[layer].mutable_data_ptr());
        call.logits_backward(layer, image, losses[kClassLoss] / divisors[kClassDivisor],
                             saved.const_data_ptr<scalar_t>() + at * call.softmax_size(), row,
                             out + image * queries * call.layers[layer].columns);
      }
      if (needs_boxes) {
        const BoxLosses<scalar_t> scale = {losses[kBoxLoss] / divisors[kBoxDivisor],
                                           losses[kGiouLoss] / divisors[kBoxDivisor]};
        dispatch_floating_or_half(boxes[layer].scalar_type(), [&](auto box_zero) {
          auto* out = static_cast<decltype(box_zero)*>(grad_boxes.layers[layer].mutable_data_ptr());
          call.boxes_backward(layer, image, scale, out + image * queries * 4);
        });
      }
    });
  });
  return {grad_logits.results, grad_boxes.results};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, CPU, m) {
  m.impl("set_loss", TORCH_BOX(&set_loss_cpu));
  m.impl("set_loss_backward", TORCH_BOX(&set_loss_backward_cpu));
}

}  // namespace detr_fast
