// SPDX-License-Identifier: Apache-2.0
// Copies are a thread's own: those of the groups that it has committed, then those since. The bytes
// of a destination are uninitialised from the start of a copy to its landing; both are writes.
#include "runtime/copies.h"

#include <array>
#include <cstring>

#include "runtime/checker.h"
#include "runtime/image.h"

namespace cudasim {
namespace {

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  bool real;
  void* pc;
};

struct Copies {
  std::vector<Copy> copies;    // in the order of their start
  std::vector<size_t> groups;  // how many of them each group has
  size_t committed = 0;        // copies in groups
};

std::array<Copies, kMostThreads> copies_of;  // by rank
bool any;                                    // has a copy been started in this block

std::string line_of(const Copy& copy) { return source_line(image_offset(copy.pc)); }

}  // namespace

void start_copy(void* shared, const void* global, size_t bytes, bool real, void* pc) {
  const Copy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes, real, pc};
  const uintptr_t to = reinterpret_cast<uintptr_t>(shared);
  const uintptr_t from = reinterpret_cast<uintptr_t>(global);
  if ((to | from) % bytes) {
    fail("misaligned asynchronous copy of " + std::to_string(bytes) + " bytes", line_of(copy));
  }
  if (real) plain_access(global, bytes, false, pc);
  shared_access(shared, bytes, true, pc);
  forget_values(to, bytes);
  std::memset(shared, 0xff, bytes);
  copies_of[current_thread->rank].copies.push_back(copy);
  any = true;
}

void commit_copies() {
  Copies& own = copies_of[current_thread->rank];
  own.groups.push_back(own.copies.size() - own.committed);
  own.committed = own.copies.size();
}

void wait_for_copies(size_t pending) {
  Copies& own = copies_of[current_thread->rank];
  while (own.groups.size() > pending) {
    for (size_t i = 0; i < own.groups.front(); ++i) {
      const Copy copy = own.copies[i];
      if (has_values(reinterpret_cast<uintptr_t>(copy.to), copy.bytes)) {
        fail("write to where an asynchronous copy was on its way to, which was started",
             line_of(copy));
      }
      shared_access(copy.to, copy.bytes, true, copy.pc);
      if (copy.real) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    own.copies.erase(own.copies.begin(), own.copies.begin() + ptrdiff_t(own.groups.front()));
    own.committed -= own.groups.front();
    own.groups.erase(own.groups.begin());
  }
}

void drop_copies() {
  if (!any) return;
  for (Copies& copies : copies_of) {
    copies.copies.clear();
    copies.groups.clear();
    copies.committed = 0;
  }
  any = false;
}

void require_no_copies() {
  const Copies& own = copies_of[current_thread->rank];
  if (own.copies.empty()) return;
  fail("exit with " + std::to_string(own.copies.size()) +
           " asynchronous copies that were not waited for, the first of them started",
       line_of(own.copies.front()));
}

std::string copy_on_its_way_to(uintptr_t address) {
  for (size_t rank = 0; any && rank < copies_of.size(); ++rank) {
    for (const Copy& copy : copies_of[rank].copies) {
      if (address - reinterpret_cast<uintptr_t>(copy.to) >= copy.bytes) continue;
      return "an asynchronous copy of " + describe(fibers[rank]) + " at " + line_of(copy);
    }
  }
  return "";
}

}  // namespace cudasim
