// SPDX-License-Identifier: Apache-2.0
// What matching says of a problem, and the criterion hears. The values are those of
// detr_fast/reference/match.py.
#pragma once

namespace detr_fast {

// Bits of a status; 0 = fine.
enum MatchStatus : int {
  kCostClass = 1,
  kCostBbox = 2,
  kCostGiou = 4,
  kExtraCost = 8,  // or the given cost of linear_sum_assignment: NaN or -inf
  kSum = 16,       // the terms are finite, their weighted sum is not
  kLabel = 32,     // outside of the columns of the logits
  kInfeasible = 64,
  kNoResult = 128  // of hungarian_match: nothing is matched, because of the others
};

}  // namespace detr_fast
