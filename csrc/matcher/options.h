// SPDX-License-Identifier: Apache-2.0
// What the matching ops are asked for and report: plain numbers, for kernels too. The values are
// those of detr_fast/ops/matcher.py and detr_fast/reference/match.py.
#pragma once

#include "common/match_status.h"

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

}  // namespace detr_fast
