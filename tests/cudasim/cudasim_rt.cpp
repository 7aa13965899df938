// SPDX-License-Identifier: Apache-2.0
// cudasim runtime: fibers, scheduler, barriers, warp collectives, checker.  Build WITHOUT
// -fsanitize=thread. Kernel translation units may be built with -fsanitize=thread: GCC then calls
// __tsan_readN/__tsan_writeN for every load and store, and this file defines those functions
// (libtsan is never linked).
#include <link.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "cudasim.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
#else
#define ASAN 0
#endif
#if !defined(__x86_64__)
#define CUDASIM_UCONTEXT 1
#endif
#if CUDASIM_UCONTEXT
#include <ucontext.h>
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

// ------------------------------------------------------------------ context switch
#if !CUDASIM_UCONTEXT
extern "C" void cudasim_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.p2align 4
.hidden cudasim_switch
.globl cudasim_switch
.type cudasim_switch,@function
cudasim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cudasim_switch,.-cudasim_switch
)");
#endif

namespace cudasim {
FiberHead* g_cur;
BlockVars g_blk;

namespace {
enum State : uint8_t { READY, WAIT_WARP, WAIT_BLOCK, DONE };
struct Copy {
  char* dst;
  const char* src;
  unsigned bytes, src_bytes;
  void* pc;
};
}  // namespace

struct Fiber : FiberHead {
#if CUDASIM_UCONTEXT
  ucontext_t uc;
#endif
  void* sp;
  char* stack;  // lowest usable byte
  State state;
  int bar_result;
  const char* what;
  Loc loc;                     // what it waits for
  std::vector<Copy> copies;    // cp.async issued, oldest first
  std::vector<size_t> groups;  // sizes of committed groups, oldest first
  size_t open;                 // copies not yet committed
  uint32_t vc[32];             // vector clock over the lanes of the warp
  void* asan_fake;
};

namespace {
struct Group {
  Lanes L;
  unsigned mask, arrived;
  Combine fn;
  bool full, orders;
};
struct Warp {
  uint32_t ready, exited;
  std::vector<Group> pending;
};

struct Rec {
  uint32_t block, epoch, clk, pc;
  uint16_t tid;
  uint8_t bytes;
  bool atomic;
};  // 20 bytes
struct Cell {
  Rec w, r[2];
};
struct Region {
  uintptr_t lo, hi;
  std::string name;
  bool writable, shared;
  std::vector<Cell> cells;    // one per 4 bytes
  std::vector<uint8_t> init;  // one bit per byte, only if track_init
  bool track_init;
};

constexpr size_t STACK = 256 << 10, PAGE = 4096;
struct Options {
  int order = 0;  // 0 forward, 1 reverse, 2 random
  uint64_t seed = 1;
  double preempt = 0;
  bool strict_exit = false, check_unknown = true, interblock = true;
} opt;
std::mutex launch_mutex;
std::vector<Fiber> fibers;
char* stack_base;
size_t n_stacks;
std::vector<Warp> warps;
unsigned n_threads, alive, bar_arrived, bar_count, bar_and, bar_or;
int bar_kind;
Loc bar_loc;
unsigned cur_warp;
[[maybe_unused]] void *sched_sp, *sched_asan_fake;
[[maybe_unused]] const void* sched_stack;
[[maybe_unused]] size_t sched_stack_size;
#if CUDASIM_UCONTEXT
ucontext_t sched_uc;
#endif
bool in_kernel, failed;
std::string error, kernel_name;
void (*body_fn)(void*);
void* body_ctx;
size_t body_ctx_size;
std::mt19937_64 rng;
uint64_t stat_switches, stat_collectives, stat_barriers, stat_accesses, stat_exit_before_barrier;
char* dyn_area;
size_t dyn_cap, dyn_size;
const size_t RED = 4096;
uintptr_t tls_lo, tls_hi, mod_base;
std::vector<std::pair<uintptr_t, uintptr_t>> mod_rw, mod_ro;
std::string mod_path;
std::map<const void*, size_t> optin;
std::map<uintptr_t, std::unique_ptr<Region>> regions;  // keyed by hi
Region* last_region;
std::unique_ptr<Region> dyn_region, tls_region;
uint32_t block_serial, epoch;
bool instrumented;
std::map<std::pair<uint32_t, uint32_t>, std::string> races;
thread_local char tls_anchor[16];

Fiber* cur() { return static_cast<Fiber*>(g_cur); }

#if ASAN
void asan_begin(void** save, const void* lo, size_t n) {
  __sanitizer_start_switch_fiber(save, lo, n);
}
void asan_end(void* fake, const void** lo, size_t* n) {
  __sanitizer_finish_switch_fiber(fake, lo, n);
}
#endif

void switch_to(Fiber* from, Fiber* to, bool dying = false) {  // null = the scheduler
  ++stat_switches;
#if ASAN
  void** save = dying ? nullptr : from ? &from->asan_fake : &sched_asan_fake;
  if (to)
    asan_begin(save, to->stack, STACK);
  else
    asan_begin(save, sched_stack, sched_stack_size);
#else
  (void)dying;
#endif
  if (to) g_cur = to;
#if CUDASIM_UCONTEXT
  swapcontext(from ? &from->uc : &sched_uc, to ? &to->uc : &sched_uc);
#else
  cudasim_switch(from ? &from->sp : &sched_sp, to ? to->sp : sched_sp);
#endif
#if ASAN
  if (from)
    asan_end(from->asan_fake, nullptr, nullptr);
  else
    asan_end(sched_asan_fake, nullptr, nullptr);
#endif
}

std::string who(const Fiber& f) {
  char b[160];
  snprintf(b, sizeof b, "thread (%u,%u,%u) [warp %u lane %u]", f.tid.x, f.tid.y, f.tid.z, f.warp,
           f.lane);
  return b;
}
std::string at(Loc l) { return std::string(l.file) + ":" + std::to_string(l.line); }

Fiber* pick() {
  unsigned nw = unsigned(warps.size());
  if (opt.order == 2) {
    unsigned w = cur_warp;
    if (!warps[w].ready || rng() % 8 == 0) {
      w = unsigned(rng() % nw);
      for (unsigned i = 0; i < nw && !warps[w].ready; ++i) w = (w + 1) % nw;
    }
    uint32_t r = warps[w].ready;
    if (!r) return nullptr;
    unsigned k = unsigned(rng() % unsigned(__builtin_popcount(r)));
    while (k--) r &= r - 1;
    cur_warp = w;
    return &fibers[w * 32 + unsigned(__builtin_ctz(r))];
  }
  for (unsigned i = 0; i <= nw; ++i) {
    unsigned w = opt.order == 0 ? (cur_warp + i) % nw : (cur_warp + nw * 2 - i) % nw;
    uint32_t r = warps[w].ready;
    if (!r) continue;
    cur_warp = w;
    return &fibers[w * 32 + unsigned(opt.order == 0 ? __builtin_ctz(r) : 31 - __builtin_clz(r))];
  }
  return nullptr;
}

void deadlock() {
  std::string m = "deadlock: no thread can run;";
  std::map<std::string, std::vector<unsigned>> by;
  for (unsigned i = 0; i < n_threads; ++i) {
    Fiber& f = fibers[i];
    by[f.state == DONE ? "exited" : std::string("waiting in ") + f.what + " at " + at(f.loc)]
        .push_back(i);
  }
  for (auto& [k, v] : by) {
    m += "\n  " + std::to_string(v.size()) + " threads " + k + ": ";
    for (size_t i = 0; i < v.size() && i < 8; ++i) m += std::to_string(v[i]) + " ";
    if (v.size() > 8) m += "...";
  }
  fail(m);
}

void block(Fiber* f) {  // the state is set; run someone else
  warps[f->warp].ready &= ~(1u << f->lane);
  Fiber* n = pick();
  if (!n) deadlock();
  if (n != f) switch_to(f, n);
}

void release_barrier() {
  ++stat_barriers;
  ++epoch;
  for (unsigned i = 0; i < n_threads; ++i) {
    Fiber& f = fibers[i];
    if (f.state != WAIT_BLOCK) continue;
    f.bar_result = bar_kind == 1 ? int(bar_count) : bar_kind == 2 ? int(bar_and) : int(bar_or);
    f.state = READY;
    warps[f.warp].ready |= 1u << f.lane;
  }
  bar_arrived = 0;
}

void complete(Warp& w, size_t gi) {
  Group g = w.pending[gi];
  w.pending.erase(w.pending.begin() + long(gi));
  if (g.full && g.arrived != ~0u)
    fail(std::string(g.L.what) + " needs all 32 lanes, at " + at(g.L.loc));
  ++stat_collectives;
  unsigned wbase = unsigned(&w - warps.data()) * 32;
  g.L.mask = g.arrived;
  if (g.fn) g.fn(g.L);
  if (g.orders && instrumented) {
    uint32_t j[32] = {};
    for (unsigned l = 0; l < 32; ++l)
      if (g.arrived >> l & 1)
        for (int k = 0; k < 32; ++k) j[k] = std::max(j[k], fibers[wbase + l].vc[k]);
    for (unsigned l = 0; l < 32; ++l)
      if (g.arrived >> l & 1) {
        auto& f = fibers[wbase + l];
        std::copy(j, j + 32, f.vc);
        ++f.vc[l];
      }
  }
  for (unsigned l = 0; l < 32; ++l)
    if (g.arrived >> l & 1) fibers[wbase + l].state = READY;
  w.ready |= g.arrived;
}

void fiber_exit() {
  Fiber* f = cur();
  if (!f->copies.empty()) fail(who(*f) + " exits with cp.async copies that it never waited for");
  f->state = DONE;
  --alive;
  Warp& w = warps[f->warp];
  w.ready &= ~(1u << f->lane);
  w.exited |= 1u << f->lane;
  for (size_t i = 0; i < w.pending.size(); ++i)
    if (!(w.pending[i].mask & ~(w.pending[i].arrived | w.exited))) {
      if (opt.strict_exit)
        fail(who(*f) + " exits while its warp waits for it in " + w.pending[i].L.what + " at " +
             at(w.pending[i].L.loc));
      complete(w, i);
      i = size_t(-1);
    }
  if (alive && bar_arrived) {
    ++stat_exit_before_barrier;
    if (opt.strict_exit)
      fail(who(*f) + " exits while others wait in __syncthreads at " + at(bar_loc));
    if (bar_arrived == alive) release_barrier();
  }
  Fiber* n = alive ? pick() : nullptr;
  if (alive && !n) deadlock();
  switch_to(f, n, true);
  __builtin_unreachable();
}

void fiber_main() {
#if ASAN
  const void* lo;
  size_t n;
  asan_end(nullptr, &lo, &n);
  if (!sched_stack) {
    sched_stack = lo;
    sched_stack_size = n;
  }
#endif
  body_fn(body_ctx);
  fiber_exit();
}

void start_fiber(Fiber& f) {
#if ASAN
  __asan_unpoison_memory_region(f.stack, STACK);  // left poisoned by the last block
#endif
#if CUDASIM_UCONTEXT
  getcontext(&f.uc);
  f.uc.uc_stack.ss_sp = f.stack;
  f.uc.uc_stack.ss_size = STACK;
  f.uc.uc_link = nullptr;
  makecontext(&f.uc, fiber_main, 0);
#else
  auto* top = reinterpret_cast<uintptr_t*>(f.stack + STACK - 72);
  top[0] = 0;  // fiber_main never returns; on its entry rsp = top, 8 mod 16
  top[-1] = reinterpret_cast<uintptr_t>(&fiber_main);
  for (int i = 2; i <= 7; ++i) top[-i] = 0;
  f.sp = top - 7;
#endif
  f.state = READY;
  f.copies.clear();
  f.groups.clear();
  f.open = 0;
  f.asan_fake = nullptr;
  f.what = "nothing";
  f.loc = {"?", 0};
  if (instrumented) {
    std::fill(f.vc, f.vc + 32, 0u);
    f.vc[f.lane] = 1;
  }
}

int phdr(dl_phdr_info* i, size_t, void*) {
  uintptr_t me = reinterpret_cast<uintptr_t>(&phdr);
  bool mine = false;
  for (int k = 0; k < i->dlpi_phnum; ++k) {
    auto& p = i->dlpi_phdr[k];
    uintptr_t lo = i->dlpi_addr + p.p_vaddr;
    if (p.p_type == PT_LOAD && me >= lo && me < lo + p.p_memsz) mine = true;
  }
  if (!mine) return 0;
  mod_base = i->dlpi_addr;
  mod_path = i->dlpi_name && *i->dlpi_name ? i->dlpi_name : "/proc/self/exe";
  mod_rw.clear();
  mod_ro.clear();
  for (int k = 0; k < i->dlpi_phnum; ++k) {
    auto& p = i->dlpi_phdr[k];
    uintptr_t lo = i->dlpi_addr + p.p_vaddr;
    if (p.p_type == PT_LOAD) (p.p_flags & PF_W ? mod_rw : mod_ro).push_back({lo, lo + p.p_memsz});
    if (p.p_type == PT_TLS && i->dlpi_tls_data) {
      tls_lo = reinterpret_cast<uintptr_t>(i->dlpi_tls_data);
      tls_hi = tls_lo + p.p_memsz;
    }
  }
  return 1;
}

Region* make_region(uintptr_t lo, size_t n, std::string name, bool writable, bool shared,
                    bool uninit) {
  auto* r = new Region{lo, lo + n, std::move(name), writable, shared, {}, {}, uninit};
  if (uninit) r->init.assign(n / 8 + 1, 0);
  return r;
}

// file:line of a call site; the innermost frame that is neither the simulator's nor a system
// header's
std::string where(uint32_t pc) {
  char cmd[512], out[512];
  std::string first, best;
  snprintf(cmd, sizeof cmd, "addr2line -i -e '%s' 0x%x 2>/dev/null", mod_path.c_str(), pc - 1);
  if (FILE* p = popen(cmd, "r")) {
    while (fgets(out, sizeof out, p)) {
      std::string l = out;
      l = l.substr(0, l.find_first_of(" \n"));
      if (first.empty()) first = l;
      if (best.empty() && l.find("/include/") == l.npos && l.find("cudasim.h") == l.npos &&
          l.find("mma.cuh") == l.npos)
        best = l;
    }
    pclose(p);
  }
  if (best.empty()) best = first;
  if (best.empty()) {
    snprintf(out, sizeof out, "pc+0x%x", pc - 1);
    best = out;
  }
  size_t sl = best.rfind('/');
  return sl == best.npos ? best : best.substr(sl + 1);
}
std::string where(void* pc) { return where(uint32_t(uintptr_t(pc) - mod_base)); }
std::string tname(uint16_t t) { return who(fibers[t]); }

void race(const Region& r, uintptr_t a, const Rec& old, bool old_write, const Rec& now,
          bool now_write) {
  auto key = std::make_pair(std::min(old.pc, now.pc), std::max(old.pc, now.pc));
  if (races.count(key) || races.size() >= 20) return;
  races[key] = std::string(old.block != now.block ? "race between blocks" : "race") + " on " +
               r.name + "+" + std::to_string(a - r.lo) + ": " + (old_write ? "write" : "read") +
               " by " + tname(old.tid) + " at " + where(old.pc) + " and " +
               (now_write ? "write" : "read") + " by " + tname(now.tid) + " at " + where(now.pc) +
               " with no barrier between them";
}

inline bool ordered(const Rec& o, const Fiber& f) {
  if (o.block != block_serial) return !opt.interblock;
  if (o.epoch != epoch || o.tid == f.linear) return true;
  return (o.tid >> 5) == f.warp && f.vc[o.tid & 31] >= o.clk;
}

uint32_t launch_first_serial;  // blocks of earlier launches are ordered before this one

void touch(Region& r, uintptr_t a, size_t n, bool write, bool atomic, void* pc) {
  if (a + n > r.hi)
    fail("out-of-bounds " + std::string(write ? "write" : "read") + " of " + std::to_string(n) +
         " bytes at " + r.name + "+" + std::to_string(a - r.lo) + " (size " +
         std::to_string(r.hi - r.lo) + ") by " + who(*cur()) + " at " + where(pc));
  if (write && !r.writable)
    fail("write to read-only " + r.name + " by " + who(*cur()) + " at " + where(pc));
  Fiber& f = *cur();
  if (r.track_init)
    for (uintptr_t k = a - r.lo; k < a - r.lo + n; ++k) {
      uint8_t& b = r.init[k >> 3];
      uint8_t m = uint8_t(1u << (k & 7));
      if (write) b |= m;
      if (!(b & m))
        fail("read of uninitialised " + r.name + "+" + std::to_string(k) + " by " + who(f) +
             " at " + where(pc));
    }
  if (r.cells.empty()) r.cells.resize((r.hi - r.lo + 3) / 4 + 1);
  Rec now{block_serial,       epoch, f.vc[f.lane], uint32_t(uintptr_t(pc) - mod_base),
          uint16_t(f.linear), 0,     atomic};
  for (uintptr_t g = (a - r.lo) / 4; g <= (a + n - 1 - r.lo) / 4; ++g) {
    uintptr_t lo = std::max<uintptr_t>(a - r.lo, g * 4),
              hi = std::min<uintptr_t>(a + n - r.lo, g * 4 + 4);
    now.bytes = uint8_t(((1u << (hi - lo)) - 1) << (lo - g * 4));
    Cell& c = r.cells[g];
    auto clash = [&](const Rec& o) {
      if (!o.block || o.block < launch_first_serial || !(o.bytes & now.bytes) ||
          (o.atomic && now.atomic))
        return false;
      if (r.shared && o.block != block_serial) return false;
      return !ordered(o, f);
    };
    if (clash(c.w)) race(r, r.lo + lo, c.w, true, now, write);
    if (write) {
      for (auto& o : c.r)
        if (clash(o)) race(r, r.lo + lo, o, false, now, true);
      c.w = now;
    } else {
      Rec& o0 = c.r[0];
      if (o0.tid == now.tid || !o0.block || ordered(o0, f))
        o0 = now;
      else
        c.r[1] = now;
    }
  }
}

void access(uintptr_t a, size_t n, bool write, bool atomic, void* pc, unsigned align) {
  if (!in_kernel) return;
  uintptr_t sb = uintptr_t(stack_base);
  if (a - sb < n_stacks * (STACK + PAGE)) {
    uintptr_t mine = uintptr_t(cur()->stack);
    if (a - mine >= STACK) fail("access to another thread's local memory by " + who(*cur()));
    return;
  }
  if (a - uintptr_t(body_ctx) < body_ctx_size) return;  // the kernel's parameters
  if (a - uintptr_t(fibers.data()) < fibers.size() * sizeof(Fiber)) return;  // threadIdx
  ++stat_accesses;
  if (align > 1 && a % align)
    fail("misaligned " + std::to_string(n) + "-byte access by " + who(*cur()) + " at " + where(pc));
  Region* r = nullptr;
  if (last_region && a - last_region->lo < last_region->hi - last_region->lo)
    r = last_region;
  else if (dyn_region && a - dyn_region->lo < dyn_region->hi - dyn_region->lo)
    r = dyn_region.get();
  else if (tls_region && a - tls_region->lo < tls_region->hi - tls_region->lo)
    r = tls_region.get();
  else {
    auto it = regions.upper_bound(a);
    if (it != regions.end() && a >= it->second->lo) r = it->second.get();
  }
  if (!r) {
    for (auto& [lo, hi] : mod_ro)
      if (a >= lo && a < hi) return;
    for (auto& [lo, hi] : mod_rw)
      if (a >= lo && a < hi) return;
    if (!opt.check_unknown) return;
    std::string near;
    auto it = regions.upper_bound(a);
    if (it != regions.begin()) {
      auto& q = *std::prev(it)->second;
      near = "; " + std::to_string(a - q.hi) + " bytes past the end of " + q.name;
    }
    if (a - uintptr_t(dyn_area) < dyn_size + RED)
      near = "; " + std::to_string(a - uintptr_t(dyn_area) - dyn_size) +
             " bytes past the end of dynamic shared memory";
    fail("out-of-bounds " + std::string(write ? "write" : "read") + " of " + std::to_string(n) +
         " bytes by " + who(*cur()) + " at " + where(pc) + near);
  }
  last_region = r;
  touch(*r, a, n, write, atomic, pc);
  if (opt.preempt > 0 && double(rng() >> 11) * 0x1p-53 < opt.preempt) {
    Fiber* f = cur();
    Fiber* nx = pick();
    if (nx && nx != f) switch_to(f, nx);
  }
}
}  // namespace

void note_access(const void* p, size_t n, bool write, bool atomic) {
  if (instrumented) access(uintptr_t(p), n, write, atomic, __builtin_return_address(0), 1);
}

void fail(const std::string& m) {
  if (!in_kernel) throw std::runtime_error(m);
  error = m;
  failed = true;
  switch_to(cur(), nullptr);  // the fibers are abandoned
  __builtin_unreachable();
}

void warp_op(const char* what, unsigned mask, const void* in, void* out, Combine fn, bool full,
             bool orders, Loc loc) {
  Fiber* f = cur();
  Warp& w = warps[f->warp];
  if (!(mask >> f->lane & 1))
    fail(std::string(what) + ": " + who(*f) + " is not in its own mask, at " + at(loc));
  size_t gi = 0;
  while (gi < w.pending.size() && w.pending[gi].mask != mask) ++gi;
  if (gi == w.pending.size())
    w.pending.push_back(Group{{{}, {}, 0, what, loc}, mask, 0, fn, full, orders});
  Group& g = w.pending[gi];
  if (g.fn != fn || g.L.loc.line != loc.line || g.L.what != what)
    fail(std::string("divergent warp collectives with one mask: ") + g.L.what + " at " +
         at(g.L.loc) + " and " + what + " at " + at(loc) + " by " + who(*f));
  g.L.in[f->lane] = in;
  g.L.out[f->lane] = out;
  g.arrived |= 1u << f->lane;
  if (!(mask & ~(g.arrived | w.exited))) {
    complete(w, gi);
    return;
  }
  f->state = WAIT_WARP;
  f->what = what;
  f->loc = loc;
  block(f);
}

int block_sync(int kind, int pred, Loc loc) {
  Fiber* f = cur();
  if (!bar_arrived) {
    bar_kind = kind;
    bar_loc = loc;
    bar_count = 0;
    bar_and = 1;
    bar_or = 0;
  } else if (bar_loc.line != loc.line || bar_kind != kind)
    fail("threads of one block wait in different __syncthreads: " + at(bar_loc) + " and, " +
         who(*f) + ", " + at(loc));
  bar_count += pred != 0;
  bar_and &= pred != 0;
  bar_or |= pred != 0;
  ++bar_arrived;
  f->state = WAIT_BLOCK;
  f->what = "__syncthreads";
  f->loc = loc;
  if (bar_arrived == alive) {
    release_barrier();
    return f->bar_result;
  }
  block(f);
  return f->bar_result;
}

unsigned active_mask() {
  Warp& w = warps[cur()->warp];
  return ~w.exited;
}
void* dyn_smem() { return dyn_area; }
void smem_opt_in(const void* k, size_t n) { optin[k] = n; }

static void on_signal(int sig, siginfo_t* i, void*) {
  if (!in_kernel) {
    signal(sig, SIG_DFL);
    return;
  }
  char b[128];
  snprintf(b, sizeof b, "%s at address %p by ",
           sig == SIGSEGV  ? "segmentation fault"
           : sig == SIGFPE ? "integer division by zero"
                           : "bus error",
           i->si_addr);
  std::string m = b + who(*cur());
  uintptr_t a = uintptr_t(i->si_addr), g = uintptr_t(cur()->stack);
  if (a < g && a >= g - 8 * STACK) m += " (too much local memory: its stack overflowed)";
  fail(m);
}

static void land(const Copy& c) {
  if (instrumented) access(uintptr_t(c.dst), c.bytes, true, false, c.pc, 1);
  std::memcpy(c.dst, c.src, c.src_bytes);
  std::memset(c.dst + c.src_bytes, 0, c.bytes - c.src_bytes);
}
void cp_async(void* dst, const void* src, unsigned bytes, unsigned src_bytes) {
  void* pc = __builtin_return_address(0);
  if ((uintptr_t(dst) | (src_bytes ? uintptr_t(src) : 0)) % bytes)
    fail("misaligned cp.async by " + who(*cur()) + " at " + where(pc));
  if (instrumented) {
    if (src_bytes) access(uintptr_t(src), src_bytes, false, false, pc, 1);
    access(uintptr_t(dst), bytes, true, false, pc, 1);
    if (last_region && last_region->track_init)  // unreadable until a wait
      for (uintptr_t k = uintptr_t(dst) - last_region->lo, e = k + bytes; k < e; ++k)
        last_region->init[k >> 3] &= uint8_t(~(1u << (k & 7)));
  }
  std::memset(dst, 0xff, bytes);
  cur()->copies.push_back(
      Copy{static_cast<char*>(dst), static_cast<const char*>(src), bytes, src_bytes, pc});
  ++cur()->open;
}
void cp_async_commit() {
  cur()->groups.push_back(cur()->open);
  cur()->open = 0;
}
void cp_async_wait(int leave) {
  Fiber* f = cur();
  size_t n = 0;
  while (f->groups.size() > size_t(leave)) {
    n += f->groups.front();
    f->groups.erase(f->groups.begin());
  }
  for (size_t i = 0; i < n; ++i) land(f->copies[i]);
  f->copies.erase(f->copies.begin(), f->copies.begin() + long(n));
}

void run_grid(const char* name, const void* kernel, dim3 grid, dim3 bd, size_t smem,
              void (*body)(void*), void* ctx, size_t ctx_size) {
  std::lock_guard<std::mutex> lock(launch_mutex);
  kernel_name = name;
  error.clear();
  failed = false;
  races.clear();
  auto bad = [&](const std::string& m) {
    throw std::runtime_error("cudasim: launch of " + kernel_name + ": " + m);
  };
  size_t nt = size_t(bd.x) * bd.y * bd.z, nb = size_t(grid.x) * grid.y * grid.z;
  if (!nt || nt > 1024 || bd.z > 64) bad("bad block size");
  if (!nb || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) bad("bad grid size");
  if (smem > 232448) bad("more than 227 KiB of dynamic shared memory");
  if (smem > 49152 && (!optin.count(kernel) || optin[kernel] < smem))
    bad("more than 48 KiB of dynamic shared memory without opting in");
  static bool env = false;
  if (!env) {
    env = true;
    if (const char* e = getenv("CUDASIM_ORDER")) {
      opt.order = !strcmp(e, "reverse") ? 1 : !strcmp(e, "random") ? 2 : 0;
    }
    if (const char* e = getenv("CUDASIM_SEED")) opt.seed = strtoull(e, nullptr, 0);
  }
  rng.seed(opt.seed);
  sched_stack = nullptr;
  tls_anchor[0] = 0;
  asm volatile("" ::"r"(tls_anchor) : "memory");
  dl_iterate_phdr(phdr, nullptr);
  if (n_stacks < 1024 && !stack_base) {
    n_stacks = 1024;
    stack_base = static_cast<char*>(mmap(nullptr, n_stacks * (STACK + PAGE), PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack_base == MAP_FAILED) {
      stack_base = nullptr;
      bad("no memory for the fibers' stacks");
    }
    for (size_t i = 0; i < n_stacks; ++i)
      mprotect(stack_base + i * (STACK + PAGE), PAGE, PROT_NONE);
    fibers.resize(n_stacks);
    for (size_t i = 0; i < n_stacks; ++i) fibers[i].stack = stack_base + i * (STACK + PAGE) + PAGE;
  }
  if (!dyn_area) {
    dyn_cap = 232448;
    dyn_area = static_cast<char*>(aligned_alloc(1024, (dyn_cap + RED + 1023) / 1024 * 1024));
  }
  dyn_size = smem;
  n_threads = unsigned(nt);
  warps.assign((nt + 31) / 32, Warp{});
  g_blk.bdim = bd;
  g_blk.gdim = grid;
  body_fn = body;
  body_ctx = ctx;
  body_ctx_size = ctx_size;
  for (unsigned i = 0; i < nt; ++i) {
    Fiber& f = fibers[i];
    f.linear = i;
    f.lane = i & 31;
    f.warp = i >> 5;
    f.tid = uint3{i % bd.x, i / bd.x % bd.y, i / bd.x / bd.y};
  }
  static char alt[65536];
  stack_t ss{};
  ss.ss_sp = alt;
  ss.ss_size = sizeof alt;
  struct SigGuard {  // faults become errors of the launch
    stack_t old_ss{};
    struct sigaction old[3];
    int sig[3] = {SIGSEGV, SIGBUS, SIGFPE};
    explicit SigGuard(stack_t& s) {
      sigaltstack(&s, &old_ss);
      struct sigaction a{};
      a.sa_sigaction = on_signal;
      a.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
      for (int k = 0; k < 3; ++k) sigaction(sig[k], &a, &old[k]);
    }
    ~SigGuard() {
      for (int k = 0; k < 3; ++k) sigaction(sig[k], &old[k], nullptr);
      sigaltstack(&old_ss, nullptr);
    }
  } sig_guard(ss);
  launch_first_serial = block_serial + 1;
  std::vector<size_t> order;
  if (opt.order == 2) {
    order.resize(nb);
    for (size_t i = 0; i < nb; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), rng);
  }
  for (size_t b = 0; b < nb && !failed; ++b) {
    size_t l = opt.order == 2 ? order[b] : opt.order == 1 ? nb - 1 - b : b;
    g_blk.bid =
        uint3{unsigned(l % grid.x), unsigned(l / grid.x % grid.y), unsigned(l / grid.x / grid.y)};
    ++block_serial;
    epoch = 1;
    last_region = nullptr;
    std::memset(dyn_area, 0xff, dyn_size);
    std::memset(dyn_area + dyn_size, 0xfd, RED);
    if (tls_hi) std::memset(reinterpret_cast<void*>(tls_lo), 0xff, tls_hi - tls_lo);
    if (instrumented) {
      if (!dyn_region || dyn_region->hi - dyn_region->lo != dyn_size)
        dyn_region.reset(
            make_region(uintptr_t(dyn_area), dyn_size, "dynamic shared memory", true, true, true));
      if (!tls_region || tls_region->lo != tls_lo)
        tls_region.reset(
            make_region(tls_lo, tls_hi - tls_lo, "static shared memory", true, true, true));
      std::fill(dyn_region->init.begin(), dyn_region->init.end(), uint8_t(0));
      std::fill(tls_region->init.begin(), tls_region->init.end(), uint8_t(0));
    }
    alive = n_threads;
    bar_arrived = 0;
    cur_warp = opt.order == 1 ? unsigned(warps.size()) - 1 : 0;
    for (unsigned i = 0; i < nt; ++i) start_fiber(fibers[i]);
    for (auto& w : warps) {
      w.ready = ~0u;
      w.exited = 0;
      w.pending.clear();
    }
    if (nt % 32) {
      warps.back().ready = (1u << (nt % 32)) - 1;
      warps.back().exited = ~warps.back().ready;
    }
    in_kernel = true;
    switch_to(nullptr, pick());
    in_kernel = false;
    if (!failed)
      for (size_t i = 0; i < RED; ++i)
        if (dyn_area[dyn_size + i] != char(0xfd)) {
          error = "write " + std::to_string(i) + " bytes past the end of dynamic shared memory";
          failed = true;
          break;
        }
  }
  if (!failed && !races.empty()) {
    failed = true;
    for (auto& [k, v] : races) error += (error.empty() ? "" : "\n") + v;
  }
  if (failed) {
    char b[96];
    snprintf(b, sizeof b, " [block (%u,%u,%u)]", g_blk.bid.x, g_blk.bid.y, g_blk.bid.z);
    bad(error + b);
  }
}
}  // namespace cudasim

