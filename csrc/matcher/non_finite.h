// SPDX-License-Identifier: Apache-2.0
// What the policies of options.h make of NaN and infinity in the cost of a problem.
#pragma once

#include "common/host_device.h"
#include "matcher/assignment.h"
#include "matcher/options.h"

namespace detr_fast {

// What a cost holds beside finite numbers: bits.
enum NonFiniteBits : int { kInvalid = 1 /* NaN or -inf */, kForbidden = 2 /* +inf */ };

template <typename scalar_t>
DETR_FAST_HOST_DEVICE int non_finite_bits(scalar_t cost) {
  constexpr scalar_t infinity = scalar_t(kInfinity);
  return (cost > -infinity ? 0 : kInvalid) | (cost == infinity ? kForbidden : 0);
}

// Replaces what is not finite in the costs that the rows hold; kError leaves it as it is. For one
// warp.
template <typename Lanes, typename scalar_t>
DETR_FAST_HOST_DEVICE void replace_non_finite(Lanes lanes, CostRows<scalar_t> costs, int rows,
                                              int columns, NonFinite non_finite) {
  if (non_finite.policy == NonFinitePolicy::kError) return;
  const int distinct = costs.distinct < rows ? costs.distinct : rows;
  const auto for_each = [&](auto action) {
    for (int i = 0; i < distinct; ++i) {
      scalar_t* row = costs.row(i);
      for (int j = lanes.lane(); j < columns; j += Lanes::kLanes) action(row[j]);
    }
  };
  scalar_t nan = scalar_t(non_finite.nan), positive = scalar_t(non_finite.positive);
  scalar_t negative = scalar_t(non_finite.negative);
  if (non_finite.policy == NonFinitePolicy::kWorst) {
    scalar_t largest = 0, magnitude = 0;
    for_each([&](scalar_t& cost) {
      if (non_finite_bits(cost) != 0) return;
      largest = larger(largest, cost);
      magnitude = larger(magnitude, cost < 0 ? -cost : cost);
    });
    nan = positive = negative = -lanes.least(-largest) - lanes.least(-magnitude) + 1;
  }
  for_each([&](scalar_t& cost) {
    const int bits = non_finite_bits(cost);
    if (bits == kInvalid) cost = cost == cost ? negative : nan;
    if (bits == kForbidden) cost = positive;
  });
  lanes.sync();
}

}  // namespace detr_fast
