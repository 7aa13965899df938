// SPDX-License-Identifier: Apache-2.0
// The checker: what GCC's -fsanitize=thread reports, access by access, against shadow memory.
#pragma once

#include "runtime/scheduler.h"

namespace cudasim {

struct Access {
  uintptr_t address;
  size_t bytes;
  bool write, atomic;
  void* pc;  // the return address of the instrumentation: after the access
};

void check_access(const Access&, size_t alignment);

// Of functions that are not compiled with the kernel, at `pc`, where it calls them; nothing without
// the checker. The second kind has to be within shared memory.
void plain_access(const void* address, size_t bytes, bool write, void* pc);
void shared_access(const void* address, size_t bytes, bool write, void* pc);

// Makes bytes of shared memory uninitialised; whether any of them has been written since.
void forget_values(uintptr_t address, size_t bytes);
bool has_values(uintptr_t address, size_t bytes);

// A memory range that kernels of later launches may touch, of which nothing else is known:
// `writable` for outputs, `uninitialised` where a read before a write is a fault.
CUDASIM_EXPORT void track(const void* data, size_t bytes, const std::string& name, bool writable,
                          bool uninitialised);
CUDASIM_EXPORT void untrack_all();
// The bytes of an uninitialised range that no kernel has written.
CUDASIM_EXPORT size_t unwritten_bytes(const void* data);

void begin_checked_launch(const Launch&);  // after select_image()
void begin_checked_block();
// Of the static shared arrays that the launch has touched; 0 without the checker.
size_t used_static_bytes();
// What has not ended the launch: races and uninitialised reads, once for each place in the source.
std::vector<std::string> found_faults();

// Lanes that met in __syncwarp: what each did before is seen by all after it.
void order_lanes(Fiber* warp, unsigned lanes);

}  // namespace cudasim
