// SPDX-License-Identifier: Apache-2.0
// The losses of all layers and their gradients. A block takes 32 queries of one image: eight of its
// warps read the logits, each of them once, while the first looks at labels and boxes, a lane a
// query. What the blocks of a layer have added up, a second launch adds up in a fixed order.
#include "boxes/box_elements.cuh"
#include "common/cuda.h"
#include "common/element.cuh"
#include "common/warp.cuh"
#include "criterion/row_turn.cuh"
#include "criterion/set_loss_kernels.h"

namespace detr_fast {
namespace {

static_assert(kChunkQueries == kWarpSize, "a lane a query");
constexpr int kThreads = kWarpSize + kChunkQueries * kRowLanes;
// The fewest blocks that a multiprocessor shall hold: left to itself, ptxas spills to hold more.
template <typename scalar_t>
constexpr int kBlocks = sizeof(scalar_t) == sizeof(float) ? 3 : 1;
// Lanes that add up the chunks of an image, and images at a time, as many as a warp has lanes.
constexpr int kImageLanes = 8;
constexpr int kFinishThreads = kWarpSize * kImageLanes;

// The same of the lane whose number differs in these bits.
template <typename T>
__device__ __forceinline__ T from_lane(T value, int bits) {
  unsigned words[sizeof(T) / sizeof(unsigned)];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_xor_sync(kWholeWarp, word, bits);
  memcpy(&value, words, sizeof(T));
  return value;
}

// The sum over kLanes neighbours, which all get it; always added in the same order.
template <int kLanes, typename Sums>
__device__ __forceinline__ Sums sum_of_lanes(Sums sums) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sums = sum_of(sums, from_lane(sums, distance));
  }
  return sums;
}

template <typename scalar_t>
__device__ __forceinline__ int targets_of(const LossArguments<scalar_t>& arguments, int image) {
  return max(0, min(arguments.count[image], arguments.targets));
}

// The queries of a block.
struct Chunk {
  int layer, image;
  long long first;  // of layers x images x most_queries
  int begin;        // the first of its image
  int queries;      // may be none
  int targets;      // of the image
};

template <typename scalar_t>
__device__ __forceinline__ Chunk chunk_of(const LossArguments<scalar_t>& arguments) {
  const int row = blockIdx.x / arguments.chunks;
  Chunk chunk;
  chunk.layer = row / arguments.images;
  chunk.image = row % arguments.images;
  chunk.begin = blockIdx.x % arguments.chunks * kChunkQueries;
  chunk.first = static_cast<long long>(row) * arguments.most_queries + chunk.begin;
  chunk.queries = min(kChunkQueries, arguments.layers[chunk.layer].queries - chunk.begin);
  chunk.targets = targets_of(arguments, chunk.image);
  return chunk;
}

// What is known of a query; `slot` is its place in the chunk.
struct Query {
  int slot;
  int target;  // -1: free
  int column;  // of its class; -1: free, or there is no such target or label
  bool wrong;  // there is none
};

template <typename scalar_t>
__device__ __forceinline__ Query query_of(const LossArguments<scalar_t>& arguments,
                                          const Chunk& chunk, int slot) {
  const int64_t target = arguments.target_of_query[chunk.first + slot];
  Query query = {slot, -1, -1, target >= 0};
  if (target < 0 || target >= chunk.targets) return query;
  query.target = int(target);
  const int64_t label =
      arguments.labels[static_cast<long long>(chunk.image) * arguments.targets + target];
  const bool no_object = arguments.formula.kind == ClassLossKind::kCrossEntropy;
  const int classes = arguments.layers[chunk.layer].columns - (no_object ? 1 : 0);
  if (label < 0 || label >= classes) return query;
  query.column = int(label);
  query.wrong = false;
  return query;
}

// Where the logits of a query begin.
template <typename scalar_t>
__device__ __forceinline__ long long row_of(const LossArguments<scalar_t>& arguments,
                                            const Chunk& chunk, int slot) {
  const LayerInput& logits = arguments.layers[chunk.layer].logits;
  return chunk.image * logits.image_step + (chunk.begin + slot) * logits.query_step;
}

