// SPDX-License-Identifier: Apache-2.0
// What GCC calls in code compiled with -fsanitize=thread (every load and store) and with parts of
// -fsanitize=undefined. These definitions take the place of libtsan and libubsan.
#include "runtime/checker.h"

#define CUDASIM_HOOK extern "C" CUDASIM_EXPORT

namespace {

void check(void* address, size_t bytes, bool write, size_t alignment, void* pc) {
  cudasim::check_access({reinterpret_cast<uintptr_t>(address), bytes, write, false, pc}, alignment);
}

}  // namespace

#define CUDASIM_LOAD_AND_STORE(prefix, bytes, alignment)                  \
  CUDASIM_HOOK void __tsan_##prefix##read##bytes(void* address) {         \
    check(address, bytes, false, alignment, __builtin_return_address(0)); \
  }                                                                       \
  CUDASIM_HOOK void __tsan_##prefix##write##bytes(void* address) {        \
    check(address, bytes, true, alignment, __builtin_return_address(0));  \
  }
#define CUDASIM_LOADS_AND_STORES(bytes)           \
  CUDASIM_LOAD_AND_STORE(, bytes, bytes)          \
  CUDASIM_LOAD_AND_STORE(volatile_, bytes, bytes) \
  CUDASIM_LOAD_AND_STORE(unaligned_, bytes, 1)
CUDASIM_LOADS_AND_STORES(1)
CUDASIM_LOADS_AND_STORES(2)
CUDASIM_LOADS_AND_STORES(4)
CUDASIM_LOADS_AND_STORES(8)
CUDASIM_LOADS_AND_STORES(16)

CUDASIM_HOOK void __tsan_read_range(void* address, size_t bytes) {
  check(address, bytes, false, 1, __builtin_return_address(0));
}
CUDASIM_HOOK void __tsan_write_range(void* address, size_t bytes) {
  check(address, bytes, true, 1, __builtin_return_address(0));
}
CUDASIM_HOOK void __tsan_init() {}

// The first member of every record that GCC hands to a handler of undefined behaviour.
struct UndefinedBehaviour {
  const char* file;
  unsigned line, column;
};

#define CUDASIM_UNDEFINED(name, fault)                                       \
  CUDASIM_HOOK void __ubsan_handle_##name(const UndefinedBehaviour* where) { \
    cudasim::fail(fault, cudasim::Location{where->file, int(where->line)});  \
  }
CUDASIM_UNDEFINED(type_mismatch_v1, "misaligned access")
CUDASIM_UNDEFINED(out_of_bounds, "array index out of bounds")
CUDASIM_UNDEFINED(shift_out_of_bounds, "shift out of range")
CUDASIM_UNDEFINED(add_overflow, "integer overflow in +")
CUDASIM_UNDEFINED(sub_overflow, "integer overflow in -")
CUDASIM_UNDEFINED(mul_overflow, "integer overflow in *")
CUDASIM_UNDEFINED(negate_overflow, "integer overflow in unary -")
CUDASIM_UNDEFINED(divrem_overflow, "integer division by zero or overflow")
CUDASIM_UNDEFINED(float_cast_overflow, "conversion to integer out of range")
