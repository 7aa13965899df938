// SPDX-License-Identifier: Apache-2.0
// Which thread runs next, barriers, warp collectives, exits and deadlocks.
#include "runtime/scheduler.h"

#include <cstring>
#include <map>
#include <random>
#include <stdexcept>

#include "runtime/checker.h"
#include "runtime/copies.h"

namespace cudasim {

Thread* current_thread;
Block current_block;
Options options;
Statistics statistics;
std::vector<Fiber> fibers;
bool in_kernel;
uint32_t barrier_epoch;
std::string launch_error;

namespace {

// A collective function that some lanes have reached.
struct Rendezvous {
  Lanes lanes;
  unsigned arrived;
  Combine combine;
  bool orders_memory;
};

struct Warp {
  unsigned ready = 0, exited = 0;  // masks of lanes
  unsigned missing = 0;            // lanes that the last warp of a block never had: exited as well
  std::vector<Rendezvous> open;
};

struct Barrier {
  unsigned arrived = 0;
  Vote vote;
  Location location;
  unsigned votes;  // threads with a true predicate
};

std::vector<Warp> warps;
Barrier barrier;
unsigned thread_count, alive;
unsigned current_warp;
Context scheduler;
void (*run_thread)(void*);
void* thread_call;
std::mt19937_64 generator;

unsigned lane_bit(const Thread& thread) { return 1u << thread.lane; }

void resume(Fiber& fiber, Context& from) {
  ++statistics.switches;
  current_thread = &fiber;
  switch_context(from, fiber.context);
}

// The k-th set bit of `mask`.
unsigned nth_lane(unsigned mask, unsigned k) {
  while (k--) mask &= mask - 1;
  return unsigned(__builtin_ctz(mask));
}

// Stays in the current warp for 8 threads on average: schedules differ most where whole warps run
// far ahead of others.
Fiber* pick_at_random() {
  const unsigned count = unsigned(warps.size());
  if (!warps[current_warp].ready || generator() % 8 == 0) {
    const unsigned first = unsigned(generator() % count);
    unsigned step = 0;
    while (step < count && !warps[(first + step) % count].ready) ++step;
    if (step == count) return nullptr;
    current_warp = (first + step) % count;
  }
  const unsigned ready = warps[current_warp].ready;
  const unsigned k = unsigned(generator() % unsigned(__builtin_popcount(ready)));
  return &fibers[current_warp * kWarpLanes + nth_lane(ready, k)];
}

// The thread to run next, or null where none can.
Fiber* pick() {
  if (options.schedule == Schedule::kRandom) return pick_at_random();
  const bool forward = options.schedule == Schedule::kForward;
  const unsigned count = unsigned(warps.size());
  for (unsigned step = 0; step < count; ++step) {
    const unsigned warp = (current_warp + (forward ? step : count - step)) % count;
    const unsigned ready = warps[warp].ready;
    if (!ready) continue;
    current_warp = warp;
    const int lane = forward ? __builtin_ctz(ready) : 31 - __builtin_clz(ready);
    return &fibers[warp * kWarpLanes + unsigned(lane)];
  }
  return nullptr;
}

std::string describe(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

// Leaves the kernel for good; fibers that have not exited are abandoned on their stacks.
[[noreturn]] void stop(const std::string& error) {
  launch_error = error;
  switch_context(current_fiber().context, scheduler);
  __builtin_unreachable();
}

[[noreturn]] void report_deadlock() {
  constexpr size_t kShown = 4;
  std::map<std::string, std::vector<const Fiber*>> groups;
  for (unsigned rank = 0; rank < thread_count; ++rank) {
    const Fiber& fiber = fibers[rank];
    if (fiber.state == State::kExited) continue;
    groups[std::string(fiber.waits_in) + " at " + describe(fiber.location)].push_back(&fiber);
  }
  std::string error = "deadlock: no thread can run";
  for (const auto& [place, waiting] : groups) {
    error += "; " + std::to_string(waiting.size()) + " wait in " + place + ":";
    for (size_t i = 0; i < waiting.size() && i < kShown; ++i) error += " " + describe(*waiting[i]);
    if (waiting.size() > kShown) error += " ...";
  }
  if (alive < thread_count) error += "; " + std::to_string(thread_count - alive) + " have exited";
  stop(error);
}

void wait(Fiber& fiber, State state, const char* function, Location location) {
  fiber.state = state;
  fiber.waits_in = function;
  fiber.location = location;
  warps[fiber.warp].ready &= ~lane_bit(fiber);
  Fiber* const next = pick();
  if (!next) report_deadlock();
  if (next != &fiber) resume(*next, fiber.context);
}

void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  warps[fiber.warp].ready |= lane_bit(fiber);
}

void release_barrier() {
  ++statistics.barriers;
  ++barrier_epoch;
  const int result = barrier.vote == Vote::kCount ? int(barrier.votes)
                     : barrier.vote == Vote::kAnd ? barrier.votes == barrier.arrived
                                                  : barrier.votes > 0;
  barrier.arrived = 0;
  for (unsigned rank = 0; rank < thread_count; ++rank) {
    if (fibers[rank].state != State::kInBarrier) continue;
    fibers[rank].vote_result = result;
    make_ready(fibers[rank]);
  }
}

void complete(Warp& warp, size_t position) {
  ++statistics.collectives;
  Rendezvous met = warp.open[position];
  warp.open.erase(warp.open.begin() + ptrdiff_t(position));
  met.lanes.mask = met.arrived;
  if (met.combine) met.combine(met.lanes);
  const size_t first = size_t(&warp - warps.data()) * kWarpLanes;
  if (met.orders_memory) order_lanes(&fibers[first], met.arrived);
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if (met.arrived >> lane & 1) make_ready(fibers[first + lane]);
  }
}

bool is_complete(const Warp& warp, const Rendezvous& meeting) {
  return !(meeting.lanes.mask & ~(meeting.arrived | warp.exited));
}

// On Volta and later exited threads count as arrived, so a kernel that leaves early may work; but
// older code is written with it by mistake, and __syncthreads with votes differs: strict refuses.
void note_exit(Fiber& fiber) {
  require_no_copies();
  Warp& warp = warps[fiber.warp];
  fiber.state = State::kExited;
  ++statistics.exits;
  --alive;
  warp.ready &= ~lane_bit(fiber);
  warp.exited |= lane_bit(fiber);
  for (size_t i = 0; i < warp.open.size();) {
    const Lanes& lanes = warp.open[i].lanes;
    if (options.strict && lanes.mask >> fiber.lane & 1) {
      fail(std::string("exit of a thread that its warp waits for in ") + lanes.function,
           lanes.location);
    }
    if (is_complete(warp, warp.open[i])) {
      complete(warp, i);
      i = 0;
    } else {
      ++i;
    }
  }
  if (!alive || !barrier.arrived) return;
  if (options.strict)
    fail("exit of a thread that others wait for in __syncthreads", barrier.location);
  if (barrier.arrived == alive) release_barrier();
}

void fiber_main() {
  run_thread(thread_call);
  Fiber& fiber = current_fiber();
  note_exit(fiber);
  Fiber* const next = pick();
  if (next) resume(*next, fiber.context);
  if (alive) report_deadlock();
  switch_context(fiber.context, scheduler);
  __builtin_unreachable();
}

}  // namespace