template <typename scalar_t>
__device__ __forceinline__ scalar_t logit_of(const LossArguments<scalar_t>& arguments,
                                             const Chunk& chunk, int slot, int column) {
  const LayerInput& logits = arguments.layers[chunk.layer].logits;
  return load<scalar_t>(logits.data, arguments.logits_type,
                        row_of(arguments, chunk, slot) + column * logits.column_step);
}

template <typename scalar_t>
__device__ __forceinline__ scalar_t weight_of(const LossArguments<scalar_t>& arguments,
                                              int column) {
  return arguments.class_weight == nullptr ? scalar_t(1) : arguments.class_weight[column];
}

// A matched pair, as centre and size.
template <typename scalar_t>
struct Pair {
  Box<scalar_t> src, tgt;
};

template <typename scalar_t>
__device__ __forceinline__ Pair<scalar_t> pair_of(const LossArguments<scalar_t>& arguments,
                                                  const Chunk& chunk, const Query& query) {
  const LayerInput& boxes = arguments.layers[chunk.layer].boxes;
  const long long target = static_cast<long long>(chunk.image) * arguments.targets + query.target;
  return {load_box<scalar_t>(
              boxes.data, arguments.boxes_type,
              chunk.image * boxes.image_step + (chunk.begin + query.slot) * boxes.query_step,
              boxes.column_step),
          load_box<scalar_t>(arguments.target_boxes, arguments.target_boxes_type, target * 4, 1)};
}

// The loss of the sigmoid in the column of a query's class.
template <typename scalar_t>
__device__ Term<scalar_t> matched_term(const LossArguments<scalar_t>& arguments, const Chunk& chunk,
                                       const Query& query) {
  const scalar_t x = logit_of(arguments, chunk, query.slot, query.column);
  scalar_t quality = 1;
  if (arguments.formula.kind == ClassLossKind::kVarifocal) {
    const Pair<scalar_t> pair = pair_of(arguments, chunk, query);
    quality = similarity<Hull::kNone>(corners_of(pair.src), corners_of(pair.tgt), scalar_t(0));
  }
  Term<scalar_t> term;
  dispatch_sigmoid(arguments.formula, [&](auto kind, auto squared) {
    term = positive_term<kind.value, squared.value>(x, quality, arguments.formula);
  });
  return term;
}

// Of the columns of a row that a lane has seen: the largest logit, the sum of the exponentials less
// it or of the losses of the sigmoid, and the first column of the largest logit.
template <typename scalar_t>
struct RowSums {
  scalar_t most, sum;
  int best;
};

// `matched` is the column that does not belong into the sum of losses, as an index of the turn.
// Turns come from the last to the first, as do the columns of each: so ties end at the first.
template <bool kCrossEntropy, typename scalar_t>
__device__ __forceinline__ void add_turn(ClassLossFormula<scalar_t> formula,
                                         const scalar_t (&values)[kHeld], Turn turn, int matched,
                                         RowSums<scalar_t>& row) {
  const scalar_t before = row.most;
  int best = -1;
#pragma unroll
  for (int i = kHeld - 1; i >= 0; --i) {
    if (values[i] >= row.most) {  // no NaN is
      row.most = values[i];
      best = i;
    }
  }
  if (best >= 0) row.best = turn.column(best);
  if constexpr (kCrossEntropy) {
    // other lanes may have numbers where this one has minus infinity alone
    const scalar_t most = row.most > -scalar_t(kInfinity) ? row.most : scalar_t(0);
    row.sum *= exponential(before - most);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) row.sum += exponential(values[i] - most);
  } else {
    dispatch_sigmoid(formula, [&](auto kind, auto squared) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const scalar_t loss = negative_term<kind.value, squared.value>(values[i], formula).loss;
        if (i < turn.held && i != matched) row.sum += loss;
      }
    });
  }
}

