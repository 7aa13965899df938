// SPDX-License-Identifier: Apache-2.0
// Bytes to normalised pixels, three channels side by side. The work is memory traffic: a warp reads
// neighbouring pixels, some bytes of each plane a lane, looks them up, and turns them round in
// shared memory so that it writes 512 bytes at a time.
#include "common/element.cuh"
#include "common/warp.cuh"
#include "image/image_kernels.h"

namespace detr_fast {
namespace {

constexpr int kThreads = kByteValues;  // one for each entry of the table of a channel
constexpr int kWarps = kThreads / kWarpSize;
// Chunks that a warp takes one after the other: as many as leave enough blocks to fill a large GPU
// (132 multiprocessors, 8 blocks each), at most so many that the table of a block costs little.
constexpr int kEnoughBlocks = 1056, kMostChunks = 8;

// What a lane handles at a time. Three vectors of 16 bytes leave it: lanes that write them to
// shared memory 48 bytes apart meet in no bank.
template <typename element_t>
constexpr int kGroup = 16 / sizeof(element_t);  // pixels, and elements of a vector
template <typename element_t>
constexpr int kChunk = kWarpSize * kGroup<element_t>;  // pixels of a warp

template <int kBytes>
struct Word;
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};

template <typename word_t>
__device__ __forceinline__ int byte_of(const word_t (&words)[kChannels], int byte) {
  constexpr int size = sizeof(word_t);
  return static_cast<int>(words[byte / size] >> 8 * (byte % size)) & 255;
}

// The values of a group's pixels, those of a pixel side by side; 0 where its bit of `real` is not
// set. kPlanes: words[c] holds channel c of all pixels, else they hold the pixels in their order.
template <bool kPlanes, typename element_t, typename word_t>
__device__ __forceinline__ void look_up(const element_t (&table)[kChannels][kByteValues],
                                        const word_t (&words)[kChannels], unsigned real,
                                        element_t (&values)[kChannels * kGroup<element_t>]) {
  constexpr int pixels = kGroup<element_t>;
#pragma unroll
  for (int i = 0; i < pixels; ++i) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int byte = byte_of(words, kPlanes ? c * pixels + i : kChannels * i + c);
      element_t value = table[c][byte];
      if ((real >> i & 1) == 0) put(value, 0.0f);
      values[kChannels * i + c] = value;
    }
  }
}

// Whether a word can be read from here, and from `step` bytes on.
template <typename word_t>
__device__ __forceinline__ bool aligned(const uint8_t* address, int64_t step) {
  return (reinterpret_cast<uintptr_t>(address) | static_cast<uintptr_t>(step)) % sizeof(word_t) ==
         0;
}

