// SPDX-License-Identifier: Apache-2.0
// One kernel for each group of CUDA's functions. The simulator runs them, the interpreter of PTX
// and a GPU can: test_conformance.py holds the expected values, computed in numpy.
//
// Every kernel writes `out` row by row: row k, column t is what thread t got from function k.
#include "common/cuda.h"
#include "common/mma.cuh"
#include "common/warp.cuh"
#include "test_kernels.h"

namespace {

using detr_fast::kWarpSize;
using detr_fast::kWholeWarp;

// The rank of a thread in its block, of any shape.
__device__ __forceinline__ int thread_rank() {
  return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

template <typename T>
struct Rows {
  T* out;
  __device__ void put(T value) {
    out[thread_rank()] = value;
    out += blockDim.x * blockDim.y * blockDim.z;
  }
};

}  // namespace

// 64 threads; values of one word
extern "C" __global__ void shuffles(const int* values, int* out) {
  const int value = values[threadIdx.x], lane = threadIdx.x % kWarpSize;
  Rows<int> rows{out};
  rows.put(__shfl_sync(kWholeWarp, value, 5));
  rows.put(__shfl_sync(kWholeWarp, value, lane + 3, 8));
  rows.put(__shfl_up_sync(kWholeWarp, value, 2));
  rows.put(__shfl_up_sync(kWholeWarp, value, 3, 8));
  rows.put(__shfl_down_sync(kWholeWarp, value, 2));
  rows.put(__shfl_down_sync(kWholeWarp, value, 3, 16));
  rows.put(__shfl_xor_sync(kWholeWarp, value, 1));
  rows.put(__shfl_xor_sync(kWholeWarp, value, 9, 8));
}

// 64 threads; values of two words, and half of a warp
extern "C" __global__ void shuffles_of_doubles(const double* values, double* out) {
  const double value = values[threadIdx.x];
  Rows<double> rows{out};
  rows.put(__shfl_down_sync(kWholeWarp, value, 7));
  rows.put(detr_fast::warp_sum(value));
  double neighbour;
  if (threadIdx.x % kWarpSize < 16) {
    neighbour = __shfl_xor_sync(0x0000ffffu, value, 8);
  } else {
    neighbour = __shfl_down_sync(0xffff0000u, value, 1);
  }
  rows.put(neighbour);
}

// 64 threads
extern "C" __global__ void votes(const int* values, unsigned* out) {
  const int value = values[threadIdx.x], lane = threadIdx.x % kWarpSize;
  Rows<unsigned> rows{out};
  rows.put(__ballot_sync(kWholeWarp, value % 3 == 0));
  rows.put(__any_sync(kWholeWarp, value == 40));
  rows.put(__all_sync(kWholeWarp, value < 40));
  rows.put(__match_any_sync(kWholeWarp, value % 5));
  rows.put(lane < 16 ? __ballot_sync(0x0000ffffu, value & 1)
                     : __ballot_sync(0xffff0000u, value & 2));
  rows.put(__syncthreads_count(value % 3 == 0));
  rows.put(__syncthreads_and(value < 63));
  rows.put(__syncthreads_or(value == 63));
}

// 64 threads; compute capability 8.0 and later
extern "C" __global__ void reductions(const int* values, int* out) {
  const int value = values[threadIdx.x];
  const unsigned bits = unsigned(value);
  Rows<int> rows{out};
  rows.put(__reduce_add_sync(kWholeWarp, value));
  rows.put(__reduce_min_sync(kWholeWarp, value));
  rows.put(__reduce_max_sync(kWholeWarp, value));
  rows.put(int(__reduce_add_sync(kWholeWarp, bits)));
  rows.put(int(__reduce_min_sync(kWholeWarp, bits)));
  rows.put(int(__reduce_max_sync(kWholeWarp, bits)));
  rows.put(int(__reduce_and_sync(kWholeWarp, bits)));
  rows.put(int(__reduce_or_sync(kWholeWarp, bits)));
  rows.put(int(__reduce_xor_sync(kWholeWarp, bits)));
}

// Blocks of 40 threads: the second warp has but 8 lanes.
extern "C" __global__ void partial_warp(unsigned* out) {
  out[blockIdx.x * 40 + threadIdx.x] = __ballot_sync(kWholeWarp, 1);
}

// Any number of blocks of any shape; `out` holds the values to update.
extern "C" __global__ void atomics(const int* values, int* out) {
  const int value = values[thread_rank()];
  atomicAdd(out, value);
  atomicMin(out + 1, value);
  atomicMax(out + 2, value);
  atomicAnd(out + 3, ~(1 << value % 32));
  atomicOr(out + 4, 1 << value % 32);
  atomicXor(out + 5, value);
  atomicCAS(out + 6, 0, 77);
  if (value == 7) atomicExch(out + 7, value);
}

extern "C" __global__ void atomics_of_floats(const float* values, float* out) {
  atomicAdd(out, values[thread_rank()]);
}

extern "C" __global__ void atomics_of_long_words(const unsigned long long* values,
                                                 unsigned long long* out) {
  atomicMin(out, values[thread_rank()]);
  atomicMax(out + 1, values[thread_rank()]);
}

// What every thread adds to a counter tells it apart from the others: out is a permutation.
extern "C" __global__ void tickets(int* counter, int* out) {
  out[atomicAdd(counter, 1)] = thread_rank();
}

// 64 threads in any shape and 64 * 4 bytes of dynamic shared memory: reversal by way of static,
// dynamic and warp-local exchange.
extern "C" __global__ void shared_memory(const float* values, float* out) {
  __shared__ float staged[64];
  __shared__ __half halves[64];
  DETR_FAST_DYNAMIC_SHARED(float, scratch);
  const int rank = thread_rank();
  Rows<float> rows{out};
  staged[rank] = values[rank];
  scratch[rank] = 2 * values[rank];
  halves[rank] = __float2half(values[rank]);
  __syncthreads();
  rows.put(staged[63 - rank]);
  rows.put(scratch[63 - rank]);
  rows.put(__half2float(halves[63 - rank]));
  __syncthreads();
  staged[rank] = values[rank] + 1;
  __syncwarp();
  rows.put(staged[rank ^ 31]);
}

__constant__ float kPowers[4] = {1, 2, 4, 8};

// Blocks of (4, 2, 2) threads in a grid of (3, 2, 1): the built-in variables, a row each.
extern "C" __global__ void built_in_variables(int* out) {
  const int blocks = int(gridDim.x * gridDim.y * gridDim.z);
  const int block = int(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  const int values[] = {int(threadIdx.x), int(threadIdx.y),
                        int(threadIdx.z), int(blockIdx.x),
                        int(blockIdx.y),  int(blockIdx.z),
                        int(blockDim.x),  int(gridDim.x),
                        warpSize,         int(kPowers[thread_rank() % 4])};
  int row = 0;
  for (const int value : values) out[(row++ * blocks + block) * 16 + thread_rank()] = value;
}

// 64 threads
extern "C" __global__ void integer_functions(const int* values, int* out) {
  const int value = values[threadIdx.x];
  Rows<int> rows{out};
  rows.put(__popc(unsigned(value)));
  rows.put(__popcll((1ull << 40) | unsigned(value)));
  rows.put(__clz(value));
  rows.put(__ffs(value));
  rows.put(int(__brev(unsigned(value))));
  rows.put(min(value, 3));
  rows.put(max(value, 3));
  rows.put(__float_as_int(__int_as_float(value)));
  rows.put(int(__float_as_uint(__uint_as_float(unsigned(value)))));
  rows.put(int(__double_as_longlong(__longlong_as_double(value))));
}

// 64 threads; values above 0
extern "C" __global__ void float_functions(const float* values, float* out) {
  const float value = __ldg(values + threadIdx.x);
  Rows<float> rows{out};
  rows.put(__expf(value));
  rows.put(__logf(value));
  rows.put(__fdividef(1.5f, value));
  rows.put(__frcp_rn(value));
  rows.put(__fadd_rn(value, 0.1f));
  rows.put(__fsub_rn(value, 0.1f));
  rows.put(__fmul_rn(value, 0.1f));
  rows.put(__fdiv_rn(value, 3.0f));
  rows.put(__fmaf_rn(value, value, -0.1f));
  rows.put(__saturatef(value - 1));
  rows.put(rsqrtf(value));
  rows.put(isnan(value) || isinf(value) || !isfinite(value) ? 1.0f : 0.0f);
  rows.put(__ldcs(values + threadIdx.x));
  __stcs(rows.out + threadIdx.x, value);
}

// 64 threads; 8 halves or bfloat16 numbers each, in one load of 16 bytes
extern "C" __global__ void narrow_floats(const float4* packed, float* out) {
  float4 loaded = packed[threadIdx.x];
  __half2 halves;
  __nv_bfloat162 brains;
  memcpy(&halves, &loaded.x, sizeof halves);
  memcpy(&brains, &loaded.y, sizeof brains);
  Rows<float> rows{out};
  rows.put(__low2float(halves));
  rows.put(__high2float(halves));
  rows.put(__bfloat162float(__low2bfloat16(brains)));
  rows.put(__bfloat162float(__high2bfloat16(brains)));
  rows.put(__half2float(__float2half(loaded.z)));
  rows.put(__bfloat162float(__float2bfloat16(loaded.w)));
}

// 64 threads, compute capability 8.0 and later as all below. A warp of its own matrices: a (16,
// 16), b (16, 8), c (16, 8), each row by row. `out`: a * b + c of halves, then of bfloat16 numbers.
namespace {

template <typename element_t>
__device__ __forceinline__ void multiply_matrices(const element_t* a, const element_t* b,
                                                  const float* c, float* out) {
  const int group = threadIdx.x % kWarpSize / 4, pair = threadIdx.x % 4 * 2;
  const auto bits = [](element_t first, element_t second) {
    const element_t both[] = {first, second};
    uint32_t word;
    memcpy(&word, both, sizeof word);
    return word;
  };
  const auto pair_of_a = [&](int row, int column) {
    return bits(a[row * 16 + column], a[row * 16 + column + 1]);
  };
  const auto pair_of_b = [&](int row, int column) {
    return bits(b[row * 8 + column], b[(row + 1) * 8 + column]);
  };
  const uint32_t fragment[4] = {pair_of_a(group, pair), pair_of_a(group + 8, pair),
                                pair_of_a(group, pair + 8), pair_of_a(group + 8, pair + 8)};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(group + i / 2 * 8) * 8 + pair + i % 2];
  detr_fast::multiply_add<element_t>(d, fragment, pair_of_b(pair, group),
                                     pair_of_b(pair + 8, group));
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + pair + i % 2] = d[i];
}

}  // namespace

