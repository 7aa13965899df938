// SPDX-License-Identifier: Apache-2.0
// The shared library that a kernel lies in: its data, its shared arrays, its source lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cudasim {

// Makes the library that holds `code` the one that the functions below speak of.
void select_image(const void* code);

// The library's thread-local segment, which holds its __shared__ arrays.
struct Segment {
  uintptr_t begin = 0;
  size_t bytes = 0;
};
Segment shared_segment();

struct SharedArray {
  std::string name;  // without the kernel's
  uintptr_t begin;
  size_t bytes;
  bool guard;  // not an array: the flag that tells whether one has been constructed
};
std::vector<SharedArray> shared_arrays();

bool is_image_data(uintptr_t address);

uint32_t image_offset(const void* pc);
// "kernels.cu:17" of the call that returns to this offset: the innermost inlined frame that is the
// project's own, not the simulator's or CUDA's.
std::string source_line(uint32_t offset);

}  // namespace cudasim
