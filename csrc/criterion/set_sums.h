// SPDX-License-Identifier: Apache-2.0
// From the sums over a layer's queries to its losses, for the CPU twin and the CUDA kernels.
#pragma once

#include <cstdint>

#include "boxes/box_math.h"
#include "common/host_device.h"
#include "common/match_status.h"
#include "criterion/class_loss.h"

namespace detr_fast {

// Columns of the result.
enum LossColumn { kClassLoss, kBoxLoss, kGiouLoss, kCardinalityError, kClassError, kLossColumns };
// Columns of the divisors: of the class loss and of both box losses.
enum DivisorColumn { kClassDivisor, kBoxDivisor, kDivisorColumns };

// What some queries of an image add to the losses of their layer. In double: a sum of thousands of
// floats would lose a digit, and there are only few additions. Start from {}: without initial
// values of their own the sums may lie in shared memory.
struct QuerySums {
  double class_loss, weight, bbox, giou;
  int matched, correct;  // of the matched queries, those whose largest logit is their class
  int predicted;         // queries whose largest logit is not the last one
  int wrong;             // targets or labels that there are not
};

DETR_FAST_HOST_DEVICE QuerySums sum_of(const QuerySums& a, const QuerySums& b) {
  return {a.class_loss + b.class_loss,
          a.weight + b.weight,
          a.bbox + b.bbox,
          a.giou + b.giou,
          a.matched + b.matched,
          a.correct + b.correct,
          a.predicted + b.predicted,
          a.wrong + b.wrong};
}

// The sums over images; `cardinality` is that of the errors of each of them.
struct LayerSums {
  QuerySums queries;
  int64_t cardinality;
  int64_t targets;
  int64_t failed;  // images that matching has no result for
};

DETR_FAST_HOST_DEVICE LayerSums sum_of(const LayerSums& a, const LayerSums& b) {
  return {sum_of(a.queries, b.queries), a.cardinality + b.cardinality, a.targets + b.targets,
          a.failed + b.failed};
}

// One image; `status` has the bits of all its groups.
DETR_FAST_HOST_DEVICE LayerSums image_sums(const QuerySums& sums, int count, int status) {
  const int error = sums.predicted - count;
  return {sums, error < 0 ? -error : error, count, status & kNoResult ? 1 : 0};
}

// Writes the losses and divisors of a layer. Cross-entropy is divided by the sum of the weights.
template <typename scalar_t>
DETR_FAST_HOST_DEVICE void write_layer(const LayerSums& layer, bool cross_entropy, int images,
                                       scalar_t num_boxes, scalar_t* losses, scalar_t* divisor) {
  const QuerySums& sums = layer.queries;
  const double unknown = __builtin_nan("");
  const bool fine = layer.failed == 0 && sums.wrong == 0;
  const double by_class = fine ? (cross_entropy ? sums.weight : double(num_boxes)) : unknown;
  const double by_boxes = fine ? double(num_boxes) : unknown;
  losses[kClassLoss] = scalar_t(sums.class_loss / by_class);
  losses[kBoxLoss] = scalar_t(sums.bbox / by_boxes);
  losses[kGiouLoss] = scalar_t(sums.giou / by_boxes);
  losses[kCardinalityError] = scalar_t(double(layer.cardinality) / images);
  losses[kClassError] =
      scalar_t(100 - 100.0 * sums.correct / (sums.matched > 0 ? sums.matched : 1));
  divisor[kClassDivisor] = scalar_t(by_class);
  divisor[kBoxDivisor] = scalar_t(by_boxes);
}

}  // namespace detr_fast