// By the lanes of a row, who all get it; all lanes of the warp take part, `real` or not.
template <bool kCrossEntropy, typename scalar_t>
__device__ RowSums<scalar_t> sum_row(const LossArguments<scalar_t>& arguments, const Chunk& chunk,
                                     int slot, int lane, bool real) {
  const LossLayer& layer = arguments.layers[chunk.layer];
  const int columns = real ? layer.columns : 0;
  int matched = -1;
  if (!kCrossEntropy && real) matched = query_of(arguments, chunk, slot).column;
  const long long offset = real ? row_of(arguments, chunk, slot) : 0;
  RowSums<scalar_t> row = {-scalar_t(kInfinity), 0, layer.columns};
  const int last = (layer.columns - 1) / kTurnColumns * kTurnColumns;
  for (int begin = last; begin >= 0; begin -= kTurnColumns) {
    const Turn turn = turn_of(lane, begin, columns, layer.by_four);
    scalar_t values[kHeld];
    dispatch_source<scalar_t>(arguments.logits_type, [&](auto zero) {
      const auto* const data = static_cast<const decltype(zero)*>(layer.logits.data) + offset;
      load_turn(data, layer.logits.column_step, turn, values);
    });
    add_turn<kCrossEntropy>(arguments.formula, values, turn, turn.index_of(matched), row);
  }
  const scalar_t own = row.most;
  for (int distance = kRowLanes / 2; distance > 0; distance /= 2) {
    const scalar_t most = __shfl_xor_sync(kWholeWarp, row.most, distance);
    const int best = __shfl_xor_sync(kWholeWarp, row.best, distance);
    if (most > row.most || (most == row.most && best < row.best)) {
      row.most = most;
      row.best = best;
    }
  }
  if constexpr (kCrossEntropy) row.sum *= exponential(own - row.most);
  for (int distance = kRowLanes / 2; distance > 0; distance /= 2) {
    row.sum += __shfl_xor_sync(kWholeWarp, row.sum, distance);
  }
  return row;
}

template <bool kCrossEntropy, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    set_loss_kernel(const LossArguments<scalar_t> arguments, const LossResults<scalar_t> results) {
  __shared__ RowSums<scalar_t> rows[kChunkQueries];
  const Chunk chunk = chunk_of(arguments);
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int last = arguments.layers[chunk.layer].columns - 1;
  QuerySums sums = {};
  int column = -1;
  scalar_t logit = 0, weight = 0;
  if (warp > 0) {
    const int slot = (int(threadIdx.x) - kWarpSize) / kRowLanes, row_lane = lane % kRowLanes;
    if (slot - lane / kRowLanes < chunk.queries) {  // the first query of the warp
      const RowSums<scalar_t> row =
          sum_row<kCrossEntropy>(arguments, chunk, slot, row_lane, slot < chunk.queries);
      if (row_lane == 0) rows[slot] = row;
    }
  } else if (lane < chunk.queries) {
    const Query query = query_of(arguments, chunk, lane);
    column = query.column;
    sums.wrong = query.wrong;
    if (kCrossEntropy) {
      const int expected = column >= 0 ? column : last;
      logit = logit_of(arguments, chunk, lane, expected);
      weight = weight_of(arguments, expected);
    }
    if (column >= 0) {
      const Pair<scalar_t> pair = pair_of(arguments, chunk, query);
      const BoxLosses<scalar_t> losses = matched_box_losses(pair.src, pair.tgt);
      sums.bbox = losses.l1;
      sums.giou = losses.giou;
      sums.matched = 1;
      if constexpr (!kCrossEntropy) sums.class_loss = matched_term(arguments, chunk, query).loss;
    }
  }
  __syncthreads();
  if (warp > 0) return;
  scalar_t most = 0, log_sum = 0;
  if (lane < chunk.queries) {
    const RowSums<scalar_t> row = rows[lane];
    sums.predicted = row.best != last;
    sums.correct = row.best == column;
    if (kCrossEntropy) {
      most = row.most;
      log_sum = logarithm(row.sum);
      sums.class_loss = weight * (log_sum - (logit - most));
      sums.weight = weight;
    } else {
      sums.class_loss += row.sum;
    }
  }
  if (kCrossEntropy && chunk.begin + lane < arguments.most_queries) {
    scalar_t* const softmax = results.softmax + (chunk.first + lane) * 2;
    softmax[0] = most;
    softmax[1] = log_sum;
  }
  sums = sum_of_lanes<kWarpSize>(sums);
  if (lane == 0) results.sums[blockIdx.x] = sums;
}

