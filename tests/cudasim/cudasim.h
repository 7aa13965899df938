// SPDX-License-Identifier: Apache-2.0
// cudasim: run CUDA C++ kernel sources on the host, one fiber per CUDA thread.
// Header part: keywords, built-in variables, intrinsics.  The scheduler, the checker and
// the sanitizer hooks are in cudasim_rt.cpp.  For tests only; never part of a release build.
#pragma once
#if defined(__CUDACC__)
#error "cudasim.h is for host (g++) builds only"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>

// ---- keywords.  CUDA's host headers turn these into unknown attributes under g++, which would
// make a __shared__ array silently thread-private, so they are redefined here, after the CUDA
// headers.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
// static: one copy per block (blocks run one at a time).  thread_local: puts all of them, templates
// included, in the module's PT_TLS segment, where the runtime finds, poisons and shadows them.
#define __shared__ static thread_local
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline

#define CUDASIM_NOSAN __attribute__((no_sanitize("thread"), no_sanitize("address")))
#define CUDASIM_LOC const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define CUDASIM_HERE \
  ::cudasim::Loc { file_, line_ }

namespace cudasim {

struct Loc {
  const char* file;
  int line;
};

struct Fiber;  // opaque but for the head
struct FiberHead {
  uint3 tid;
  unsigned linear, lane, warp;
};
struct BlockVars {
  uint3 bid;
  dim3 bdim, gdim;
};
extern FiberHead* g_cur;  // the running CUDA thread
extern BlockVars g_blk;

// A warp collective: the last lane to arrive runs `fn` once, for all lanes.
struct Lanes {
  const void* in[32];
  void* out[32];
  unsigned mask;
  const char* what;
  Loc loc;
};
using Combine = void (*)(Lanes&);
void warp_op(const char* what, unsigned mask, const void* in, void* out, Combine fn, bool full_warp,
             bool orders_memory, Loc);
int block_sync(int kind, int pred, Loc);  // kind: 0 plain, 1 count, 2 and, 3 or
unsigned active_mask();
void* dyn_smem();
[[noreturn]] void fail(const std::string&);  // stop this launch with an error
void note_access(const void* p, size_t n, bool write, bool atomic);  // for the checker
void cp_async(void* dst, const void* src, unsigned bytes, unsigned src_bytes);
void cp_async_commit();
void cp_async_wait(int leave_pending);
void smem_opt_in(const void* kernel, size_t bytes);
void run_grid(const char* name, const void* kernel, dim3 grid, dim3 block, size_t smem,
              void (*body)(void*), void* ctx, size_t ctx_size);

template <class T>
struct Raw {
  alignas(alignof(T) > 16 ? alignof(T) : 16) unsigned char bytes[sizeof(T)];
};
template <class... P, class... A>
void launch(const char* name, void (*k)(P...), dim3 grid, dim3 block, size_t smem, A&&... a) {
  struct Ctx {
    void (*k)(P...);
    std::tuple<std::decay_t<P>...> args;
  };
  Ctx c{k, std::tuple<std::decay_t<P>...>(static_cast<std::decay_t<P>>(a)...)};
  run_grid(
      name, (const void*)k, grid, block, smem,
      [](void* p) CUDASIM_NOSAN {
        auto* q = static_cast<Ctx*>(p);
        std::apply(q->k, q->args);
      },
      &c, sizeof c);
}

template <class T>
const T& in_of(const Lanes& L, unsigned l) {
  return *static_cast<const T*>(L.in[l]);
}
template <class T>
T& out_of(Lanes& L, unsigned l) {
  return *static_cast<T*>(L.out[l]);
}

enum { SHFL_IDX, SHFL_UP, SHFL_DOWN, SHFL_XOR };
template <class T>
struct ShflIn {
  T v;
  int arg, width;
};
template <class T, int MODE>
CUDASIM_NOSAN void shfl_combine(Lanes& L) {
  for (unsigned l = 0; l < 32; ++l) {
    if (!(L.mask >> l & 1)) continue;
    const auto& me = in_of<ShflIn<T>>(L, l);
    int w = me.width, base = int(l) / w * w, src;
    if (MODE == SHFL_IDX)
      src = base + (me.arg & (w - 1));
    else if (MODE == SHFL_UP)
      src = (int(l) - base) - me.arg < 0 ? int(l) : int(l) - me.arg;
    else if (MODE == SHFL_DOWN)
      src = (int(l) - base) + me.arg >= w ? int(l) : int(l) + me.arg;
    else {
      src = int(l) ^ me.arg;
      if (src >= base + w) src = int(l);
    }
    if (src < 0 || src > 31 || !(L.mask >> src & 1))
      fail(std::string(L.what) + ": lane " + std::to_string(l) + " reads lane " +
           std::to_string(src) + ", which does not take part (" + L.loc.file + ":" +
           std::to_string(L.loc.line) + ")");
    out_of<T>(L, l) = in_of<ShflIn<T>>(L, unsigned(src)).v;
  }
}
template <int MODE, class T>
CUDASIM_NOSAN T shfl(const char* what, unsigned m, T v, int a, int w, Loc loc) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8,
                "shuffles move 4- or 8-byte values");
  ShflIn<T> in{v, a, w};
  T out;
  warp_op(what, m, &in, &out, shfl_combine<T, MODE>, false, false, loc);
  return out;
}
template <class T, class F>
CUDASIM_NOSAN T reduce(const char* what, unsigned m, T v, F, Loc loc) {
  T out;
  warp_op(
      what, m, &v, &out,
      [](Lanes& L) CUDASIM_NOSAN {
        bool first = true;
        T acc{};
        for (unsigned l = 0; l < 32; ++l)
          if (L.mask >> l & 1) {
            T x = in_of<T>(L, l);
            acc = first ? x : F{}(acc, x);
            first = false;
          }
        for (unsigned l = 0; l < 32; ++l)
          if (L.mask >> l & 1) out_of<T>(L, l) = acc;
      },
      false, false, loc);
  return out;
}
inline CUDASIM_NOSAN unsigned ballot(const char* what, unsigned m, int pred, Loc loc) {
  int in = pred != 0;
  unsigned out;
  warp_op(
      what, m, &in, &out,
      [](Lanes& L) CUDASIM_NOSAN {
        unsigned r = 0;
        for (unsigned l = 0; l < 32; ++l)
          if (L.mask >> l & 1) r |= unsigned(in_of<int>(L, l)) << l;
        for (unsigned l = 0; l < 32; ++l)
          if (L.mask >> l & 1) out_of<unsigned>(L, l) = r;
      },
      false, false, loc);
  return out;
}
struct OpAdd {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct OpMin {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct OpMax {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct OpAnd {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct OpOr {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct OpXor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
template <class T, class F>
CUDASIM_NOSAN T atomic_rmw(T* p, F f) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) fail("misaligned atomic");
  note_access(p, sizeof(T), true, true);
  T old = *p;
  *p = f(old);
  return old;
}
}  // namespace cudasim

#define threadIdx (::cudasim::g_cur->tid)
#define blockIdx (::cudasim::g_blk.bid)
#define blockDim (::cudasim::g_blk.bdim)
#define gridDim (::cudasim::g_blk.gdim)
constexpr int warpSize = 32;

// ---- barriers
inline void __syncthreads(CUDASIM_LOC) { ::cudasim::block_sync(0, 0, CUDASIM_HERE); }
inline int __syncthreads_count(int p, CUDASIM_LOC) {
  return ::cudasim::block_sync(1, p, CUDASIM_HERE);
}
inline int __syncthreads_and(int p, CUDASIM_LOC) {
  return ::cudasim::block_sync(2, p, CUDASIM_HERE);
}
inline int __syncthreads_or(int p, CUDASIM_LOC) {
  return ::cudasim::block_sync(3, p, CUDASIM_HERE);
}
inline void __syncwarp(unsigned m = 0xffffffffu, CUDASIM_LOC) {
  ::cudasim::warp_op(
      "__syncwarp", m, nullptr, nullptr, [](::cudasim::Lanes&) {}, false, true, CUDASIM_HERE);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline unsigned __activemask() { return ::cudasim::active_mask(); }

// ---- warp functions
template <class T>
T __shfl_sync(unsigned m, T v, int s, int w = 32, CUDASIM_LOC) {
  return ::cudasim::shfl<::cudasim::SHFL_IDX>("__shfl_sync", m, v, s, w, CUDASIM_HERE);
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, CUDASIM_LOC) {
  return ::cudasim::shfl<::cudasim::SHFL_UP>("__shfl_up_sync", m, v, int(d), w, CUDASIM_HERE);
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, CUDASIM_LOC) {
  return ::cudasim::shfl<::cudasim::SHFL_DOWN>("__shfl_down_sync", m, v, int(d), w, CUDASIM_HERE);
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, CUDASIM_LOC) {
  return ::cudasim::shfl<::cudasim::SHFL_XOR>("__shfl_xor_sync", m, v, x, w, CUDASIM_HERE);
}
inline unsigned __ballot_sync(unsigned m, int p, CUDASIM_LOC) {
  return ::cudasim::ballot("__ballot_sync", m, p, CUDASIM_HERE);
}
inline int __any_sync(unsigned m, int p, CUDASIM_LOC) {
  return ::cudasim::ballot("__any_sync", m, p, CUDASIM_HERE) != 0;
}
inline int __all_sync(unsigned m, int p, CUDASIM_LOC) {
  return ::cudasim::ballot("__all_sync", m, !p, CUDASIM_HERE) == 0;
}
#define CUDASIM_REDUCE(name, OP)                                          \
  inline unsigned name(unsigned m, unsigned v, CUDASIM_LOC) {             \
    return ::cudasim::reduce(#name, m, v, ::cudasim::OP{}, CUDASIM_HERE); \
  }                                                                       \
  inline int name(unsigned m, int v, CUDASIM_LOC) {                       \
    return ::cudasim::reduce(#name, m, v, ::cudasim::OP{}, CUDASIM_HERE); \
  }
CUDASIM_REDUCE(__reduce_add_sync, OpAdd)
CUDASIM_REDUCE(__reduce_min_sync, OpMin)
CUDASIM_REDUCE(__reduce_max_sync, OpMax)
CUDASIM_REDUCE(__reduce_and_sync, OpAnd)
CUDASIM_REDUCE(__reduce_or_sync, OpOr)
CUDASIM_REDUCE(__reduce_xor_sync, OpXor)
template <class T>
unsigned __match_any_sync(unsigned m, T v, CUDASIM_LOC) {
  unsigned out;
  ::cudasim::warp_op(
      "__match_any_sync", m, &v, &out,
      [](::cudasim::Lanes& L) CUDASIM_NOSAN {
        for (unsigned l = 0; l < 32; ++l)
          if (L.mask >> l & 1) {
            unsigned r = 0;
            for (unsigned k = 0; k < 32; ++k)
              if (L.mask >> k & 1 && !std::memcmp(L.in[l], L.in[k], sizeof(T))) r |= 1u << k;
            ::cudasim::out_of<unsigned>(L, l) = r;
          }
      },
      false, false, CUDASIM_HERE);
  return out;
}

// ---- atomics (fibers are cooperative, so plain code is atomic)
template <class T>
using cudasim_id = std::common_type_t<T>;  // no deduction from the value operand
template <class T>
T atomicAdd(T* p, cudasim_id<T> v) {
  return ::cudasim::atomic_rmw(p, [=](T o) CUDASIM_NOSAN { return T(o + v); });
}
template <class T>
T atomicSub(T* p, cudasim_id<T> v) {
  return ::cudasim::atomic_rmw(p, [=](T o) CUDASIM_NOSAN { return T(o - v); });
}
template <class T>
T atomicMin(T* p, cudasim_id<T> v) {
  return ::cudasim::atomic_rmw(p, [=](T o) CUDASIM_NOSAN { return v < o ? v : o; });
}
template <class T>
T atomicMax(T* p, cudasim_id<T> v) {
  return ::cudasim::atomic_rmw(p, [=](T o) CUDASIM_NOSAN { return o < v ? v : o; });
}
template <class T>
T atomicAnd(T* p, cudasim_id<T> v) {
  return ::cudasim::atomic_rmw(p, [=](T o) CUDASIM_NOSAN { return T(o & v); });
}
template <class T>
T atomicOr(T* p, cudasim_id<T> v) {
  return ::cudasim::atomic_rmw(p, [=](T o) CUDASIM_NOSAN { return T(o | v); });
}
template <class T>
T atomicXor(T* p, cudasim_id<T> v) {
  return ::cudasim::atomic_rmw(p, [=](T o) CUDASIM_NOSAN { return T(o ^ v); });
}
template <class T>
T atomicExch(T* p, cudasim_id<T> v) {
  return ::cudasim::atomic_rmw(p, [=](T) CUDASIM_NOSAN { return v; });
}
template <class T>
T atomicCAS(T* p, cudasim_id<T> c, cudasim_id<T> v) {
  return ::cudasim::atomic_rmw(p, [=](T o) CUDASIM_NOSAN { return o == c ? v : o; });
}

// ---- loads and stores with cache hints
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

// ---- scalar intrinsics
template <class D, class S>
inline D cudasim_bits(S s) {
  static_assert(sizeof(D) == sizeof(S));
  D d;
  std::memcpy(&d, &s, sizeof d);
  return d;
}
inline int __float_as_int(float f) { return cudasim_bits<int>(f); }
inline unsigned __float_as_uint(float f) { return cudasim_bits<unsigned>(f); }
inline float __int_as_float(int i) { return cudasim_bits<float>(i); }
inline float __uint_as_float(unsigned i) { return cudasim_bits<float>(i); }
inline long long __double_as_longlong(double d) { return cudasim_bits<long long>(d); }
inline double __longlong_as_double(long long d) { return cudasim_bits<double>(d); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a < 0.f ? 0.f : a > 1.f ? 1.f : a; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::isfinite;
using std::isinf;
using std::isnan;
template <class A, class B>
constexpr auto min(A a, B b) -> std::common_type_t<A, B> {
  return b < a ? b : a;
}
template <class A, class B>
constexpr auto max(A a, B b) -> std::common_type_t<A, B> {
  return a < b ? b : a;
}
// half/bfloat16 operations that CUDA's headers give to device code only
inline __half __hfma(__half a, __half b, __half c) {
  return __float2half_rn(std::fma(__half2float(a), __half2float(b), __half2float(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __float2bfloat16_rn(
      std::fma(__bfloat162float(a), __bfloat162float(b), __bfloat162float(c)));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}
[[noreturn]] inline void __trap() { ::cudasim::fail("__trap()"); }
inline long long clock64() {
  static long long t;
  return t += 100;
}
