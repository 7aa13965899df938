// SPDX-License-Identifier: Apache-2.0
// Tensor cores: what a warp makes of the fragments that its lanes hold (PTX ISA, mma.m16n8k16 and
// ldmatrix).
#pragma once

#include "runtime/scheduler.h"

namespace cudasim {

enum class MatrixElement { kHalf, kBFloat16 };

// d (16 x 8) += a (16 x 16) * b (16 x 8): products are exact in float, sums are float in the order
// of k.
CUDASIM_EXPORT void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 MatrixElement, Location);

// Four matrices of 8 x 8 elements of 16 bits; lane 8 * i + j gives row j of matrix i. `pc`: of the
// kernel's call.
CUDASIM_EXPORT void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Location,
                                  void* pc);

}  // namespace cudasim