std::string describe(const Thread& thread, uint3 block) {
  return "thread " + describe(thread.index) + " [warp " + std::to_string(thread.warp) + " lane " +
         std::to_string(thread.lane) + "] of block " + describe(block);
}

std::string describe(Location location) {
  const char* const slash = std::strrchr(location.file, '/');
  return std::string(slash ? slash + 1 : location.file) + ":" + std::to_string(location.line);
}

void fail(const std::string& fault, const std::string& place) {
  if (!in_kernel) throw std::runtime_error("cudasim: " + fault + " at " + place);
  stop(fault + " by " + describe(*current_thread) + " at " + place);
}

void fail_missing_lane(const Lanes& lanes, unsigned lane, int source) {
  const std::string lanes_text = std::to_string(lane) + " reads lane " + std::to_string(source);
  fail(std::string(lanes.function) + ": lane " + lanes_text + ", which takes no part; seen",
       lanes.location);
}

void fail(const std::string& fault, Location location) { fail(fault, describe(location)); }

void warp_collective(const char* function, unsigned mask, const void* in, void* out,
                     Combine combine, bool orders_memory, Location location) {
  Fiber& fiber = current_fiber();
  Warp& warp = warps[fiber.warp];
  const std::string name = function;
  if (!(mask & lane_bit(fiber))) fail(name + " by a lane that is not in its mask", location);
  if (options.strict && mask & warp.exited & ~warp.missing)
    fail(name + " with lanes that have exited", location);
  size_t position = 0;
  while (position < warp.open.size() && warp.open[position].lanes.mask != mask) ++position;
  if (position == warp.open.size()) {
    warp.open.push_back({{{}, {}, mask, function, location}, 0, combine, orders_memory});
  }
  Rendezvous& meeting = warp.open[position];
  if (meeting.combine != combine || meeting.lanes.location.line != location.line) {
    fail("divergent warp: other lanes of its mask wait in " + std::string(meeting.lanes.function) +
             " at " + describe(meeting.lanes.location) + "; " + name,
         location);
  }
  meeting.lanes.in[fiber.lane] = in;
  meeting.lanes.out[fiber.lane] = out;
  meeting.arrived |= lane_bit(fiber);
  if (is_complete(warp, meeting)) {
    complete(warp, position);
  } else {
    wait(fiber, State::kInCollective, function, location);
  }
}