extern "C" __global__ void matrix_products(const __half* halves, const __nv_bfloat16* brains,
                                           const float* c, float* out) {
  const int warp = threadIdx.x / kWarpSize;
  halves += warp * 384;
  brains += warp * 384;
  c += warp * 128;
  out += warp * 128;
  multiply_matrices(halves, halves + 256, c, out);
  multiply_matrices(brains, brains + 256, c, out + 256);
}

// 64 threads. A warp loads four of its eight 8 x 8 matrices, which lie row by row one after the
// other: the odd ones as they are, the even ones transposed. Row k of `out`: register k.
extern "C" __global__ void matrix_loads(const uint4* matrices, unsigned* out) {
  __shared__ uint4 staged[2 * 8 * 8];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  staged[threadIdx.x] = matrices[threadIdx.x];
  staged[64 + threadIdx.x] = matrices[64 + threadIdx.x];
  __syncthreads();
  const uint4* const row = staged + 64 * warp + lane / 8 * 16 + lane % 8;
  uint32_t plain[4], transposed[4];
  detr_fast::load_matrices(plain, row + 8);
  detr_fast::load_matrices_transposed(transposed, row);
  Rows<unsigned> rows{out};
  for (const uint32_t word : plain) rows.put(word);
  for (const uint32_t word : transposed) rows.put(word);
}

