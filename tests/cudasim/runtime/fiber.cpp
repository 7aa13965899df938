// SPDX-License-Identifier: Apache-2.0
#include "runtime/fiber.h"

#include <sys/mman.h>

#include <stdexcept>

#if !defined(__x86_64__)
#error "the simulator's context switch is written for x86-64"
#endif

// void cudasim_switch(void** saved_stack_pointer, void* stack_pointer): the registers that a callee
// preserves go on the stack. swapcontext() would do, but costs two system calls: 5 times the time.
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
extern "C" void cudasim_switch(void** saved_stack_pointer, void* stack_pointer);

namespace cudasim {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kStride = kStackBytes + kPageBytes;
constexpr size_t kSavedRegisters = 6;

uintptr_t stacks = 0;

uintptr_t map_stacks() {
  void* const memory = mmap(nullptr, kMostThreads * kStride, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("cudasim: no memory for the stacks");
  for (size_t number = 0; number < kMostThreads; ++number) {
    mprotect(static_cast<char*>(memory) + number * kStride, kPageBytes, PROT_NONE);
  }
  return reinterpret_cast<uintptr_t>(memory);
}

}  // namespace

void assign_stack(Context& context, size_t number) {
  if (!stacks) stacks = map_stacks();
  context.stack = stacks + number * kStride + kPageBytes;
}

void prepare(Context& context, void (*entry)()) {
  // At the entry of a function the stack pointer is 8 beyond a multiple of 16; the word that it
  // points to is the return address, 0 here.
  auto* const top = reinterpret_cast<uintptr_t*>(context.stack + kStackBytes - 72);
  top[0] = 0;
  top[-1] = reinterpret_cast<uintptr_t>(entry);
  for (size_t i = 0; i < kSavedRegisters; ++i) top[-2 - static_cast<ptrdiff_t>(i)] = 0;
  context.stack_pointer = top - 1 - kSavedRegisters;
}

void switch_context(Context& from, Context& to) {
  cudasim_switch(&from.stack_pointer, to.stack_pointer);
}

bool is_on_a_stack(uintptr_t address) { return address - stacks < kMostThreads * kStride; }

}  // namespace cudasim
