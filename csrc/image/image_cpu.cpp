// SPDX-License-Identifier: Apache-2.0
// CPU twin of normalize_images.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "common/library.h"
#include "image/image.h"

namespace detr_fast {
namespace {

// The fewest pixels that are worth another thread (about 10 us of work).
constexpr int64_t kPixelsPerThread = 8192;

template <typename element_t>
struct Lookup {
  element_t of[kChannels][kByteValues];

  explicit Lookup(const ChannelStatistics& statistics) {
    for (int c = 0; c < kChannels; ++c) {
      for (int byte = 0; byte < kByteValues; ++byte) {
        of[c][byte] =
            static_cast<element_t>(normalized(byte, statistics.mean[c], statistics.std[c]));
      }
    }
  }
};

// `step` bytes from a pixel to the next; inlined for the two that are compile-time constants.
template <typename element_t>
DETR_FAST_HOST_DEVICE void look_up(const Lookup<element_t>& value, const uint8_t* red,
                                   int64_t channel_step, int64_t step, int64_t pixels,
                                   element_t* __restrict out) {
  const uint8_t *green = red + channel_step, *blue = green + channel_step;
  for (int64_t x = 0; x < pixels; ++x) {
    out[kChannels * x] = value.of[0][red[x * step]];
    out[kChannels * x + 1] = value.of[1][green[x * step]];
    out[kChannels * x + 2] = value.of[2][blue[x * step]];
  }
}

template <typename element_t>
void normalize_row(const Lookup<element_t>& value, const uint8_t* row, int64_t channel_step,
                   int64_t step, int64_t real, int64_t width, element_t* out) {
  if (step == 1) {
    look_up(value, row, channel_step, 1, real, out);
  } else if (step == kChannels && channel_step == 1) {
    look_up(value, row, 1, kChannels, real, out);
  } else {
    look_up(value, row, channel_step, step, real, out);
  }
  std::fill(out + kChannels * real, out + kChannels * width, element_t(0.0f));
}

template <typename element_t>
void normalize(const NormalizeInputs& inputs, const Tensor& out) {
  const Tensor& images = inputs.images;
  const int64_t height = images.size(2), width = images.size(3);
  const Lookup<element_t> value(inputs.statistics);
  const uint8_t* const from = images.const_data_ptr<uint8_t>();
  const int32_t* const sizes = inputs.sizes ? inputs.sizes->const_data_ptr<int32_t>() : nullptr;
  element_t* const to = out.mutable_data_ptr<element_t>();
  const int64_t grain = std::max<int64_t>(1, kPixelsPerThread / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, images.size(0) * height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height, y = row % height;
      int64_t real = width;
      if (sizes != nullptr) {
        const bool padding = y >= sizes[2 * image];
        real = padding ? 0 : real_side(sizes[2 * image + 1], static_cast<int>(width));
      }
      normalize_row(value, from + image * images.stride(0) + y * images.stride(2), images.stride(1),
                    images.stride(3), real, width, to + row * width * kChannels);
    }
  });
}

Tensor normalize_images_cpu(const Tensor& images, std::optional<Tensor> sizes,
                            std::vector<double> mean, std::vector<double> std,
                            torch::headeronly::ScalarType dtype) {
  const NormalizeInputs inputs = check_normalize_images(images, sizes, mean, std, dtype);
  const Tensor out = new_normalized(images, dtype);
  dispatch_floating_or_half(dtype, [&](auto zero) { normalize<decltype(zero)>(inputs, out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, CPU, m) {
  m.impl("normalize_images", TORCH_BOX(&normalize_images_cpu));
}

}  // namespace detr_fast
