// SPDX-License-Identifier: Apache-2.0
// The value of a byte, written once for the CPU twin, the CUDA kernel and the simulator. An image
// has but 256 values a channel: both twins compute them once and look the pixels up. That is exact
// for any mean and standard deviation, while a product with a reciprocal or an fma would be off by
// a unit in the last place, and a lookup costs less than two divisions.
#pragma once

#include "common/host_device.h"

namespace detr_fast {

constexpr int kChannels = 3;
constexpr int kByteValues = 256;

struct ChannelStatistics {
  float mean[kChannels], std[kChannels];
};

// In the order of the eager formula; there is no product that a compiler could fuse with the
// difference.
DETR_FAST_HOST_DEVICE float normalized(int byte, float mean, float std) {
  return (static_cast<float>(byte) / 255.0f - mean) / std;
}

// Rows or columns of an image that are not padding: `size` of `all`.
DETR_FAST_HOST_DEVICE int real_side(int size, int all) {
  return size < 0 ? 0 : size < all ? size : all;
}

}  // namespace detr_fast
