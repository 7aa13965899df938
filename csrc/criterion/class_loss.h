// SPDX-License-Identifier: Apache-2.0
// The classification losses of one logit and their slopes: one truth for the CPU twin, the CUDA
// kernels and the simulator. Cross-entropy needs a whole row and stands with the loops; here are
// the losses of the sigmoid. Sources: Lin et al., "Focal Loss for Dense Object Detection", ICCV
// 2017; Zhang et al., "VarifocalNet", CVPR 2021, as RT-DETR uses it.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/elementary.h"
#include "common/host_device.h"

namespace detr_fast {

// The values are those of detr_fast/ops/criterion.py.
enum class ClassLossKind { kCrossEntropy, kFocal, kVarifocal };

// Weights of the columns that are a query's class and of those that are not; a focal loss without
// balance has 1 and 1, the positive one of kVarifocal is not used.
template <typename scalar_t>
struct ClassLossFormula {
  ClassLossKind kind;
  scalar_t positive, negative, gamma;
};

// p = sigmoid(x), q = 1 - p, and minus their logarithms; exact at both ends.
template <typename scalar_t>
struct Sigmoid {
  scalar_t p, q, minus_log_p, minus_log_q;
};

template <typename scalar_t>
DETR_FAST_HOST_DEVICE Sigmoid<scalar_t> sigmoid_parts(scalar_t x) {
  const scalar_t small = exponential(x < 0 ? x : -x);  // of the less likely side, in [0, 1]
  const scalar_t larger_side = scalar_t(1) / (scalar_t(1) + small);
  const scalar_t smaller_side = small * larger_side;
  const scalar_t rest = log_plus_one(small);
  const bool likely = x >= 0;
  return {likely ? larger_side : smaller_side, likely ? smaller_side : larger_side,
          rest - smaller(x, scalar_t(0)), rest - smaller(-x, scalar_t(0))};
}

// base^gamma; squares, the usual case, are products as in torch.
template <bool kSquared, typename scalar_t>
DETR_FAST_HOST_DEVICE scalar_t focus(scalar_t base, scalar_t gamma) {
  if constexpr (kSquared) return base * base;
  return std::pow(base, gamma);
}

// Calls body(integral_constant of the kind, true_type if gamma is 2) for the losses of the sigmoid.
template <typename scalar_t, typename Body>
DETR_FAST_HOST_DEVICE void dispatch_sigmoid(ClassLossFormula<scalar_t> formula, const Body& body) {
  const auto with_kind = [&](auto kind) {
    formula.gamma == 2 ? body(kind, std::true_type()) : body(kind, std::false_type());
  };
  if (formula.kind == ClassLossKind::kFocal) {
    with_kind(std::integral_constant<ClassLossKind, ClassLossKind::kFocal>());
  } else {
    with_kind(std::integral_constant<ClassLossKind, ClassLossKind::kVarifocal>());
  }
}

// A loss and its derivative by the logit.
template <typename scalar_t>
struct Term {
  scalar_t loss, slope;
};

// A column that is not the query's class. The weight of kVarifocal is a constant of its gradient.
template <ClassLossKind kKind, bool kSquared, typename scalar_t>
DETR_FAST_HOST_DEVICE Term<scalar_t> negative_term(scalar_t x, ClassLossFormula<scalar_t> formula) {
  const Sigmoid<scalar_t> s = sigmoid_parts(x);
  const scalar_t weight = formula.negative * focus<kSquared>(s.p, formula.gamma);
  scalar_t slope = s.p;
  if constexpr (kKind == ClassLossKind::kFocal) slope += formula.gamma * s.q * s.minus_log_q;
  return {weight * s.minus_log_q, weight * slope};
}

// The column of the query's class; `quality` is the IoU of the matched pair (kVarifocal).
template <ClassLossKind kKind, bool kSquared, typename scalar_t>
DETR_FAST_HOST_DEVICE Term<scalar_t> positive_term(scalar_t x, scalar_t quality,
                                                   ClassLossFormula<scalar_t> formula) {
  const Sigmoid<scalar_t> s = sigmoid_parts(x);
  if constexpr (kKind == ClassLossKind::kVarifocal) {
    const scalar_t miss = scalar_t(1) - quality;
    return {quality * (quality * s.minus_log_p + miss * s.minus_log_q), quality * (s.p - quality)};
  }
  const scalar_t weight = formula.positive * focus<kSquared>(s.q, formula.gamma);
  return {weight * s.minus_log_p, -weight * (s.q + formula.gamma * s.p * s.minus_log_p)};
}

}  // namespace detr_fast