// A block takes `steps` chunks a warp of one image. Groups begin where the number of a pixel in the
// batch is a multiple of their size: so vectors of the output are aligned in every image. The first
// chunk of an image may begin before it, by up to a group.
template <typename element_t>
__global__ void __launch_bounds__(kThreads)
    normalize_images_kernel(ImageInputs in, unsigned chunks, unsigned blocks, int steps,
                            element_t* __restrict__ out) {  // (images, height, width, 3)
  constexpr int group = kGroup<element_t>, chunk_pixels = kChunk<element_t>;
  using word_t = typename Word<group>::type;
  __shared__ element_t table[kChannels][kByteValues];
  __shared__ uint4 staged[kWarps][kChannels * kWarpSize];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    put(table[c][threadIdx.x],
        normalized(threadIdx.x, in.statistics.mean[c], in.statistics.std[c]));
  }
  __syncthreads();

  const unsigned image = blockIdx.x / blocks;
  const int pixels = in.height * in.width;
  const int before = static_cast<unsigned>(image * pixels) % group;  // pixels of the first group
  const uint8_t* const from = in.data + image * in.image_step;
  int height = in.height, width = in.width;
  if (in.sizes != nullptr) {
    height = real_side(in.sizes[2 * image], in.height);
    width = real_side(in.sizes[2 * image + 1], in.width);
  }
  const bool planes = in.column_step == 1;
  const bool whole_pixels = in.channel_step == 1 && in.column_step == kChannels;
  const bool no_gaps = in.row_step == in.width * in.column_step;  // between rows

  unsigned chunk = (blockIdx.x % blocks) * kWarps * steps + warp;
  for (int step = 0; step < steps && chunk < chunks; ++step, chunk += kWarps) {
    const int chunk_begin = static_cast<int>(chunk) * chunk_pixels - before;
    const int begin = chunk_begin + lane * group;
    const unsigned first = begin < 0 ? 0 : begin;
    const int first_y = first / unsigned(in.width), first_x = first % unsigned(in.width);

    unsigned real = 0;
    for (int i = 0, y = first_y, x = first_x; i < group; ++i) {
      const int pixel = begin + i;
      if (pixel < 0) continue;
      if (pixel < pixels && y < height && x < width) real |= 1u << i;
      if (++x == in.width) x = 0, ++y;
    }

    element_t values[kChannels * group];
    word_t words[kChannels] = {};
    const uint8_t* const address = from + first_y * in.row_step + first_x * in.column_step;
    const bool together =
        begin >= 0 && begin + group <= pixels && (no_gaps || first_x + group <= in.width);
    if (real != 0 && together && whole_pixels && aligned<word_t>(address, 0)) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) words[c] = reinterpret_cast<const word_t*>(address)[c];
      look_up<false>(table, words, real, values);
    } else {
      if (real != 0 && together && planes && aligned<word_t>(address, in.channel_step)) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          words[c] = *reinterpret_cast<const word_t*>(address + c * in.channel_step);
        }
      } else if (real != 0) {
        for (int i = 0, y = first_y, x = first_x; i < group; ++i) {
          if (begin + i < 0) continue;
          if (real >> i & 1) {
            const uint8_t* const pixel = from + y * in.row_step + x * in.column_step;
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
              words[c] |= static_cast<word_t>(pixel[c * in.channel_step]) << 8 * i;
            }
          }
          if (++x == in.width) x = 0, ++y;
        }
      }
      look_up<true>(table, words, real, values);
    }

#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      memcpy(&staged[warp][lane * kChannels + j], &values[j * group], sizeof(uint4));
    }
    __syncwarp();
    element_t* const to = out + (int64_t(image) * pixels + chunk_begin) * kChannels;
    const int low = chunk_begin < 0 ? -chunk_begin * kChannels : 0;  // elements of the image
    const int high = min(chunk_pixels, pixels - chunk_begin) * kChannels;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int vector = j * kWarpSize + lane, element = vector * group;
      if (element >= low && element + group <= high) {
        reinterpret_cast<uint4*>(to)[vector] = staged[warp][vector];
      } else {
        const element_t* const part = reinterpret_cast<const element_t*>(&staged[warp][vector]);
        for (int i = 0; i < group; ++i) {
          if (element + i >= low && element + i < high) to[element + i] = part[i];
        }
      }
    }
    __syncwarp();  // before the next chunk is staged
  }
}

unsigned divide_up(unsigned value, unsigned by) { return (value + by - 1) / by; }

template <typename element_t>
void launch(const ImageInputs& in, void* out, void* stream) {
  const unsigned pixels = in.height * in.width;
  const unsigned chunks = divide_up(pixels + kGroup<element_t> - 1, kChunk<element_t>);
  const uint64_t blocks_of_one = uint64_t(in.images) * divide_up(chunks, kWarps);
  const int steps = static_cast<int>(
      larger<uint64_t>(1, smaller<uint64_t>(kMostChunks, blocks_of_one / kEnoughBlocks)));
  const unsigned blocks = divide_up(chunks, kWarps * steps);
  DETR_FAST_LAUNCH(normalize_images_kernel<element_t>, in.images * blocks, kThreads, 0, stream, in,
                   chunks, blocks, steps, static_cast<element_t*>(out));
}

}  // namespace

void launch_normalize_images(const ImageInputs& inputs, ElementType type, void* out, void* stream) {
  if (type == ElementType::kHalf) return launch<__half>(inputs, out, stream);
  if (type == ElementType::kBFloat16) return launch<__nv_bfloat16>(inputs, out, stream);
  launch<float>(inputs, out, stream);
}

}  // namespace detr_fast
