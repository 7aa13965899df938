// SPDX-License-Identifier: Apache-2.0
// The scheduler: every CUDA thread of a block is a fiber that runs until it waits for others.
// Blocks run one after the other. Not thread-safe but for launches, which queue.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/fiber.h"

#define CUDASIM_EXPORT __attribute__((visibility("default")))

namespace cudasim {

constexpr unsigned kWarpLanes = 32;
constexpr size_t kMostShared = 227 << 10;  // of a block, compute capability 9.0 and 10.0

struct Location {
  const char* file;
  int line;
};

// The line of a kernel that calls an intrinsic: default arguments of the intrinsic take these.
#define CUDASIM_CALLER ::cudasim::Location caller = {__builtin_FILE(), __builtin_LINE()}

struct Thread {
  uint3 index;
  unsigned rank;  // within the block, x fastest
  unsigned lane, warp;
};

struct Block {
  uint3 index;
  dim3 size, grid;
};

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, size;
  size_t shared_bytes;
  bool checked;  // the kernel was compiled with calls of the checker
  void* call;    // kernel and arguments, for run_thread
  size_t call_bytes;
  void (*run_thread)(void* call);
};

CUDASIM_EXPORT extern Thread* current_thread;
CUDASIM_EXPORT extern Block current_block;

// Shared memory of a block: the device's, and what the launches of a kernel may have from then on.
CUDASIM_EXPORT size_t max_shared_bytes();
CUDASIM_EXPORT void allow_shared(const void* kernel, size_t bytes);

// Runs all blocks. Throws std::runtime_error with every fault found.
CUDASIM_EXPORT void run_grid(const Launch&);

// Ends the launch with an error that names the running thread; outside of a kernel it throws.
[[noreturn]] CUDASIM_EXPORT void fail(const std::string& fault, const std::string& place);
[[noreturn]] CUDASIM_EXPORT void fail(const std::string& fault, Location);

// What the lanes of a warp bring to a collective function and take from it.
struct Lanes {
  const void* in[kWarpLanes];
  void* out[kWarpLanes];
  unsigned mask;
  const char* function;
  Location location;
};
using Combine = void (*)(Lanes&);

// Waits for all lanes of `mask`; the last to arrive runs `combine` for all of them.
CUDASIM_EXPORT void warp_collective(const char* function, unsigned mask, const void* in, void* out,
                                    Combine combine, bool orders_memory, Location);

// Of a shuffle whose source lane is not among `lanes`.
[[noreturn]] CUDASIM_EXPORT void fail_missing_lane(const Lanes& lanes, unsigned lane, int source);

enum class Vote { kNone, kCount, kAnd, kOr };
CUDASIM_EXPORT int block_barrier(Vote, bool predicate, Location);

CUDASIM_EXPORT void* dynamic_shared_memory();
CUDASIM_EXPORT void atomic_access(const void* address, size_t bytes, void* pc);

// ---- within the runtime

enum class State : uint8_t { kReady, kInCollective, kInBarrier, kExited };

struct Fiber : Thread {
  Context context;
  State state;
  int vote_result;
  const char* waits_in;
  Location location;           // of what it waits in
  uint32_t clock[kWarpLanes];  // vector clock over the lanes of its warp, see checker.cpp
};

enum class Schedule { kForward, kReverse, kRandom };

struct Options {
  Schedule schedule = Schedule::kForward;
  uint64_t seed = 0;
  double preemption = 0;                  // chance that a thread is interrupted at a memory access
  bool strict = true;                     // no thread may exit while others need it in a barrier
  double watchdog_seconds = 10;           // of processor time that a thread may run without waiting
  size_t max_shared_bytes = kMostShared;  // of a block, at most kMostShared
};
extern Options options;

struct Statistics {
  uint64_t launches, switches, collectives, barriers, exits, accesses;
};
extern Statistics statistics;

extern std::vector<Fiber> fibers;  // those of the running block first
extern bool in_kernel;
extern uint32_t barrier_epoch;    // barriers that the running block has passed
extern std::string launch_error;  // empty while all is well

inline Fiber& current_fiber() { return static_cast<Fiber&>(*current_thread); }
std::string describe(const Thread&, uint3 block = current_block.index);
std::string describe(Location);

// Whether the running thread has to be stopped: it has run for too long.
bool watchdog_has_rung();

void begin_launch(unsigned threads, void (*run_thread)(void*), void* call);
void run_block();         // returns when all threads have exited or the launch has failed
void yield_to_another();  // the running thread stays ready
uint64_t random_number();
double random_fraction();

}  // namespace cudasim
