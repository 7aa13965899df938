// SPDX-License-Identifier: Apache-2.0
// The classification losses of one query on a CPU, as vector code: its logits, as float or double,
// are a row filled up to a multiple of kLanes with minus infinity.
#pragma once

#include "common/multiversion.h"
#include "common/softmax_row.h"
#include "criterion/class_loss.h"

namespace detr_fast {
namespace {

// The first of the largest numbers of a row.
template <typename scalar_t>
DETR_FAST_HOST_DEVICE int first_largest(const scalar_t* row, int columns, scalar_t most) {
  int first = columns;
#pragma omp simd reduction(min : first)
  for (int c = 0; c < columns; ++c) first = smaller(first, row[c] == most ? c : columns);
  return first;
}

template <typename scalar_t>
DETR_FAST_MULTIVERSION int argmax_of_row(const scalar_t* row, int columns, int filled) {
  return first_largest(row, columns, largest_of_row(row, filled));
}

template <typename scalar_t>
struct Softmax {
  scalar_t most, log_sum;  // the largest logit; log of the sum of the exponentials less it
  int best;                // the first column of the largest logit
};

// Overwrites the row.
template <typename scalar_t>
DETR_FAST_MULTIVERSION Softmax<scalar_t> softmax_row(scalar_t* row, int columns, int filled) {
  const scalar_t most = largest_of_row(row, filled);
  const int best = first_largest(row, columns, most);
  return {most, logarithm(exponentials_of_row(row, filled, most)), best};
}

// Makes a row its softmax times `weight`.
template <typename scalar_t>
DETR_FAST_MULTIVERSION void softmax_slopes(scalar_t weight, scalar_t most, scalar_t log_sum,
                                           int columns, scalar_t* __restrict row) {
  for (int c = 0; c < columns; ++c) row[c] = weight * exponential((row[c] - most) - log_sum);
}

// The sum of a row's losses of the sigmoid; `positive` is the loss at `column`, if there is one.
template <ClassLossKind kKind, bool kSquared, typename scalar_t>
DETR_FAST_MULTIVERSION scalar_t sigmoid_loss(ClassLossFormula<scalar_t> formula, int columns,
                                             int column, scalar_t positive,
                                             scalar_t* __restrict row) {
  for (int c = 0; c < columns; ++c) row[c] = negative_term<kKind, kSquared>(row[c], formula).loss;
  if (column >= 0) row[column] = positive;
  scalar_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int c = 0; c < columns; ++c) sum += row[c];
  return sum;
}

// Makes a row the derivatives of its losses as no class, times `weight`.
template <ClassLossKind kKind, bool kSquared, typename scalar_t>
DETR_FAST_MULTIVERSION void sigmoid_slopes(ClassLossFormula<scalar_t> formula, scalar_t weight,
                                           int columns, scalar_t* __restrict row) {
  for (int c = 0; c < columns; ++c) {
    row[c] = weight * negative_term<kKind, kSquared>(row[c], formula).slope;
  }
}

}  // namespace
}  // namespace detr_fast
