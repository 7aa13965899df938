// SPDX-License-Identifier: Apache-2.0
// The matching cost on a CPU, in rows of one number for each query of a problem: coordinates of
// boxes, class costs of a label, costs of a target. All loops over queries are vector code.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "common/element.h"
#include "common/multiversion.h"
#include "common/softmax_row.h"
#include "matcher/cost.h"

namespace detr_fast {
namespace {

// Rows of one length, at equal distances.
template <typename scalar_t>
struct Rows {
  scalar_t* data;
  int stride;

  scalar_t* operator[](int row) const { return data + size_t(row) * stride; }
};

// The boxes of some queries: a row for each coordinate of centre and size, then of the corners.
template <typename scalar_t>
struct BoxRows {
  const scalar_t *cx, *cy, *width, *height, *x0, *y0, *x1, *y1;

  DETR_FAST_HOST_DEVICE Box<scalar_t> centre(int q) const {
    return {cx[q], cy[q], width[q], height[q]};
  }
  DETR_FAST_HOST_DEVICE Box<scalar_t> corners(int q) const { return {x0[q], y0[q], x1[q], y1[q]}; }
};

constexpr int kBoxRows = 8;

template <typename scalar_t>
BoxRows<scalar_t> box_rows(Rows<scalar_t> rows) {
  return {rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]};
}

// The targets of an image. Those that share a label share their class costs.
template <typename scalar_t>
struct ImageTargets {
  int count = 0;
  std::vector<Box<scalar_t>> boxes;
  std::vector<int64_t> labels;  // that occur
  std::vector<int> label_of;    // index in `labels`
};

template <typename scalar_t, typename source_t>
ImageTargets<scalar_t> image_targets(const int64_t* labels, const source_t* boxes, int count) {
  ImageTargets<scalar_t> targets = {count};
  for (int t = 0; t < count; ++t) {
    const source_t* box = boxes + t * 4;
    targets.boxes.push_back(
        {as<scalar_t>(box[0]), as<scalar_t>(box[1]), as<scalar_t>(box[2]), as<scalar_t>(box[3])});
    const auto found = std::find(targets.labels.begin(), targets.labels.end(), labels[t]);
    targets.label_of.push_back(int(found - targets.labels.begin()));
    if (found == targets.labels.end()) targets.labels.push_back(labels[t]);
  }
  return targets;
}

// An input of the queries of one problem.
template <typename source_t>
struct QueryInput {
  const source_t* data;
  int64_t query_step, column_step;
};

template <typename scalar_t, typename source_t>
DETR_FAST_MULTIVERSION void load_boxes(QueryInput<source_t> boxes, int queries,
                                       Rows<scalar_t> rows) {
  for (int q = 0; q < queries; ++q) {
    const source_t* box = boxes.data + q * boxes.query_step;
    for (int side = 0; side < 4; ++side) {
      rows.data[size_t(side) * rows.stride + q] = as<scalar_t>(box[side * boxes.column_step]);
    }
  }
  const BoxRows<scalar_t> b = {rows.data, rows.data + rows.stride,
                               rows.data + 2 * size_t(rows.stride),
                               rows.data + 3 * size_t(rows.stride)};
  scalar_t* __restrict x0 = rows.data + 4 * size_t(rows.stride);
  scalar_t* __restrict y0 = x0 + rows.stride;
  scalar_t* __restrict x1 = y0 + rows.stride;
  scalar_t* __restrict y1 = x1 + rows.stride;
  for (int q = 0; q < queries; ++q) {
    const Box<scalar_t> corners = corners_of(b.centre(q));
    x0[q] = corners.x0, y0[q] = corners.y0, x1[q] = corners.x1, y1[q] = corners.y1;
  }
}

// The logits of the labels: a row each; those of a label without a column are NaN.
template <typename scalar_t, typename source_t>
void gather_logits(QueryInput<source_t> logits, int queries, int columns,
                   const std::vector<int64_t>& labels, Rows<scalar_t> rows) {
  for (int i = 0; i < int(labels.size()); ++i) {
    scalar_t* row = rows[i];
    if (labels[i] < 0 || labels[i] >= columns) {
      std::fill_n(row, queries, std::numeric_limits<scalar_t>::quiet_NaN());
      continue;
    }
    const source_t* column = logits.data + labels[i] * logits.column_step;
    for (int q = 0; q < queries; ++q) row[q] = as<scalar_t>(column[q * logits.query_step]);
  }
}

// Minus the softmax probabilities of `count` labels, a row each; `buffer` holds padded(columns)
// numbers, `sums` one for each query. The sum of a query's exponentials does not depend on where
// it stands, so that equal queries have equal costs.
template <typename scalar_t, typename source_t>
DETR_FAST_MULTIVERSION void softmax_rows(QueryInput<source_t> logits, int queries, int columns,
                                         const int64_t* labels, int count, Rows<scalar_t> rows,
                                         scalar_t* __restrict sums, scalar_t* __restrict buffer) {
  constexpr scalar_t infinity = std::numeric_limits<scalar_t>::infinity();
  const int filled = padded(columns);
  std::fill(buffer + columns, buffer + filled, -infinity);
  for (int q = 0; q < queries; ++q) {
    const source_t* logit = logits.data + q * logits.query_step;
    if (logits.column_step == 1) {
      for (int c = 0; c < columns; ++c) buffer[c] = as<scalar_t>(logit[c]);
    } else {
      for (int c = 0; c < columns; ++c) buffer[c] = as<scalar_t>(logit[c * logits.column_step]);
    }
    const scalar_t most = largest_of_row(buffer, filled);
    sums[q] = exponentials_of_row(buffer, filled, most);
    for (int i = 0; i < count; ++i) {
      const bool known = labels[i] >= 0 && labels[i] < columns;
      rows.data[size_t(i) * rows.stride + q] = known ? buffer[labels[i]] : infinity - infinity;
    }
    std::fill(buffer + columns, buffer + filled, -infinity);
  }
  for (int i = 0; i < count; ++i) {
    scalar_t* __restrict row = rows.data + size_t(i) * rows.stride;
    for (int q = 0; q < queries; ++q) row[q] = -(row[q] / sums[q]);
  }
}

template <ClassCostKind kKind, bool kSquared, typename scalar_t>
DETR_FAST_MULTIVERSION void class_row(CostFormula<scalar_t> formula, int queries,
                                      scalar_t* __restrict row) {
  for (int q = 0; q < queries; ++q) row[q] = class_term<kKind, kSquared>(row[q], formula);
}

// The class costs of the labels by single logits, in place.
template <typename scalar_t>
void class_rows(CostFormula<scalar_t> formula, int queries, int count, Rows<scalar_t> rows) {
  const auto run = [&](auto run_row) {
    for (int i = 0; i < count; ++i) run_row(formula, queries, rows[i]);
  };
  const bool squared = formula.gamma == 2;
  if (formula.kind == ClassCostKind::kIouAware) {
    run(class_row<ClassCostKind::kIouAware, true, scalar_t>);
  } else if (formula.kind == ClassCostKind::kFocal) {
    run(squared ? class_row<ClassCostKind::kFocal, true, scalar_t>
                : class_row<ClassCostKind::kFocal, false, scalar_t>);
  } else {
    run(squared ? class_row<ClassCostKind::kFocalLogits, true, scalar_t>
                : class_row<ClassCostKind::kFocalLogits, false, scalar_t>);
  }
}

// The terms of one target's costs beside the boxes: nullptr where there is none.
template <typename scalar_t>
struct TermRows {
  const scalar_t *class_cost, *extra;
};

// The cost of each query and one target; returns whether all are finite.
template <typename scalar_t>
DETR_FAST_MULTIVERSION bool cost_row(CostFormula<scalar_t> formula, BoxRows<scalar_t> boxes,
                                     int queries, Box<scalar_t> target, TermRows<scalar_t> terms,
                                     scalar_t* __restrict row) {
  const Box<scalar_t> corners = corners_of(target);
  for (int q = 0; q < queries; ++q) row[q] = 0;
  if (formula.bbox_weight != 0) {
    for (int q = 0; q < queries; ++q) {
      row[q] = formula.bbox_weight * l1_distance(boxes.centre(q), target);
    }
  }
  if (terms.class_cost != nullptr) {
    for (int q = 0; q < queries; ++q) row[q] += formula.class_weight * terms.class_cost[q];
  }
  if (formula.giou_weight != 0) {
    for (int q = 0; q < queries; ++q) {
      row[q] +=
          formula.giou_weight * -similarity<Hull::kClamped>(boxes.corners(q), corners, scalar_t(0));
    }
  }
  if (terms.extra != nullptr) {
    for (int q = 0; q < queries; ++q) row[q] += terms.extra[q];
  }
  int odd = 0;
#pragma omp simd reduction(| : odd)
  for (int q = 0; q < queries; ++q) odd |= is_finite(row[q]) ? 0 : 1;
  return odd == 0;
}

// What is not finite in the costs of one target.
template <typename scalar_t>
int row_status(CostFormula<scalar_t> formula, BoxRows<scalar_t> boxes, int queries,
               Box<scalar_t> target, TermRows<scalar_t> terms, const scalar_t* row) {
  const Box<scalar_t> corners = corners_of(target);
  int bits = 0;
  for (int q = 0; q < queries; ++q) {
    if (is_finite(row[q])) continue;
    bits |= kSum;
    if (formula.bbox_weight != 0) {
      bits |= term_status(l1_distance(boxes.centre(q), target), kCostBbox);
    }
    if (formula.giou_weight != 0) {
      bits |= term_status(similarity<Hull::kClamped>(boxes.corners(q), corners, scalar_t(0)),
                          kCostGiou);
    }
    if (terms.class_cost != nullptr) bits |= term_status(terms.class_cost[q], kCostClass);
    if (terms.extra != nullptr) bits |= term_status(terms.extra[q], kExtraCost);
  }
  return bits;
}

// out = class_cost * IoU^alpha of each query and one target
template <typename scalar_t>
DETR_FAST_MULTIVERSION void iou_aware_row(scalar_t alpha, BoxRows<scalar_t> boxes, int queries,
                                          Box<scalar_t> corners, const scalar_t* class_cost,
                                          scalar_t* __restrict out) {
  for (int q = 0; q < queries; ++q) {
    out[q] = similarity<Hull::kNone>(boxes.corners(q), corners, scalar_t(0));
  }
  for (int q = 0; q < queries; ++q) out[q] = class_cost[q] * std::pow(out[q], alpha);
}

}  // namespace
}  // namespace detr_fast
