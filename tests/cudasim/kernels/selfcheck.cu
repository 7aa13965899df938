// SPDX-License-Identifier: Apache-2.0
// Kernels that are broken on purpose, one fault each, with correct twins. "FAULT" marks the line
// that the report has to name. By default 64 threads, 64 values (0 to 63), 64 results.
#include "common/cuda.h"
#include "common/warp.cuh"
#include "test_kernels.h"

using detr_fast::kWarpSize;
using detr_fast::kWholeWarp;

// ---- order of accesses

SELFCHECK(missing_syncthreads) {
  __shared__ int staged[64];
  const int t = threadIdx.x;
  staged[t] = values[t];
  out[t] = staged[63 - t];  // FAULT
}

SELFCHECK(with_syncthreads) {
  __shared__ int staged[64];
  const int t = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    staged[t] = values[t];
    __syncthreads();
    out[t] = staged[63 - t];
    __syncthreads();
  }
}

SELFCHECK(missing_second_syncthreads) {
  __shared__ int staged[64];
  const int t = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    staged[t] = values[t];  // FAULT
    __syncthreads();
    out[t] = staged[63 - t];
  }
}

SELFCHECK(missing_syncwarp) {
  __shared__ int staged[64];
  const int t = threadIdx.x;
  staged[t] = values[t];
  out[t] = staged[t ^ 1];  // FAULT
}

SELFCHECK(with_syncwarp) {
  __shared__ int staged[64];
  const int t = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    staged[t] = values[t];
    __syncwarp();
    out[t] = staged[t ^ 31];
    __syncwarp();
  }
}

SELFCHECK(missing_second_syncwarp) {
  __shared__ int staged[64];
  const int t = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    staged[t] = values[t];  // FAULT
    __syncwarp();
    out[t] = staged[t ^ 31];
  }
}

SELFCHECK(syncwarp_across_warps) {
  __shared__ int staged[64];
  const int t = threadIdx.x;
  staged[t] = values[t];
  __syncwarp();
  out[t] = staged[t ^ 32];  // FAULT
}

SELFCHECK(shuffle_orders_nothing) {
  __shared__ int staged[64];
  const int t = threadIdx.x;
  staged[t] = values[t];
  const int first = __shfl_sync(kWholeWarp, t, 0);
  out[t] = staged[t ^ 1] + first;  // FAULT
}

SELFCHECK(two_writers) { out[threadIdx.x / 2] = out[63 - threadIdx.x / 2] = 1; }  // FAULT

SELFCHECK(plain_access_beside_atomics) {
  atomicAdd(out, values[threadIdx.x]);
  if (threadIdx.x == 63) out[1] = out[0];  // FAULT
}

SELFCHECK(atomics_then_barrier) {
  atomicAdd(out, values[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 63) out[1] = out[0];
}

SELFCHECK(race_between_blocks) {
  if (threadIdx.x == 0) out[0] += 1;  // FAULT
}

SELFCHECK(atomics_between_blocks) {
  if (threadIdx.x == 0) atomicAdd(out, 1);
}

// ---- who takes part

SELFCHECK(shuffle_from_missing_lane) {
  const int t = threadIdx.x, lane = t % kWarpSize;
  out[t] = lane < 16 ? __shfl_sync(0x0000ffffu, t, 20) : 0;  // FAULT
}

SELFCHECK(shuffle_within_mask) {
  const int t = threadIdx.x, lane = t % kWarpSize;
  out[t] = lane < 16 ? __shfl_sync(0x0000ffffu, t, 15) : __shfl_sync(0xffff0000u, t, 20);
}

SELFCHECK(lane_not_in_its_mask) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, int(threadIdx.x), 0);  // FAULT
}

SELFCHECK(divergent_collectives) {
  if (threadIdx.x % kWarpSize < 16) {
    __syncwarp();
  } else {
    out[threadIdx.x] = __any_sync(kWholeWarp, values[threadIdx.x]);
  }
  out[threadIdx.x] = 0;
}

SELFCHECK(divergent_barrier) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

SELFCHECK(early_return_before_barrier) {
  out[threadIdx.x] = 0;
  if (threadIdx.x >= 60) return;
  __syncthreads();  // FAULT
}

SELFCHECK(early_return_before_shuffle) {
  out[threadIdx.x] = 0;
  if (threadIdx.x >= 60) return;
  out[threadIdx.x] = __any_sync(kWholeWarp, 1);  // FAULT
}

SELFCHECK(whole_warp_returns_early) {
  const int t = threadIdx.x;
  out[t] = 0;
  if (t >= 32) return;
  out[t] = detr_fast::warp_sum(values[t]);
}