// ------------------------------------------------------------------ control, for tests
using namespace cudasim;
EXPORT void cudasim_config(const char* order, unsigned long long seed, double preempt,
                           int strict_exit, int check_unknown) {
  opt.order = !strcmp(order, "reverse") ? 1 : !strcmp(order, "random") ? 2 : 0;
  opt.seed = seed;
  opt.preempt = preempt;
  opt.strict_exit = strict_exit;
  opt.check_unknown = check_unknown;
}
EXPORT void cudasim_track(const void* p, size_t n, const char* name, int writable, int uninit) {
  if (!n) return;
  uintptr_t lo = uintptr_t(p);
  regions[lo + n].reset(make_region(lo, n, name, writable, false, uninit));
}
EXPORT void cudasim_untrack_all() {
  regions.clear();
  last_region = nullptr;
}
EXPORT long long cudasim_unwritten(const void* p) {  // bytes of an 'uninit' buffer no kernel wrote
  for (auto& [hi, r] : regions)
    if (r->lo == uintptr_t(p) && r->track_init) {
      long long n = 0;
      for (size_t k = 0; k < r->hi - r->lo; ++k) n += !(r->init[k >> 3] >> (k & 7) & 1);
      return n;
    }
  return -1;
}
EXPORT void cudasim_stats(unsigned long long* out) {
  out[0] = stat_switches;
  out[1] = stat_collectives;
  out[2] = stat_barriers;
  out[3] = stat_accesses;
  out[4] = stat_exit_before_barrier;
}

