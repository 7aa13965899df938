// SPDX-License-Identifier: Apache-2.0
// The matching cost of a query and a target: one truth for the CPU twin, the CUDA kernel and the
// simulator, with the operations in the order of the eager formula
// (detr_fast/reference/matcher.py), so that costs differ from it by what exp and log differ, and
// ties stay ties. Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV
// 2020, section 3.1.
#pragma once

#include <cmath>
#include <cstdint>

#include "boxes/box_math.h"
#include "common/element.h"
#include "common/elementary.h"
#include "common/host_device.h"
#include "matcher/options.h"

namespace detr_fast {

// The class term (see ClassCost in detr_fast/reference/match.py) and the weights of the terms; a
// term with weight 0 is not computed.
template <typename scalar_t>
struct CostFormula {
  ClassCostKind kind;
  scalar_t alpha, one_less_alpha, gamma, eps;
  scalar_t class_weight, bbox_weight, giou_weight;
};

// What one decoder layer is matched by.
struct MatchLayer {
  LayerInput logits;  // (images, queries, columns)
  LayerInput boxes;   // (images, queries, 4), centre and size
  LayerInput extra;   // (images, queries, targets), or no data
  int queries, columns;
};

template <typename scalar_t>
DETR_FAST_HOST_DEVICE bool is_finite(scalar_t value) {
  return value < scalar_t(kInfinity) && value > -scalar_t(kInfinity);
}

// base^exponent; squares, the usual case, are products as in torch.
template <bool kSquared, typename scalar_t>
DETR_FAST_HOST_DEVICE scalar_t power(scalar_t base, scalar_t exponent) {
  if constexpr (kSquared) return base * base;
  return std::pow(base, exponent);
}

template <typename scalar_t>
DETR_FAST_HOST_DEVICE scalar_t sigmoid(scalar_t x) {
  return scalar_t(1) / (scalar_t(1) + exponential(-x));
}

// The class term by one logit: all kinds but kSoftmax, which needs those of all columns; that of
// kIouAware is still to be multiplied by a power of the IoU. kSquared: gamma is 2.
template <ClassCostKind kKind, bool kSquared, typename scalar_t>
DETR_FAST_HOST_DEVICE scalar_t class_term(scalar_t x, CostFormula<scalar_t> formula) {
  const scalar_t p = sigmoid(x);
  if constexpr (kKind == ClassCostKind::kIouAware) return -p;
  scalar_t hit, miss;
  if constexpr (kKind == ClassCostKind::kFocal) {
    hit = -logarithm(p + formula.eps);
    miss = -logarithm(scalar_t(1) - p + formula.eps);
  } else {  // minus log-sigmoid of x and of -x
    const scalar_t rest = log_plus_one(exponential(x < 0 ? x : -x));
    hit = rest - smaller(x, scalar_t(0));
    miss = rest - smaller(-x, scalar_t(0));
  }
  const scalar_t negative =
      product(formula.one_less_alpha * power<kSquared>(p, formula.gamma), miss);
  const scalar_t positive =
      product(formula.alpha * power<kSquared>(scalar_t(1) - p, formula.gamma), hit);
  return positive - negative;
}

// Bits of a term that is not finite.
template <typename scalar_t>
DETR_FAST_HOST_DEVICE int term_status(scalar_t term, MatchStatus bit) {
  return is_finite(term) ? 0 : bit;
}

// The status of a problem from the bits of its pairs: the sum is named where no term is.
DETR_FAST_HOST_DEVICE int problem_status(int bits) { return bits & ~kSum ? bits & ~kSum : bits; }

}  // namespace detr_fast