SELFCHECK(deadlock) {
  if (threadIdx.x % kWarpSize < 16) {
    __syncwarp();  // FAULT
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

SELFCHECK(spin_wait) {
  volatile int* const flag = out;
  if (threadIdx.x == 0) {
    while (flag[1] == 0) continue;  // FAULT
  }
}

SELFCHECK(endless_loop) {
  unsigned n = 1;
  while (n & 1) n += 2 * threadIdx.x;  // FAULT
  out[threadIdx.x] = int(n);
}

// ---- memory

SELFCHECK(read_past_input) { out[threadIdx.x] = values[threadIdx.x + 1]; }  // FAULT

SELFCHECK(write_past_output) { out[threadIdx.x + 1] = out[threadIdx.x] = 1; }  // FAULT

SELFCHECK(cached_read_past_input) { out[threadIdx.x] = __ldg(values + threadIdx.x + 1); }  // FAULT

SELFCHECK(atomic_past_output) { atomicAdd(out + threadIdx.x + 1, 1); }  // FAULT

SELFCHECK(read_before_input) { out[threadIdx.x] = values[int(threadIdx.x) - 1]; }  // FAULT

SELFCHECK(read_past_static_shared) {
  __shared__ int staged[64];
  staged[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x + 1];  // FAULT
}

SELFCHECK(write_past_static_shared) {
  __shared__ int staged[63];
  staged[threadIdx.x] = out[threadIdx.x] = 0;  // FAULT
}

SELFCHECK(read_past_dynamic_shared) {
  DETR_FAST_DYNAMIC_SHARED(int, staged);
  staged[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x + 1];  // FAULT
}

SELFCHECK(write_past_dynamic_shared) {
  DETR_FAST_DYNAMIC_SHARED(int, staged);
  staged[threadIdx.x + 1] = out[threadIdx.x] = 0;  // FAULT
}

// 248 bytes: the last vector is only half within.
SELFCHECK(vector_past_dynamic_shared) {
  DETR_FAST_DYNAMIC_SHARED(int, staged);
  if (threadIdx.x < 62) staged[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  const int4 four = reinterpret_cast<const int4*>(staged)[threadIdx.x / 4];  // FAULT
  out[threadIdx.x] = four.x;
}

SELFCHECK(static_shared_uninitialised) {
  __shared__ int staged[64];
  if (threadIdx.x != 7) staged[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = staged[63 - threadIdx.x];  // FAULT
}

SELFCHECK(dynamic_shared_uninitialised) {
  DETR_FAST_DYNAMIC_SHARED(int, staged);
  out[threadIdx.x] = staged[threadIdx.x];  // FAULT
}

// Up to 48 KiB of both kinds go without an opt-in.
SELFCHECK(static_and_dynamic_shared) {
  __shared__ int staged[64];
  DETR_FAST_DYNAMIC_SHARED(int, scratch);
  staged[threadIdx.x] = values[threadIdx.x];
  scratch[threadIdx.x] = staged[threadIdx.x];
  out[threadIdx.x] = scratch[threadIdx.x];
}

SELFCHECK(opted_in) {
  __shared__ int staged[64];
  DETR_FAST_DYNAMIC_SHARED(int, scratch);
  int* const last = scratch + (100000 / sizeof(int) - 64);
  staged[threadIdx.x] = values[threadIdx.x];
  last[threadIdx.x] = staged[threadIdx.x];
  out[threadIdx.x] = last[threadIdx.x];
}
static const int kOptedIn = (DETR_FAST_ALLOW_SHARED(opted_in, 100000), 0);

// Shared memory does not outlive a block.
SELFCHECK(shared_of_another_block) {
  __shared__ int staged[64];
  if (blockIdx.x == 0) staged[threadIdx.x] = values[threadIdx.x];
  out[blockIdx.x * 64 + threadIdx.x] = staged[threadIdx.x];  // FAULT
}

SELFCHECK(output_uninitialised) { out[threadIdx.x] += values[threadIdx.x]; }  // FAULT

SELFCHECK(output_not_written) {
  if (threadIdx.x != 5) out[threadIdx.x] = values[threadIdx.x];
}

SELFCHECK(write_to_input) {
  const_cast<int*>(values)[threadIdx.x] = out[threadIdx.x] = 0;  // FAULT
}

SELFCHECK(misaligned_vector) {
  const int4 four = *reinterpret_cast<const int4*>(values + threadIdx.x / 16);  // FAULT
  out[threadIdx.x] = four.x;
}

SELFCHECK(aligned_vector) {
  const int4 four = *reinterpret_cast<const int4*>(values + threadIdx.x / 16 * 4);
  out[threadIdx.x] = four.x;
}

SELFCHECK(local_memory_of_another_thread) {
  __shared__ const int* of_first;
  const int own[2] = {values[threadIdx.x], 0};
  if (threadIdx.x == 0) of_first = own;
  __syncthreads();
  out[threadIdx.x] = of_first[values[0]];  // FAULT
}

SELFCHECK(null_pointer) { out[threadIdx.x] = values[threadIdx.x]; }  // FAULT

SELFCHECK(wild_pointer) { out[threadIdx.x] = values[1ll << 40]; }  // FAULT

SELFCHECK(too_much_local_memory) {  // FAULT
  int rows[400][200];
  for (int i = 0; i < 400; ++i) rows[i][values[i % 64]] = i;
  out[threadIdx.x] = rows[values[threadIdx.x]][values[threadIdx.x]];
}

// ---- arithmetic

SELFCHECK(index_overflow) {
  const int rows = 46341 + values[0];
  const int last = rows * rows;  // FAULT
  out[threadIdx.x] = last > 0;
}

SELFCHECK(shift_out_of_range) { out[threadIdx.x] = 1 << (values[threadIdx.x] + 1); }  // FAULT

SELFCHECK(division_by_zero) { out[threadIdx.x] = 100 / values[threadIdx.x]; }  // FAULT

SELFCHECK(conversion_out_of_range) {
  out[threadIdx.x] = int(1e8f * float(values[threadIdx.x]));  // FAULT
}

// ---- launches

SELFCHECK(fine) { out[threadIdx.x] = values[threadIdx.x]; }