// ------------------------------------------------------------------ what -fsanitize=thread calls
#define PC __builtin_return_address(0)
#define HID extern "C" __attribute__((visibility("hidden")))
#define RW(n)                                                                                  \
  HID void __tsan_read##n(void* p) { access(uintptr_t(p), n, false, false, PC, n); }           \
  HID void __tsan_write##n(void* p) { access(uintptr_t(p), n, true, false, PC, n); }           \
  HID void __tsan_volatile_read##n(void* p) { access(uintptr_t(p), n, false, false, PC, n); }  \
  HID void __tsan_volatile_write##n(void* p) { access(uintptr_t(p), n, true, false, PC, n); }  \
  HID void __tsan_unaligned_read##n(void* p) { access(uintptr_t(p), n, false, false, PC, 1); } \
  HID void __tsan_unaligned_write##n(void* p) { access(uintptr_t(p), n, true, false, PC, 1); } \
  static_assert(true)
RW(1);
RW(2);
RW(4);
RW(8);
RW(16);
HID void __tsan_read_range(void* p, size_t n) { access(uintptr_t(p), n, false, false, PC, 1); }
HID void __tsan_write_range(void* p, size_t n) { access(uintptr_t(p), n, true, false, PC, 1); }
HID void __tsan_init() { instrumented = true; }
HID void __tsan_func_entry(void*) {}
HID void __tsan_func_exit() {}
HID void __tsan_vptr_update(void**, void*) {}

