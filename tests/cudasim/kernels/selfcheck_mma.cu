// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies and matrices, broken on purpose, with correct twins; as selfcheck.cu.
#include "common/mma.cuh"
#include "common/warp.cuh"
#include "test_kernels.h"

using detr_fast::kWarpSize;

// ---- asynchronous copies

SELFCHECK(read_before_wait) {
  __shared__ int4 rows[64];
  detr_fast::copy_16_async(rows + threadIdx.x, values, true);
  detr_fast::commit_copies();
  out[threadIdx.x] = rows[threadIdx.x].x;  // FAULT
  detr_fast::wait_for_copies<0>();
}

SELFCHECK(wait_without_commit) {
  __shared__ int4 rows[64];
  detr_fast::copy_16_async(rows + threadIdx.x, values, true);
  detr_fast::wait_for_copies<0>();
  out[threadIdx.x] = rows[threadIdx.x].x;  // FAULT
  detr_fast::commit_copies();
  detr_fast::wait_for_copies<0>();
}

SELFCHECK(wait_for_too_few) {
  __shared__ int4 rows[64], others[64];
  detr_fast::copy_16_async(rows + threadIdx.x, values, true);
  detr_fast::commit_copies();
  detr_fast::copy_16_async(others + threadIdx.x, values, true);
  detr_fast::commit_copies();
  detr_fast::wait_for_copies<1>();
  out[threadIdx.x] = rows[threadIdx.x].x + others[threadIdx.x].x;  // FAULT
  detr_fast::wait_for_copies<0>();
}

SELFCHECK(no_barrier_after_wait) {
  __shared__ int4 rows[64];
  detr_fast::copy_16_async(rows + threadIdx.x, values, true);
  detr_fast::commit_copies();
  detr_fast::wait_for_copies<0>();
  out[threadIdx.x] = rows[threadIdx.x ^ 32].x;  // FAULT
}

SELFCHECK(barrier_before_wait) {
  __shared__ int4 rows[64];
  detr_fast::copy_16_async(rows + threadIdx.x, values, true);
  detr_fast::commit_copies();
  __syncthreads();
  detr_fast::wait_for_copies<0>();
  out[threadIdx.x] = rows[threadIdx.x ^ 32].x;  // FAULT
}

SELFCHECK(copies_in_order) {
  __shared__ int4 rows[64], others[64];
  const int t = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    detr_fast::copy_16_async(rows + t, values + t / 4 * 4, true);
    detr_fast::commit_copies();
    detr_fast::copy_16_async(others + t, values + 64, false);
    detr_fast::commit_copies();
    detr_fast::wait_for_copies<1>();
    __syncwarp();
    const int neighbour = rows[t ^ 31].x;
    detr_fast::wait_for_copies<0>();
    __syncthreads();
    out[t] = neighbour + others[t ^ 32].x;
    __syncthreads();
  }
}

SELFCHECK(write_under_a_copy) {
  __shared__ int4 rows[64];
  detr_fast::copy_16_async(rows + threadIdx.x, values, true);  // FAULT
  detr_fast::commit_copies();
  rows[threadIdx.x].y = 0;
  detr_fast::wait_for_copies<0>();
  out[threadIdx.x] = rows[threadIdx.x].x;
}

SELFCHECK(exit_before_copies_have_landed) {
  __shared__ int4 rows[64];
  out[threadIdx.x] = values[threadIdx.x];
  detr_fast::copy_16_async(rows + threadIdx.x, values, true);  // FAULT
  detr_fast::commit_copies();
}

SELFCHECK(exit_with_uncommitted_copies) {
  __shared__ int4 rows[64];
  out[threadIdx.x] = values[threadIdx.x];
  detr_fast::copy_16_async(rows + threadIdx.x, values, true);  // FAULT
  detr_fast::wait_for_copies<0>();
}

SELFCHECK(misaligned_copy) {
  __shared__ int4 rows[65];
  detr_fast::copy_16_async(&rows[threadIdx.x].z, values, true);  // FAULT
  out[threadIdx.x] = 0;
}

SELFCHECK(copy_past_input) {
  __shared__ int4 rows[64];
  detr_fast::copy_16_async(rows + threadIdx.x, values + 64, true);  // FAULT
  out[threadIdx.x] = 0;
}

SELFCHECK(copy_past_shared) {
  DETR_FAST_DYNAMIC_SHARED(int4, rows);
  detr_fast::copy_16_async(rows + 64, values, true);  // FAULT
  out[threadIdx.x] = 0;
}

SELFCHECK(copy_to_global) {
  detr_fast::copy_16_async(out + threadIdx.x / 4 * 4, values, true);  // FAULT
  out[threadIdx.x] = 0;
}

SELFCHECK(copy_to_local) {
  int4 row;
  detr_fast::copy_16_async(&row, values, true);  // FAULT
  out[threadIdx.x] = row.x;
}

