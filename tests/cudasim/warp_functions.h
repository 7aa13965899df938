// SPDX-License-Identifier: Apache-2.0
// Barriers, warp shuffles, votes, reductions, matches and atomics, by the CUDA C++ Programming
// Guide. Where it leaves a result undefined (a lane that takes no part) the launch fails.
#pragma once

#include <cstring>

#include "cudasim.h"

namespace cudasim {

template <typename Value>
const Value& input_of(const Lanes& lanes, unsigned lane) {
  return *static_cast<const Value*>(lanes.in[lane]);
}

template <typename Value>
Value& output_of(const Lanes& lanes, unsigned lane) {
  return *static_cast<Value*>(lanes.out[lane]);
}

// Calls `action` with every lane that takes part.
template <typename Action>
CUDASIM_UNCHECKED void for_each_lane(const Lanes& lanes, Action action) {
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if (lanes.mask >> lane & 1) action(lane);
  }
}

template <typename Value>
struct ShuffleInput {
  Value value;
  int argument, width;
};

// The lane that `lane` reads from: sub-warps of `width` lanes; beyond their ends a lane keeps its
// own value.
struct ShuffleFrom {
  static int source(int lane, int from, int width) {
    return lane / width * width + (from & (width - 1));
  }
};
struct ShuffleUp {
  static int source(int lane, int delta, int width) {
    return lane % width < delta ? lane : lane - delta;
  }
};
struct ShuffleDown {
  static int source(int lane, int delta, int width) {
    return lane % width + delta >= width ? lane : lane + delta;
  }
};
struct ShuffleXor {  // may read an earlier sub-warp, but no later one
  static int source(int lane, int bits, int width) {
    return (lane ^ bits) >= lane / width * width + width ? lane : lane ^ bits;
  }
};

template <typename Mode, typename Value>
CUDASIM_UNCHECKED void combine_shuffle(Lanes& lanes) {
  for_each_lane(lanes, [&](unsigned lane) CUDASIM_UNCHECKED {
    const auto& own = input_of<ShuffleInput<Value>>(lanes, lane);
    const int source = Mode::source(int(lane), own.argument, own.width);
    if (source < 0 || source >= warpSize || !(lanes.mask >> source & 1)) {
      fail_missing_lane(lanes, lane, source);
    }
    output_of<Value>(lanes, lane) = input_of<ShuffleInput<Value>>(lanes, unsigned(source)).value;
  });
}

template <typename Mode, typename Value>
CUDASIM_UNCHECKED Value shuffle(const char* function, unsigned mask, Value value, int argument,
                                int width, Location caller) {
  static_assert(std::is_trivially_copyable_v<Value>, "shuffles copy bits");
  static_assert(sizeof(Value) <= 8, "shuffles move at most 8 bytes");
  const ShuffleInput<Value> in{value, argument, width};
  Value out;
  warp_collective(function, mask, &in, &out, combine_shuffle<Mode, Value>, false, caller);
  return out;
}

// Folds the values of the lanes; every lane gets the result.
template <typename Value, typename Operation>
CUDASIM_UNCHECKED Value reduce(const char* function, unsigned mask, Value value, Operation,
                               Location caller) {
  Value out;
  const auto combine = [](Lanes& lanes) CUDASIM_UNCHECKED {
    const unsigned first = unsigned(__builtin_ctz(lanes.mask));
    Value total = input_of<Value>(lanes, first);
    for_each_lane(lanes, [&](unsigned lane) CUDASIM_UNCHECKED {
      if (lane != first) total = Operation{}(total, input_of<Value>(lanes, lane));
    });
    for_each_lane(lanes,
                  [&](unsigned lane) CUDASIM_UNCHECKED { output_of<Value>(lanes, lane) = total; });
  };
  warp_collective(function, mask, &value, &out, combine, false, caller);
  return out;
}

inline CUDASIM_UNCHECKED unsigned ballot(const char* function, unsigned mask, bool predicate,
                                         Location caller) {
  const unsigned bit = predicate ? 1u << current_thread->lane : 0;
  const auto either = [](unsigned a, unsigned b) { return a | b; };
  return reduce(function, mask, bit, either, caller);
}

// Fibers switch at accesses that are checked, so unchecked code is atomic.
template <typename Value, typename Update>
CUDASIM_UNCHECKED Value atomic_update(Value* address, void* pc, Update update) {
  atomic_access(address, sizeof(Value), pc);
  const Value old = *address;
  *address = update(old);
  return old;
}

template <typename Value>
using NotDeduced = std::common_type_t<Value>;

}  // namespace cudasim

