// SPDX-License-Identifier: Apache-2.0
// A launch: its limits, its blocks one by one, and signals that a kernel raises.
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "runtime/checker.h"
#include "runtime/control.h"
#include "runtime/image.h"

namespace cudasim {
namespace {

// Limits of compute capability 8.0 to 12.0 (CUDA C++ Programming Guide, technical specifications).
constexpr size_t kDefaultShared = 48 << 10;  // without cudaFuncSetAttribute
constexpr unsigned kMostDepth = 64;
constexpr unsigned kMostGridSide = 65535;
constexpr unsigned kMostGridWidth = 2147483647;

constexpr size_t kRedZone = 4096;  // beyond dynamic shared memory, holds kPattern
constexpr unsigned char kPoison = 0xff, kPattern = 0xfd;  // kPoison makes every float a NaN

std::mutex one_at_a_time;
std::map<const void*, size_t> allowed_shared;  // dynamic, by kernel
alignas(1024) unsigned char dynamic_shared[kMostShared + kRedZone];
volatile sig_atomic_t watchdog_rings;
uint64_t progress_at_last_ring;

// What is wrong with the shared memory of a launch whose static arrays take `static_bytes`: without
// an opt-in both kinds share the default limit, with one the dynamic kind has the limit to itself.
std::string shared_fault(const Launch& launch, size_t static_bytes) {
  const auto bytes_over = [](size_t bytes, const char* kind, size_t limit) {
    return std::to_string(bytes) + " bytes of " + kind + "shared memory, limit " +
           std::to_string(limit);
  };
  const auto entry = allowed_shared.find(launch.kernel);
  const bool opted_in = entry != allowed_shared.end();
  const size_t allowed = opted_in ? entry->second : 0;
  const size_t total = static_bytes + std::max(launch.shared_bytes, allowed);
  if (total > options.max_shared_bytes) return bytes_over(total, "", options.max_shared_bytes);
  if (!opted_in && total > kDefaultShared) {
    return bytes_over(total, "", kDefaultShared) + " without DETR_FAST_ALLOW_SHARED";
  }
  if (opted_in && launch.shared_bytes > allowed) {
    return bytes_over(launch.shared_bytes, "dynamic ", allowed) + " of DETR_FAST_ALLOW_SHARED";
  }
  return "";
}

void check_limits(const Launch& launch) {
  const auto refuse = [&launch](const std::string& why) {
    throw std::runtime_error("cudasim: launch of " + std::string(launch.name) + ": " + why);
  };
  const auto triple = [](dim3 d) {
    return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
  };
  const dim3 size = launch.size, grid = launch.grid;
  const size_t threads = size_t(size.x) * size.y * size.z;
  if (!threads || threads > kMostThreads || size.z > kMostDepth) {
    refuse("a block " + triple(size) + " is not of 1 to 1024 threads");
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > kMostGridWidth ||
      std::max(grid.y, grid.z) > kMostGridSide) {
    refuse("a grid " + triple(grid) + " is not within (2147483647,65535,65535)");
  }
  if (const std::string fault = shared_fault(launch, 0); !fault.empty()) refuse(fault);
}

std::string place_of(void* signal_context) {
  const auto* const context = static_cast<ucontext_t*>(signal_context);
  const auto pc = reinterpret_cast<const char*>(context->uc_mcontext.gregs[REG_RIP]);
  return source_line(image_offset(pc + 1));
}

// Runs on the signal stack and leaves it by a switch to the scheduler: nothing returns.
void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (!in_kernel) {  // not ours: the instruction raises it again, without this handler
    signal(signal_number, SIG_DFL);
    return;
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  const uintptr_t stack = current_fiber().context.stack;
  if (signal_number == SIGFPE) fail("integer division by zero", place_of(context));
  if (address < stack && address >= stack - 4096) {
    fail("stack overflow: more than 256 KiB of local memory", place_of(context));
  }
  char text[96];
  std::snprintf(text, sizeof text, "%s, address %p,", strsignal(signal_number), info->si_addr);
  fail(text, place_of(context));
}

// A thread that runs for seconds without ever waiting spins on memory, or never ends. The checker
// stops it at its next access; a loop without accesses is stopped here, at the second ring.
void on_watchdog(int, siginfo_t*, void* context) {
  const uint64_t progress = statistics.collectives + statistics.barriers + statistics.exits;
  if (!in_kernel || progress != progress_at_last_ring) {
    progress_at_last_ring = progress;
    watchdog_rings = 0;
  } else if (++watchdog_rings > 1) {
    fail("endless loop", place_of(context));
  }
}

// Signals of a kernel become errors of the launch for as long as this lives.
class Signals {
 public:
  Signals() {
    static char memory[64 << 10];
    stack_t stack{};
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      action.sa_sigaction = kSignals[i] == SIGVTALRM ? on_watchdog : on_fault;
      sigaction(kSignals[i], &action, &old_actions_[i]);
    }
    struct sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGVTALRM;
    event._sigev_un._tid = int(syscall(SYS_gettid));
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_);
    const double whole = std::floor(options.watchdog_seconds);
    const timespec period{time_t(whole), long((options.watchdog_seconds - whole) * 1e9)};
    const itimerspec repeated{period, period};
    timer_settime(timer_, 0, &repeated, nullptr);
    watchdog_rings = 0;
  }
  ~Signals() {
    timer_delete(timer_);
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      sigaction(kSignals[i], &old_actions_[i], nullptr);
    }
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
  stack_t old_stack_{};
  struct sigaction old_actions_[std::size(kSignals)];
  timer_t timer_;
};