int block_barrier(Vote vote, bool predicate, Location location) {
  Fiber& fiber = current_fiber();
  if (options.strict && alive < thread_count) {
    fail("__syncthreads without " + std::to_string(thread_count - alive) +
             " threads of the block that have exited",
         location);
  }
  if (!barrier.arrived) {
    barrier = {0, vote, location, 0};
  } else if (barrier.location.line != location.line || barrier.vote != vote) {
    fail("divergent barrier: others wait in __syncthreads at " + describe(barrier.location) +
             "; __syncthreads",
         location);
  }
  ++barrier.arrived;
  barrier.votes += predicate;
  if (barrier.arrived < alive) {
    wait(fiber, State::kInBarrier, "__syncthreads", location);
  } else {
    fiber.state = State::kInBarrier;
    release_barrier();
  }
  return fiber.vote_result;
}

void begin_launch(unsigned threads, void (*thread_function)(void*), void* call) {
  if (fibers.empty()) {
    fibers.resize(kMostThreads);
    for (size_t rank = 0; rank < fibers.size(); ++rank) assign_stack(fibers[rank].context, rank);
  }
  thread_count = threads;
  run_thread = thread_function;
  thread_call = call;
  generator.seed(options.seed);
  launch_error.clear();
  const dim3 size = current_block.size;
  for (unsigned rank = 0; rank < threads; ++rank) {
    Fiber& fiber = fibers[rank];
    fiber.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
    fiber.rank = rank;
    fiber.lane = rank % kWarpLanes;
    fiber.warp = rank / kWarpLanes;
  }
}

void run_block() {
  alive = thread_count;
  barrier = {};
  barrier_epoch = 0;
  drop_copies();
  warps.assign((thread_count + kWarpLanes - 1) / kWarpLanes, Warp{});
  if (const unsigned lanes = thread_count % kWarpLanes) {
    warps.back().missing = warps.back().exited = ~0u << lanes;
  }
  for (unsigned rank = 0; rank < thread_count; ++rank) {
    Fiber& fiber = fibers[rank];
    prepare(fiber.context, fiber_main);
    std::memset(fiber.clock, 0, sizeof fiber.clock);
    fiber.clock[fiber.lane] = 1;
    make_ready(fiber);
  }
  current_warp = options.schedule == Schedule::kReverse ? unsigned(warps.size()) - 1 : 0;
  in_kernel = true;
  resume(*pick(), scheduler);
  in_kernel = false;
}

void yield_to_another() {
  Fiber& fiber = current_fiber();
  Fiber* const next = pick();
  if (next != &fiber) resume(*next, fiber.context);
}

uint64_t random_number() { return generator(); }

double random_fraction() { return double(generator() >> 11) * 0x1p-53; }

}  // namespace cudasim