inline void __syncthreads(CUDASIM_CALLER) {
  ::cudasim::block_barrier(::cudasim::Vote::kNone, false, caller);
}
inline int __syncthreads_count(int predicate, CUDASIM_CALLER) {
  return ::cudasim::block_barrier(::cudasim::Vote::kCount, predicate, caller);
}
inline int __syncthreads_and(int predicate, CUDASIM_CALLER) {
  return ::cudasim::block_barrier(::cudasim::Vote::kAnd, predicate, caller);
}
inline int __syncthreads_or(int predicate, CUDASIM_CALLER) {
  return ::cudasim::block_barrier(::cudasim::Vote::kOr, predicate, caller);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDASIM_CALLER) {
  ::cudasim::warp_collective("__syncwarp", mask, nullptr, nullptr, nullptr, true, caller);
}

#define CUDASIM_SHUFFLE(name, Mode, Argument)                                                     \
  template <typename Value>                                                                       \
  Value name(unsigned mask, Value value, Argument argument, int width = warpSize,                 \
             CUDASIM_CALLER) {                                                                    \
    return ::cudasim::shuffle<::cudasim::Mode>(#name, mask, value, int(argument), width, caller); \
  }
CUDASIM_SHUFFLE(__shfl_sync, ShuffleFrom, int)
CUDASIM_SHUFFLE(__shfl_up_sync, ShuffleUp, unsigned)
CUDASIM_SHUFFLE(__shfl_down_sync, ShuffleDown, unsigned)
CUDASIM_SHUFFLE(__shfl_xor_sync, ShuffleXor, int)
#undef CUDASIM_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDASIM_CALLER) {
  return ::cudasim::ballot("__ballot_sync", mask, predicate, caller);
}
inline int __any_sync(unsigned mask, int predicate, CUDASIM_CALLER) {
  return ::cudasim::ballot("__any_sync", mask, predicate, caller) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDASIM_CALLER) {
  return ::cudasim::ballot("__all_sync", mask, !predicate, caller) == 0;
}

#define CUDASIM_REDUCE(name, Value, expression)                                  \
  inline Value name(unsigned mask, Value value, CUDASIM_CALLER) {                \
    const auto operation = [](Value a, Value b) -> Value { return expression; }; \
    return ::cudasim::reduce(#name, mask, value, operation, caller);             \
  }
CUDASIM_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
CUDASIM_REDUCE(__reduce_add_sync, unsigned, a + b)
CUDASIM_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CUDASIM_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CUDASIM_REDUCE(__reduce_max_sync, int, a > b ? a : b)
CUDASIM_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
CUDASIM_REDUCE(__reduce_and_sync, unsigned, a& b)
CUDASIM_REDUCE(__reduce_or_sync, unsigned, a | b)
CUDASIM_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef CUDASIM_REDUCE

template <typename Value>
CUDASIM_UNCHECKED unsigned __match_any_sync(unsigned mask, Value value, CUDASIM_CALLER) {
  unsigned out;
  const auto combine = [](::cudasim::Lanes& lanes) CUDASIM_UNCHECKED {
    ::cudasim::for_each_lane(lanes, [&](unsigned lane) CUDASIM_UNCHECKED {
      unsigned equal = 0;
      ::cudasim::for_each_lane(lanes, [&](unsigned other) CUDASIM_UNCHECKED {
        if (!std::memcmp(lanes.in[lane], lanes.in[other], sizeof(Value))) equal |= 1u << other;
      });
      ::cudasim::output_of<unsigned>(lanes, lane) = equal;
    });
  };
  ::cudasim::warp_collective("__match_any_sync", mask, &value, &out, combine, false, caller);
  return out;
}

// Calls, never inlined: their return address is the line of the kernel.
#define CUDASIM_ATOMIC_CALL CUDASIM_UNCHECKED __attribute__((noinline))

#define CUDASIM_ATOMIC(name, expression)                                                  \
  template <typename Value>                                                               \
  CUDASIM_ATOMIC_CALL Value name(Value* address, ::cudasim::NotDeduced<Value> value) {    \
    const auto update = [value](Value old)                                                \
                            CUDASIM_UNCHECKED { return static_cast<Value>(expression); }; \
    return ::cudasim::atomic_update(address, __builtin_return_address(0), update);        \
  }
CUDASIM_ATOMIC(atomicAdd, old + value)
CUDASIM_ATOMIC(atomicMin, value < old ? value : old)
CUDASIM_ATOMIC(atomicMax, old < value ? value : old)
CUDASIM_ATOMIC(atomicAnd, old& value)
CUDASIM_ATOMIC(atomicOr, old | value)
CUDASIM_ATOMIC(atomicXor, old ^ value)
CUDASIM_ATOMIC(atomicExch, ((void)old, value))
#undef CUDASIM_ATOMIC

template <typename Value>
CUDASIM_ATOMIC_CALL Value atomicCAS(Value* address, ::cudasim::NotDeduced<Value> expected,
                                    ::cudasim::NotDeduced<Value> value) {
  const auto update = [=](Value old) CUDASIM_UNCHECKED { return old == expected ? value : old; };
  return ::cudasim::atomic_update(address, __builtin_return_address(0), update);
}
#undef CUDASIM_ATOMIC_CALL