std::vector<size_t> block_order(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (options.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (options.schedule == Schedule::kRandom) {
    for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  }
  return order;
}

void poison_shared_memory(const Launch& launch) {
  const Segment shared = shared_segment();
  std::memset(dynamic_shared, kPoison, launch.shared_bytes);
  std::memset(dynamic_shared + launch.shared_bytes, kPattern, kRedZone);
  if (shared.bytes) std::memset(reinterpret_cast<void*>(shared.begin), kPoison, shared.bytes);
  begin_checked_block();
}

void check_red_zone(const Launch& launch) {
  const unsigned char* const zone = dynamic_shared + launch.shared_bytes;
  const auto* const hit =
      std::find_if(zone, zone + kRedZone, [](unsigned char byte) { return byte != kPattern; });
  if (hit == zone + kRedZone) return;
  launch_error = "out-of-bounds write, " + std::to_string(hit - zone) +
                 " bytes past the end of dynamic shared memory";
}

}  // namespace

bool watchdog_has_rung() { return watchdog_rings > 0; }

void* dynamic_shared_memory() { return dynamic_shared; }

size_t max_shared_bytes() { return options.max_shared_bytes; }

void allow_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  allowed_shared[kernel] = bytes;
}

void run_grid(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ++statistics.launches;
  check_limits(launch);
  const dim3 grid = launch.grid;
  current_block = {{}, launch.size, grid};
  select_image(launch.kernel);
  begin_launch(launch.size.x * launch.size.y * launch.size.z, launch.run_thread, launch.call);
  begin_checked_launch(launch);
  const Signals signals;
  for (const size_t block : block_order(size_t(grid.x) * grid.y * grid.z)) {
    current_block.index = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y),
                           unsigned(block / grid.x / grid.y)};
    poison_shared_memory(launch);
    run_block();
    if (launch_error.empty()) check_red_zone(launch);
    if (launch_error.empty()) launch_error = shared_fault(launch, used_static_bytes());
    if (!launch_error.empty()) break;
  }
  std::vector<std::string> faults = found_faults();
  if (!launch_error.empty()) faults.push_back(launch_error);
  record_faults(faults);
  if (faults.empty()) return;
  std::string message = "cudasim: launch of " + std::string(launch.name) + ": ";
  for (const std::string& fault : faults) message += (&fault == &faults[0] ? "" : "\n") + fault;
  throw std::runtime_error(message);
}

}  // namespace cudasim
