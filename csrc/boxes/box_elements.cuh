// SPDX-License-Identifier: Apache-2.0
// Boxes whose numbers are elements of any of the four types, in any strides.
#pragma once

#include "boxes/box_math.h"
#include "common/element.cuh"

namespace detr_fast {

template <typename scalar_t>
__device__ __forceinline__ Box<scalar_t> load_box(const void* data, ElementType type,
                                                  long long index, long long step) {
  return {load<scalar_t>(data, type, index), load<scalar_t>(data, type, index + step),
          load<scalar_t>(data, type, index + 2 * step),
          load<scalar_t>(data, type, index + 3 * step)};
}

// Box `index` of a contiguous tensor.
template <typename scalar_t>
__device__ __forceinline__ void store_box(void* data, ElementType type, long long index,
                                          Box<scalar_t> box) {
  dispatch_element(type, [&](auto zero) {
    auto* const out = static_cast<decltype(zero)*>(data) + index * 4;
    put(out[0], box.x0);
    put(out[1], box.y0);
    put(out[2], box.x1);
    put(out[3], box.y1);
  });
}

}  // namespace detr_fast