// 64 threads. Groups of copies by everyone, the second of every other thread is of zeros. Rows: the
// first word of the first, as soon as it must be there, of both, and of both of the neighbour.
extern "C" __global__ void asynchronous_copies(const uint4* values, unsigned* out) {
  __shared__ uint4 first[64], second[64];
  const int t = threadIdx.x;
  detr_fast::copy_16_async(first + t, values + t, true);
  detr_fast::commit_copies();
  detr_fast::copy_16_async(second + t, values + 64 + t, t % 2 == 0);
  detr_fast::commit_copies();
  Rows<unsigned> rows{out};
  detr_fast::wait_for_copies<1>();
  rows.put(first[t].x);
  detr_fast::wait_for_copies<0>();
  rows.put(first[t].y);
  rows.put(second[t].z);
  __syncthreads();
  rows.put(first[t ^ 33].w);
  rows.put(second[t ^ 33].x);
}

// 64 threads
extern "C" __global__ void powers_of_two(const float* values, float* out) {
  out[threadIdx.x] = detr_fast::exp2_fast(values[threadIdx.x]);
}

// 64 threads; two words each
extern "C" __global__ void packed_values(const float2* values, unsigned* out) {
  const float2 value = values[threadIdx.x];
  Rows<unsigned> rows{out};
  rows.put(detr_fast::pack<__half>(value.x, value.y));
  rows.put(detr_fast::pack<__nv_bfloat16>(value.x, value.y));
  const uint32_t low = unsigned(__float_as_int(value.x)), high = unsigned(__float_as_int(value.y));
  rows.put(detr_fast::spread_signs(low, high, 0xba98));
  rows.put(detr_fast::spread_signs(low, high, 0xcfed));
  rows.put(detr_fast::spread_signs(low, high, 0x8888 | (threadIdx.x % 8) << 4));
  rows.put(detr_fast::kOnes<__half>);
  rows.put(detr_fast::kOnes<__nv_bfloat16>);
}

CUDASIM_TEST_KERNEL(shuffles)
CUDASIM_TEST_KERNEL(shuffles_of_doubles)
CUDASIM_TEST_KERNEL(votes)
CUDASIM_TEST_KERNEL(reductions)
CUDASIM_TEST_KERNEL(partial_warp)
CUDASIM_TEST_KERNEL(atomics)
CUDASIM_TEST_KERNEL(atomics_of_floats)
CUDASIM_TEST_KERNEL(atomics_of_long_words)
CUDASIM_TEST_KERNEL(tickets)
CUDASIM_TEST_KERNEL(shared_memory)
CUDASIM_TEST_KERNEL(built_in_variables)
CUDASIM_TEST_KERNEL(integer_functions)
CUDASIM_TEST_KERNEL(float_functions)
CUDASIM_TEST_KERNEL(narrow_floats)
CUDASIM_TEST_KERNEL(matrix_products)
CUDASIM_TEST_KERNEL(matrix_loads)
CUDASIM_TEST_KERNEL(asynchronous_copies)
CUDASIM_TEST_KERNEL(powers_of_two)
CUDASIM_TEST_KERNEL(packed_values)
