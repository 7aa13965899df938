// SPDX-License-Identifier: Apache-2.0
// Which rows of a padded sequence are real, and where elements lie in memory.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace detr_fast {

constexpr int kHeadDim = 32;
constexpr float kScale = 0.176776695f;  // of scores, 1 / sqrt(kHeadDim)

// The real rows of an image, numbered from 0 on: a rectangle at the upper left of a grid, or, with
// the width of the grid its own, a run at the beginning.
struct Rows {
  int count;
  int width, padded_width;  // of the rectangle and of the grid, at least 1

  // Of real row `number` in the padded sequence.
  DETR_FAST_HOST_DEVICE int position(int number) const {
    return number / width * padded_width + number % width;
  }

  // Positions of real rows are before this one, those of larger numbers are not.
  DETR_FAST_HOST_DEVICE int end() const {
    return width == padded_width ? count : count / width * padded_width;
  }

  DETR_FAST_HOST_DEVICE bool real(int position) const {
    if (width == padded_width) return position < count;
    return position % padded_width < width && position / padded_width < count / width;
  }
};

DETR_FAST_HOST_DEVICE int between(int low, int value, int high) {
  return value < low ? low : value > high ? high : value;
}

// What rect (B, 2), (h, w), or count (B,), either of them or none, say of an image: numbers that
// are out of range are brought into it.
DETR_FAST_HOST_DEVICE Rows rows_of(const int32_t* rect, const int32_t* count, int image, int length,
                                   int padded_width) {
  if (rect != nullptr) {
    const int height = between(0, rect[2 * image], length / padded_width);
    const int width = between(0, rect[2 * image + 1], padded_width);
    return {height * width, width > 0 ? width : 1, padded_width};
  }
  const int all = length > 0 ? length : 1;
  return {count == nullptr ? length : between(0, count[image], length), all, all};
}

// A tensor (images, heads, rows, columns) of elements of two bytes whose columns are neighbours;
// steps are in elements.
struct HeadsInput {
  const void* data;
  int64_t image_step, head_step;
  int row_step;
};

DETR_FAST_HOST_DEVICE int64_t offset(const HeadsInput& input, int image, int head, int row) {
  return image * input.image_step + head * input.head_step + int64_t(row) * input.row_step;
}

// Of a contiguous tensor (images, rows, heads, columns).
DETR_FAST_HOST_DEVICE int64_t rows_first(int image, int row, int head, int rows, int heads,
                                         int columns) {
  return ((int64_t(image) * rows + row) * heads + head) * columns;
}

// Of a contiguous tensor (images, heads, rows, columns).
DETR_FAST_HOST_DEVICE int64_t heads_first(int image, int head, int row, int heads, int rows,
                                          int columns) {
  return ((int64_t(image) * heads + head) * rows + row) * columns;
}

}  // namespace detr_fast