// A block a layer: some lanes add up the chunks of an image, then the first warp all images.
template <typename scalar_t>
__global__ void __launch_bounds__(kFinishThreads)
    set_loss_finish_kernel(const LossArguments<scalar_t> arguments,
                           const LossResults<scalar_t> results) {
  __shared__ LayerSums totals[kWarpSize];
  const int layer = blockIdx.x, images = arguments.images;
  const int group = threadIdx.x / kImageLanes, lane = threadIdx.x % kImageLanes;
  LayerSums total = {};
  for (int base = 0; base < images; base += kWarpSize) {
    const int image = base + group;
    const bool real = image < images;
    const long long row = static_cast<long long>(layer) * images + image;
    QuerySums sums = {};
    int bits = 0;
    for (int chunk = lane; real && chunk < arguments.chunks; chunk += kImageLanes) {
      sums = sum_of(sums, results.sums[row * arguments.chunks + chunk]);
    }
    for (int i = lane; real && results.status != nullptr && i < results.groups; i += kImageLanes) {
      bits |= results.status[row * results.groups + i];
    }
    sums = sum_of_lanes<kImageLanes>(sums);
    for (int distance = kImageLanes / 2; distance > 0; distance /= 2) {
      bits |= __shfl_xor_sync(kWholeWarp, bits, distance);
    }
    if (real) {
      total = sum_of(total, image_sums(sums, targets_of(arguments, image), bits));
    }
  }
  if (lane == 0) totals[group] = total;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  total = sum_of_lanes<kWarpSize>(totals[threadIdx.x]);
  if (threadIdx.x > 0) return;
  const scalar_t num_boxes = results.num_boxes != nullptr
                                 ? *results.num_boxes
                                 : scalar_t(total.targets > 0 ? total.targets : 1);
  const bool cross_entropy = arguments.formula.kind == ClassLossKind::kCrossEntropy;
  write_layer(total, cross_entropy, images, num_boxes, results.losses + layer * kLossColumns,
              results.divisor + layer * kDivisorColumns);
}

// The gradient of a query's box, which is 0 where it is free.
template <typename scalar_t>
__device__ void box_backward(const LossArguments<scalar_t>& arguments,
                             const LossGradients<scalar_t>& gradients, const Chunk& chunk,
                             int slot) {
  const scalar_t* const grad = gradients.grad + chunk.layer * kLossColumns;
  const scalar_t by = gradients.divisor[chunk.layer * kDivisorColumns + kBoxDivisor];
  const Query query = query_of(arguments, chunk, slot);
  Box<scalar_t> slope = {0, 0, 0, 0};
  if (query.column >= 0) {
    const Pair<scalar_t> pair = pair_of(arguments, chunk, query);
    const BoxLosses<scalar_t> scale = {grad[kBoxLoss] / by, grad[kGiouLoss] / by};
    slope = matched_box_losses_gradient(pair.src, pair.tgt, scale).first;
  }
  const long long index =
      static_cast<long long>(chunk.image) * arguments.layers[chunk.layer].queries + chunk.begin +
      slot;
  store_box(gradients.boxes[chunk.layer], arguments.boxes_type, index, slope);
}

// The gradient of a query's logits, by the lanes of its row.
template <bool kCrossEntropy, typename scalar_t>
__device__ void row_backward(const LossArguments<scalar_t>& arguments,
                             const LossGradients<scalar_t>& gradients, const Chunk& chunk, int slot,
                             int lane) {
  const LossLayer& layer = arguments.layers[chunk.layer];
  const ClassLossFormula<scalar_t> formula = arguments.formula;
  const Query query = query_of(arguments, chunk, slot);
  const scalar_t scale = gradients.grad[chunk.layer * kLossColumns + kClassLoss] /
                         gradients.divisor[chunk.layer * kDivisorColumns + kClassDivisor];
  // of the column of its class: what is taken off, or what stands there
  int expected = query.column;
  scalar_t special = 0, most = 0, log_sum = 0;
  if constexpr (kCrossEntropy) {
    if (expected < 0) expected = layer.columns - 1;
    special = scale * weight_of(arguments, expected);
    most = gradients.softmax[(chunk.first + slot) * 2];
    log_sum = gradients.softmax[(chunk.first + slot) * 2 + 1];
  } else if (expected >= 0) {
    special = scale * matched_term(arguments, chunk, query).slope;
  }
  const long long in = row_of(arguments, chunk, slot);
  const long long row = static_cast<long long>(chunk.image) * layer.queries + chunk.begin + slot;
  for (int begin = 0; begin < layer.columns; begin += kTurnColumns) {
    const Turn turn = turn_of(lane, begin, layer.columns, layer.by_four);
    const int at = turn.index_of(expected);
    scalar_t values[kHeld];
    dispatch_source<scalar_t>(arguments.logits_type, [&](auto zero) {
      const auto* const data = static_cast<const decltype(zero)*>(layer.logits.data) + in;
      load_turn(data, layer.logits.column_step, turn, values);
    });
    if constexpr (kCrossEntropy) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        values[i] = special * exponential((values[i] - most) - log_sum);
        if (i == at) values[i] -= special;
      }
    } else {
      dispatch_sigmoid(formula, [&](auto kind, auto squared) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          const scalar_t slope = negative_term<kind.value, squared.value>(values[i], formula).slope;
          values[i] = i == at ? special : scale * slope;
        }
      });
    }
    dispatch_source<scalar_t>(arguments.logits_type, [&](auto zero) {
      auto* const out = static_cast<decltype(zero)*>(gradients.logits[chunk.layer]);
      store_turn(out + row * layer.columns, turn, values);
    });
  }
}

