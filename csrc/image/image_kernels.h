// SPDX-License-Identifier: Apache-2.0
// Launcher of normalize_images: device pointers, no torch. `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "image/image_math.h"

namespace detr_fast {

// Images in any strides. All counts and the number of pixels of an image are at most 2^30.
struct ImageInputs {
  const uint8_t* data;  // (images, 3, height, width)
  int64_t image_step, channel_step, row_step, column_step;
  const int32_t* sizes;  // (images, 2): height and width without padding; null: there is none
  int images, height, width;
  ChannelStatistics statistics;
};

// `type` is float, half or bfloat16; `out` (images, height, width, 3) begins on 16 bytes.
void launch_normalize_images(const ImageInputs& inputs, ElementType type, void* out, void* stream);

}  // namespace detr_fast
