// SPDX-License-Identifier: Apache-2.0
// Shadow memory: for every 4 bytes of a tracked range two writes and two reads, each with the
// moment it happened. Two accesses are ordered if they are of one thread, if the block has passed a
// barrier between them, or if their lanes have met in __syncwarp: of that each lane keeps a vector
// clock over its warp. Shuffles and votes order nothing, as in CUDA's memory model.
//
// The checker sees the accesses that GCC has kept at -O1 and two of a kind a word: it may miss a
// race, it never invents one. A missing __threadfence is not seen.
#include "runtime/checker.h"

#include <algorithm>
#include <map>
#include <memory>

#include "runtime/copies.h"
#include "runtime/image.h"

namespace cudasim {
namespace {

constexpr size_t kWordBytes = 4;
constexpr size_t kMostFound = 20;
constexpr uintptr_t kFirstPage = 4096;

struct Moment {
  uint32_t block = 0;  // serial number over all launches; 0: never
  uint32_t epoch, clock;
  uint32_t pc;  // offset in the image
  uint16_t rank;
  uint8_t bytes;  // mask: which of the word's bytes
  bool atomic;
};

struct Word {
  Moment writes[2], reads[2];
};

struct Range {
  uintptr_t begin, end;
  std::string name;
  bool writable;
  bool shared;                    // shared memory: new with every block
  std::vector<bool> initialised;  // one a byte; empty where all are
  std::vector<Word> words;        // made by the first access

