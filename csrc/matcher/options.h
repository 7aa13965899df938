// SPDX-License-Identifier: Apache-2.0
// What the matching ops are asked for and report: plain numbers, for kernels too. The values are
// those of detr_fast/ops/matcher.py and detr_fast/reference/match.py.
#pragma once

namespace detr_fast {

enum class Algorithm { kAuto, kShortestPath, kAuction };

enum class ClassCostKind { kSoftmax, kFocal, kFocalLogits, kIouAware };

// What NaN and infinity in a cost do: the problem has no result, they cost more than anything
// finite (largest + largest magnitude + 1), or other numbers take their place.
enum class NonFinitePolicy { kError, kWorst, kReplace };

struct NonFinite {
  NonFinitePolicy policy;
  double nan, positive, negative;  // of kReplace
};

// Bits of a status; 0 = fine.
enum MatchStatus : int {
  kCostClass = 1,
  kCostBbox = 2,
  kCostGiou = 4,
  kExtraCost = 8,  // or the given cost of linear_sum_assignment: NaN or -inf
  kSum = 16,       // the terms are finite, their weighted sum is not
  kLabel = 32,     // outside of the columns of the logits
  kInfeasible = 64
};

}  // namespace detr_fast
