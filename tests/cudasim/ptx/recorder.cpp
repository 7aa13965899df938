// SPDX-License-Identifier: Apache-2.0
// Hands launches and the tensors they may touch to Python (interpreted.py).
#include <cstdint>
#include <stdexcept>

#include "common/cuda.h"
#include "common/device.h"

namespace {

struct Python {
  // runs a kernel; writes a message to `error` where it fails
  void (*launch)(const char* tag, const uint32_t* sizes, uint64_t shared_bytes, int count,
                 const void* const* arguments, const size_t* bytes, char* error);
  void (*track)(const void* data, size_t bytes, const char* name, int writable);
  void (*untrack_all)();
} python;

}  // namespace

extern "C" __attribute__((visibility("default"))) void ptx_connect(const Python* callbacks) {
  python = *callbacks;
}

namespace ptx {

void launch(const char* tag, dim3 grid, dim3 block, size_t shared_bytes, int count,
            const void* const* arguments, const size_t* bytes) {
  const uint32_t sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  char error[1024] = "";
  python.launch(tag, sizes, shared_bytes, count, arguments, bytes, error);
  if (error[0]) throw std::runtime_error(error);
}

void track(const void* data, size_t bytes, const char* name, bool writable) {
  python.track(data, bytes, name, writable);
}

void untrack_all() { python.untrack_all(); }

}  // namespace ptx