template <bool kCrossEntropy, typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    set_loss_backward_kernel(const LossArguments<scalar_t> arguments,
                             const LossGradients<scalar_t> gradients) {
  const Chunk chunk = chunk_of(arguments);
  if (threadIdx.x < kWarpSize) {
    const int slot = threadIdx.x;
    if (gradients.needs_boxes && slot < chunk.queries) {
      box_backward(arguments, gradients, chunk, slot);
    }
  } else {
    const int thread = threadIdx.x - kWarpSize, slot = thread / kRowLanes;
    if (slot < chunk.queries) {
      row_backward<kCrossEntropy>(arguments, gradients, chunk, slot, thread % kRowLanes);
    }
  }
}

template <bool kCrossEntropy, typename scalar_t>
void launch_sums(const LossArguments<scalar_t>& arguments, const LossResults<scalar_t>& results,
                 int blocks, void* stream) {
  DETR_FAST_LAUNCH((set_loss_kernel<kCrossEntropy, scalar_t>), blocks, kThreads, 0, stream,
                   arguments, results);
}

template <bool kCrossEntropy, typename scalar_t>
void launch_backward(const LossArguments<scalar_t>& arguments,
                     const LossGradients<scalar_t>& gradients, int blocks, void* stream) {
  const int threads = gradients.needs_logits ? kThreads : kWarpSize;
  DETR_FAST_LAUNCH((set_loss_backward_kernel<kCrossEntropy, scalar_t>), blocks, threads, 0, stream,
                   arguments, gradients);
}

}  // namespace

template <typename scalar_t>
void launch_set_loss(const LossArguments<scalar_t>& arguments, const LossResults<scalar_t>& results,
                     int layers, void* stream) {
  static_assert(sizeof arguments + sizeof results <= 4096, "a kernel has 4 KiB of parameters");
  const int blocks = layers * arguments.images * arguments.chunks;
  if (blocks > 0) {
    arguments.formula.kind == ClassLossKind::kCrossEntropy
        ? launch_sums<true>(arguments, results, blocks, stream)
        : launch_sums<false>(arguments, results, blocks, stream);
  }
  DETR_FAST_LAUNCH(set_loss_finish_kernel<scalar_t>, layers, kFinishThreads, 0, stream, arguments,
                   results);
}

template <typename scalar_t>
void launch_set_loss_backward(const LossArguments<scalar_t>& arguments,
                              const LossGradients<scalar_t>& gradients, int layers, void* stream) {
  static_assert(sizeof arguments + sizeof gradients <= 4096, "a kernel has 4 KiB of parameters");
  const int blocks = layers * arguments.images * arguments.chunks;
  if (blocks == 0) return;
  arguments.formula.kind == ClassLossKind::kCrossEntropy
      ? launch_backward<true>(arguments, gradients, blocks, stream)
      : launch_backward<false>(arguments, gradients, blocks, stream);
}

#define DETR_FAST_INSTANTIATE(T)                                                                   \
  template void launch_set_loss<T>(const LossArguments<T>&, const LossResults<T>&, int, void*);    \
  template void launch_set_loss_backward<T>(const LossArguments<T>&, const LossGradients<T>&, int, \
                                            void*);
DETR_FAST_INSTANTIATE(float)
DETR_FAST_INSTANTIATE(double)
#undef DETR_FAST_INSTANTIATE

}  // namespace detr_fast
