// SPDX-License-Identifier: Apache-2.0
// What the CPU twins of both matching ops do with a problem: memory of a thread, and the solver
// compiled for each instruction set.
#pragma once

#include <cstddef>
#include <memory>

#include "common/multiversion.h"
#include "matcher/assignment.h"

namespace detr_fast {
namespace {

// The memory of one thread, for the largest problem that it meets.
class Scratch {
 public:
  // `count` numbers that are not set, on a cache line.
  template <typename T>
  T* take(size_t count) {
    const size_t begin = used_;
    used_ += (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line) * sizeof(Line);
    return reinterpret_cast<T*>(reinterpret_cast<char*>(lines_.get()) + begin);
  }

  // Gives everything back; there is room for `bytes` in up to `pieces` pieces from here on.
  void reset(size_t bytes, size_t pieces) {
    const size_t lines = bytes / sizeof(Line) + pieces;
    if (lines > capacity_) {
      lines_.reset(new Line[lines]);
      capacity_ = lines;
    }
    used_ = 0;
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
  size_t capacity_ = 0, used_ = 0;
};

template <Ties kTies, typename scalar_t>
DETR_FAST_MULTIVERSION bool solve(CostRows<scalar_t> costs, AssignmentState state) {
  const OneLane lane;
  clear_state(state, 0, 1);
  if constexpr (kTies == Ties::kAny) find_row_minima(lane, costs, state, 0, 1);
  return shortest_paths<kTies>(lane, costs, state);
}

}  // namespace
}  // namespace detr_fast