// ------------------------------------------------------------------ what UBSan's parts call
struct UbLoc {
  const char* file;
  uint32_t line, col;
};
static void ub(const char* what, const UbLoc* l) {
  const char* f = strrchr(l->file, '/');
  if (in_kernel)
    fail(std::string(what) + " by " + who(*cur()) + " at " + (f ? f + 1 : l->file) + ":" +
         std::to_string(l->line));
  fprintf(stderr, "%s at %s:%u\n", what, l->file, l->line);
  abort();
}
struct UbType {
  UbLoc loc;
  const void* type;
  uint8_t log_align, kind;
};
HID void __ubsan_handle_type_mismatch_v1(UbType* d, uintptr_t p) {
  ub(p ? "misaligned access" : "null pointer access", &d->loc);
}
#define UB(name, what)                                      \
  HID void __ubsan_handle_##name(UbLoc* l) { ub(what, l); } \
  static_assert(true)
UB(out_of_bounds, "array index out of bounds");
UB(shift_out_of_bounds, "shift out of range");
UB(add_overflow, "signed overflow in +");
UB(sub_overflow, "signed overflow in -");
UB(mul_overflow, "signed overflow in *");
UB(negate_overflow, "signed overflow in unary -");
UB(divrem_overflow, "division by zero or overflow");
UB(float_cast_overflow, "float to integer out of range");
UB(vla_bound_not_positive, "bad array size");
UB(pointer_overflow, "pointer overflow");
UB(load_invalid_value, "invalid bool or enum value");
