// SPDX-License-Identifier: Apache-2.0
// Fibers: stacks with a guard page, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cudasim {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMostThreads = 1024;  // of a block

struct Context {
  void* stack_pointer = nullptr;
  uintptr_t stack = 0;  // lowest usable byte; 0 for the thread that called run_grid
};

// Gives `context` the stack of its number, made on the first call.
void assign_stack(Context&, size_t number);
// The next switch to `context` calls `entry`, which must not return.
void prepare(Context&, void (*entry)());
void switch_context(Context& from, Context& to);

// Whether an address lies in the stack of any fiber.
bool is_on_a_stack(uintptr_t address);

}  // namespace cudasim