// Each warp has a stage of 32 rows, and fills that of the other for the next round.
SELFCHECK(stage_still_read) {
  __shared__ int4 stages[2][32];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  stages[warp][lane].x = stages[warp][lane].y = stages[warp][lane].z = stages[warp][lane].w = 1;
  __syncthreads();
  uint32_t r[4];
  detr_fast::load_matrices(r, stages[warp] + lane);
  detr_fast::copy_16_async(stages[1 - warp] + lane, values, true);  // FAULT
  detr_fast::commit_copies();
  detr_fast::wait_for_copies<0>();
  out[threadIdx.x] = int(r[0]);
}

SELFCHECK(stage_no_longer_read) {
  __shared__ int4 stages[2][32];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  stages[warp][lane].x = stages[warp][lane].y = stages[warp][lane].z = stages[warp][lane].w = 1;
  uint32_t r[4];
  for (int round = 0; round < 3; ++round) {
    __syncthreads();
    detr_fast::load_matrices(r, stages[warp] + lane);
    __syncthreads();
    detr_fast::copy_16_async(stages[1 - warp] + lane, values, true);
    detr_fast::commit_copies();
    detr_fast::wait_for_copies<0>();
  }
  out[threadIdx.x] = int(r[0]);
}

// ---- matrices

SELFCHECK(load_before_wait) {
  __shared__ int4 rows[64];
  detr_fast::copy_16_async(rows + threadIdx.x, values, true);
  detr_fast::commit_copies();
  uint32_t r[4];
  detr_fast::load_matrices_transposed(r, rows + threadIdx.x);  // FAULT
  detr_fast::wait_for_copies<0>();
  out[threadIdx.x] = int(r[0]);
}

SELFCHECK(load_without_barrier) {
  __shared__ int4 rows[64];
  rows[threadIdx.x] = int4{1, 2, 3, 4};
  uint32_t r[4];
  detr_fast::load_matrices(r, rows + (threadIdx.x ^ 1));  // FAULT
  out[threadIdx.x] = int(r[0]);
}

// The load reads other lanes' rows, but as of before it: what they write after it is a race.
SELFCHECK(load_orders_nothing) {
  __shared__ int4 rows[64];
  rows[threadIdx.x] = int4{1, 2, 3, 4};
  __syncthreads();
  uint32_t r[4];
  detr_fast::load_matrices(r, rows + (threadIdx.x ^ 1));
  rows[threadIdx.x] = int4{int(r[0]), 2, 3, 4};  // FAULT
  out[threadIdx.x] = int(r[0]);
}

SELFCHECK(misaligned_row) {
  __shared__ int4 rows[65];
  rows[threadIdx.x] = rows[threadIdx.x + 1] = int4{1, 2, 3, 4};
  __syncthreads();
  uint32_t r[4];
  detr_fast::load_matrices(r, &rows[threadIdx.x].y);  // FAULT
  out[threadIdx.x] = int(r[0]);
}

SELFCHECK(row_past_shared) {
  DETR_FAST_DYNAMIC_SHARED(int4, rows);
  rows[threadIdx.x] = int4{1, 2, 3, 4};
  __syncthreads();
  uint32_t r[4];
  detr_fast::load_matrices(r, rows + threadIdx.x + 1);  // FAULT
  out[threadIdx.x] = int(r[0]);
}

SELFCHECK(row_uninitialised) {
  __shared__ int4 rows[64];
  if (threadIdx.x != 9) rows[threadIdx.x] = int4{1, 2, 3, 4};
  __syncthreads();
  uint32_t r[4];
  detr_fast::load_matrices(r, rows + threadIdx.x);  // FAULT
  out[threadIdx.x] = int(r[0]);
}

SELFCHECK(row_in_global) {
  uint32_t r[4];
  detr_fast::load_matrices(r, values + threadIdx.x % 4 * 4);  // FAULT
  out[threadIdx.x] = int(r[0]);
}

SELFCHECK(divergent_products) {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (threadIdx.x % kWarpSize < 16) {
    detr_fast::multiply_add<__half>(d, a, 0, 0);
  } else {
    detr_fast::multiply_add<__half>(d, a, 0, 1);
  }
  out[threadIdx.x] = int(d[0]);
}

SELFCHECK(product_of_half_a_warp) {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (threadIdx.x % kWarpSize < 16) detr_fast::multiply_add<__half>(d, a, 0, 0);  // FAULT
  __syncthreads();
  out[threadIdx.x] = int(d[0]);
}

SELFCHECK(product_of_a_partial_warp) {
  float d[4] = {};
  const uint32_t a[4] = {};
  detr_fast::multiply_add<__nv_bfloat16>(d, a, 0, 0);  // FAULT
  out[threadIdx.x] = int(d[0]);
}
