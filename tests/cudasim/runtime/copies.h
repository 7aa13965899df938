// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory (cp.async): the data land when the thread that
// has started them waits for their group, and nobody may touch the destination until then.
#pragma once

#include "runtime/scheduler.h"

namespace cudasim {

// `pc`: of the kernel's call. Reads nothing, and fills with zeros, if not `real`.
CUDASIM_EXPORT void start_copy(void* shared, const void* global, size_t bytes, bool real, void* pc);
CUDASIM_EXPORT void commit_copies();
// Waits for all groups of the running thread but its last `pending`.
CUDASIM_EXPORT void wait_for_copies(size_t pending);

// ---- within the runtime

void drop_copies();  // of all threads: a block begins
// Fails if the running thread, which exits, has started copies that it has not waited for.
void require_no_copies();
// The copy that is on its way to an address, in words; nothing where there is none.
std::string copy_on_its_way_to(uintptr_t address);

}  // namespace cudasim