  bool holds(uintptr_t address, size_t bytes = 1) const {
    return address >= begin && address < end && bytes <= end - address;
  }
  std::string at(uintptr_t address) const { return name + "+" + std::to_string(address - begin); }
};

std::vector<std::unique_ptr<Range>> tracked;
std::vector<Range> shared;  // of the running kernel's image
Range* last_range;
Launch launch;
bool checked;  // whether the last launch was
uint32_t block_serial, first_block_of_launch;
std::vector<uint3> blocks;  // of this launch so far
// What does not end the launch, so that all are found: races and uninitialised reads, by place.
std::map<std::pair<uint32_t, uint32_t>, std::string> found;

std::string bytes_text(size_t bytes) { return std::to_string(bytes) + " bytes"; }

std::string kind(bool write) { return write ? "write" : "read"; }

[[noreturn]] void fail_access(const std::string& fault, const Access& access) {
  fail(fault, source_line(image_offset(access.pc)));
}

bool is_ordered(const Moment& before, const Fiber& now, bool shared) {
  if (before.block != block_serial) return shared || before.block < first_block_of_launch;
  if (before.epoch != barrier_epoch || before.rank == now.rank) return true;
  return before.rank / kWarpLanes == now.warp &&
         now.clock[before.rank % kWarpLanes] >= before.clock;
}

bool is_known(const std::pair<uint32_t, uint32_t>& places) {
  return found.size() >= kMostFound || found.count(places);
}

std::string describe(const Moment& moment, bool write) {
  return kind(write) + " by " +
         describe(fibers[moment.rank], blocks[moment.block - first_block_of_launch]) + " at " +
         source_line(moment.pc);
}

void record_race(const std::string& place, const Moment& before, bool was_write, const Moment& now,
                 bool is_write) {
  const std::pair<uint32_t, uint32_t> key = std::minmax(before.pc, now.pc);
  if (is_known(key)) return;
  const bool same_block = before.block == block_serial;
  found[key] = std::string(same_block ? "race" : "race between blocks") + " on " + place + ": " +
               describe(before, was_write) + " and " + describe(now, is_write) +
               (same_block ? " with no barrier between them" : "");
}

// Keeps the first of the accesses that are not ordered before `now`, and the last.
void remember(Moment (&moments)[2], const Moment& now, const Fiber& fiber, bool shared) {
  Moment& first = moments[0];
  const bool replace = !first.block || first.rank == now.rank || is_ordered(first, fiber, shared);
  (replace ? first : moments[1]) = now;
}

void check_word(Range& range, size_t index, const Moment& now, bool write) {
  const Fiber& fiber = current_fiber();
  Word& word = range.words[index];
  const auto compare = [&](const Moment(&moments)[2], bool were_writes) {
    for (const Moment& before : moments) {
      if (!before.block || !(before.bytes & now.bytes) || (before.atomic && now.atomic)) continue;
      if (is_ordered(before, fiber, range.shared)) continue;
      record_race(range.at(range.begin + index * kWordBytes), before, were_writes, now, write);
    }
  };
  compare(word.writes, true);
  if (write) compare(word.reads, false);
  remember(write ? word.writes : word.reads, now, fiber, range.shared);
}

void check_initialised(Range& range, const Access& access) {
  const size_t first = access.address - range.begin;
  for (size_t byte = first; byte < first + access.bytes; ++byte) {
    if (access.write) range.initialised[byte] = true;
    if (range.initialised[byte]) continue;
    const uint32_t pc = image_offset(access.pc);
    if (is_known({pc, pc})) return;
    const std::string copy = copy_on_its_way_to(range.begin + byte);
    found[{pc, pc}] = (copy.empty() ? "read of uninitialised " : "read too early of ") +
                      range.at(range.begin + byte) + " by " + describe(*current_thread) + " at " +
                      source_line(pc) + (copy.empty() ? "" : ", on its way: " + copy);
  }
}

void check_races(Range& range, const Access& access) {
  if (range.words.empty()) range.words.resize((range.end - range.begin) / kWordBytes + 1);
  const Fiber& fiber = current_fiber();
  Moment now;
  now.block = block_serial;
  now.epoch = barrier_epoch;
  now.clock = fiber.clock[fiber.lane];
  now.pc = image_offset(access.pc);
  now.rank = uint16_t(fiber.rank);
  now.atomic = access.atomic;
  const size_t begin = access.address - range.begin, end = begin + access.bytes;
  for (size_t index = begin / kWordBytes; index * kWordBytes < end; ++index) {
    const size_t word = index * kWordBytes;
    const size_t low = std::max(begin, word) - word, high = std::min(end - word, kWordBytes);
    now.bytes = uint8_t((1u << high) - (1u << low));
    check_word(range, index, now, access.write);
  }
}

Range* find_range(uintptr_t address, size_t bytes) {
  if (last_range && last_range->holds(address, bytes)) return last_range;
  for (Range& range : shared) {
    if (range.holds(address, bytes)) return &range;
  }
  for (const auto& range : tracked) {
    if (range->holds(address, bytes)) return range.get();
  }
  return nullptr;
}

// The thread's own variables, the kernel's arguments, the built-in variables.
bool is_private(const Access& access) {
  const uintptr_t address = access.address;
  if (is_on_a_stack(address)) {
    if (address - current_fiber().context.stack < kStackBytes) return true;
    fail_access(kind(access.write) + " of another thread's local memory", access);
  }
  const auto within = [address](const void* data, size_t bytes) {
    return address - reinterpret_cast<uintptr_t>(data) < bytes;
  };
  return within(launch.call, launch.call_bytes) ||
         within(fibers.data(), fibers.size() * sizeof(Fiber)) ||
         within(&current_thread, sizeof current_thread) ||
         within(&current_block, sizeof current_block);
}

[[noreturn]] void fail_unknown(const Access& access) {
  const std::string what = kind(access.write) + " of " + bytes_text(access.bytes);
  if (access.address < kFirstPage) fail_access("null pointer: " + what, access);
  const Range* nearest = nullptr;
  const auto consider = [&](const Range& range) {
    if (range.begin <= access.address && range.end > range.begin &&
        (!nearest || range.begin > nearest->begin)) {
      nearest = &range;
    }
  };
  for (const auto& range : tracked) consider(*range);
  for (const Range& range : shared) consider(range);
  const std::string place = nearest ? ", " + nearest->at(access.address) + " of " +
                                          bytes_text(nearest->end - nearest->begin)
                                    : "";
  fail_access("out-of-bounds " + what + place, access);
}

}  // namespace

void check_access(const Access& access, size_t alignment) {
  if (!in_kernel) return;
  if (watchdog_has_rung()) fail_access("endless loop or spin wait", access);
  if (is_private(access)) return;
  ++statistics.accesses;
  if (access.address % alignment) {
    fail_access("misaligned " + kind(access.write) + " of " + bytes_text(access.bytes), access);
  }
  Range* const range = find_range(access.address, access.bytes);
  if (!range) {
    if (is_image_data(access.address)) return;  // constants, tables
    fail_unknown(access);
  }
  last_range = range;
  if (access.write && !range->writable) {
    fail_access("write to the read-only " + range->at(access.address), access);
  }
  if (!range->initialised.empty()) check_initialised(*range, access);
  check_races(*range, access);
  if (options.preemption > 0 && random_fraction() < options.preemption) yield_to_another();
}

void plain_access(const void* address, size_t bytes, bool write, void* pc) {
  if (checked) check_access({reinterpret_cast<uintptr_t>(address), bytes, write, false, pc}, bytes);
}

void shared_access(const void* address, size_t bytes, bool write, void* pc) {
  if (!checked) return;
  const Access access{reinterpret_cast<uintptr_t>(address), bytes, write, false, pc};
  check_access(access, bytes);
  const Range* const range = find_range(access.address, bytes);
  if (range && range->shared) return;
  const std::string place = range ? range->at(access.address) : "local memory";
  fail_access(kind(write) + " of " + place + " as shared memory", access);
}

void forget_values(uintptr_t address, size_t bytes) {
  if (!checked) return;
  Range& range = *find_range(address, bytes);
  const auto first = range.initialised.begin() + ptrdiff_t(address - range.begin);
  std::fill(first, first + ptrdiff_t(bytes), false);
}

bool has_values(uintptr_t address, size_t bytes) {
  if (!checked) return false;
  const Range& range = *find_range(address, bytes);
  const auto first = range.initialised.begin() + ptrdiff_t(address - range.begin);
  return std::find(first, first + ptrdiff_t(bytes), true) != first + ptrdiff_t(bytes);
}

void atomic_access(const void* address, size_t bytes, void* pc) {
  if (checked) check_access({reinterpret_cast<uintptr_t>(address), bytes, true, true, pc}, bytes);
}

void track(const void* data, size_t bytes, const std::string& name, bool writable,
           bool uninitialised) {
  if (!bytes) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  auto range = std::make_unique<Range>(Range{begin, begin + bytes, name, writable, false, {}, {}});
  if (uninitialised) range->initialised.resize(bytes);
  tracked.push_back(std::move(range));
}

void untrack_all() {
  tracked.clear();
  last_range = nullptr;
}

size_t unwritten_bytes(const void* data) {
  if (!checked) return 0;
  for (const auto& range : tracked) {
    if (range->begin != reinterpret_cast<uintptr_t>(data)) continue;
    return size_t(std::count(range->initialised.begin(), range->initialised.end(), false));
  }
  return 0;
}

void begin_checked_launch(const Launch& next) {
  launch = next;
  checked = next.checked;
  first_block_of_launch = block_serial + 1;
  found.clear();
  blocks.clear();
  last_range = nullptr;
  shared.clear();
  const auto add = [](const std::string& name, uintptr_t begin, size_t bytes, bool poisoned) {
    shared.push_back(
        {begin, begin + bytes, name, true, true, std::vector<bool>(poisoned * bytes), {}});
  };
  if (!checked) return;
  add("dynamic shared memory", reinterpret_cast<uintptr_t>(dynamic_shared_memory()),
      launch.shared_bytes, true);
  for (const SharedArray& array : shared_arrays()) {
    add("shared array " + array.name, array.begin, array.bytes, !array.guard);
  }
}

void begin_checked_block() {
  ++block_serial;
  blocks.push_back(current_block.index);
  for (Range& range : shared) std::fill(range.initialised.begin(), range.initialised.end(), false);
}

size_t used_static_bytes() {
  size_t bytes = 0;  // behind the first range, which is dynamic
  for (size_t i = 1; i < shared.size(); ++i) {
    if (!shared[i].words.empty()) bytes += shared[i].end - shared[i].begin;
  }
  return bytes;
}

std::vector<std::string> found_faults() {
  std::vector<std::string> messages;
  for (const auto& [places, message] : found) messages.push_back(message);
  return messages;
}

void order_lanes(Fiber* warp, unsigned lanes) {
  uint32_t joined[kWarpLanes] = {};
  const auto each = [lanes](auto action) {
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      if (lanes >> lane & 1) action(lane);
    }
  };
  each([&](unsigned lane) {
    for (unsigned k = 0; k < kWarpLanes; ++k) joined[k] = std::max(joined[k], warp[lane].clock[k]);
  });
  each([&](unsigned lane) {
    std::copy(joined, joined + kWarpLanes, warp[lane].clock);
    ++warp[lane].clock[lane];
  });
}

}  // namespace cudasim
