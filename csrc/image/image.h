// SPDX-License-Identifier: Apache-2.0
// Contract of normalize_images and the checks that its twins share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/layout.h"
#include "image/image_math.h"

namespace detr_fast {

// normalize_images(images (B, 3, H, W) uint8, sizes none or (B, 2) int32, mean, std, dtype)
//     -> (B, H, W, 3), contiguous, float, half or bfloat16
//   (x / 255 - mean) / std in float, rounded to dtype; 0 where the row is not below the first, or
//   the column not below the second of an image's sizes, whatever the byte is. Images may lie in
//   any strides; planes and pixels without gaps are read several bytes at a time.
struct NormalizeInputs {
  Tensor images;
  std::optional<Tensor> sizes;  // contiguous
  ChannelStatistics statistics;
};

inline void check_channels(const std::vector<double>& values, const char* name) {
  STD_TORCH_CHECK(values.size() == kChannels, name, ": expected ", kChannels, " numbers, got ",
                  values.size());
}

inline NormalizeInputs check_normalize_images(const Tensor& images,
                                              const std::optional<Tensor>& sizes,
                                              const std::vector<double>& mean,
                                              const std::vector<double>& std,
                                              torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(images.scalar_type() == ScalarType::Byte, "images: expected dtype Byte, got ",
                  images.scalar_type());
  check_shape(images, "images", {kAnySize, kChannels, kAnySize, kAnySize});
  constexpr int64_t most = int64_t(1) << 30;  // positions in an image are int
  const int64_t count = images.size(0), height = images.size(2), width = images.size(3);
  STD_TORCH_CHECK(count <= most && height <= most && width <= most && height * width <= most,
                  "images: expected at most ", most, " images and pixels of an image, got ", count,
                  " of ", height, " x ", width);
  NormalizeInputs inputs = {images, {}, {}};
  if (sizes) {
    STD_TORCH_CHECK(sizes->scalar_type() == ScalarType::Int, "sizes: expected dtype Int, got ",
                    sizes->scalar_type());
    check_shape(*sizes, "sizes", {count, 2});
    check_device(*sizes, "sizes", images, "images");
    inputs.sizes = dense(*sizes);
  }
  check_channels(mean, "mean");
  check_channels(std, "std");
  for (int c = 0; c < kChannels; ++c) {
    inputs.statistics.mean[c] = static_cast<float>(mean[c]);
    inputs.statistics.std[c] = static_cast<float>(std[c]);
  }
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "dtype: expected Float, Half or BFloat16, got ", dtype);
  return inputs;
}

inline Tensor new_normalized(const Tensor& images, torch::headeronly::ScalarType dtype) {
  return torch::stable::new_empty(
      images, {images.size(0), images.size(2), images.size(3), kChannels}, dtype);
}

}  // namespace detr_fast
