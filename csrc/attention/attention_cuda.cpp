// SPDX-License-Identifier: Apache-2.0
// Host side of attention on CUDA.
#include <limits>

#include "attention/attention.h"
#include "attention/attention_kernels.h"
#include "common/device_element.h"
#include "common/library.h"

namespace detr_fast {

namespace {

using torch::headeronly::ScalarType;

// The stride of a dimension of size 1 may be any number.
int64_t step(const Tensor& heads, int64_t dim) {
  return heads.size(dim) > 1 ? heads.stride(dim) : 0;
}

// Heads whose rows are neighbouring columns on 16-byte boundaries, copied only where they are not.
Tensor aligned(const Tensor& heads) {
  constexpr int64_t elements = 8;  // in 16 bytes
  constexpr int64_t most_step = std::numeric_limits<int>::max() / 2;
  bool fits = step(heads, 3) == 1 && step(heads, 2) <= most_step &&
              reinterpret_cast<uintptr_t>(heads.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) fits = fits && step(heads, i) % elements == 0;
  if (fits) return heads;
  return heads.is_contiguous() ? torch::stable::clone(heads) : torch::stable::contiguous(heads);
}

HeadsInput heads_input(const DeviceScope& device, const Tensor& heads) {
  return {read_elements(device, heads), step(heads, 0), step(heads, 1), int(step(heads, 2))};
}

// (B, L, H, D) as (B, H, L, D)
Tensor heads_second(const Tensor& rows_first) { return torch::stable::transpose(rows_first, 1, 2); }

const int32_t* read_or_null(const DeviceScope& device, const std::optional<Tensor>& tensor) {
  return tensor ? device.read<int32_t>(*tensor) : nullptr;
}

std::optional<Tensor> dense_or_none(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

// The arguments as the kernels can read them.
AttentionArguments laid_out(const AttentionArguments& a) {
  return {aligned(a.q),
          aligned(a.k),
          aligned(a.v),
          dense_or_none(a.query_rect),
          dense_or_none(a.key_rect),
          dense_or_none(a.key_count),
          a.padded_width,
          a.kept};
}

AttentionInputs kernel_inputs(const DeviceScope& device, const AttentionArguments& a) {
  return {element_type(a.q),
          int(a.q.size(0)),
          int(a.q.size(1)),
          int(a.q.size(2)),
          int(a.k.size(2)),
          heads_input(device, a.q),
          heads_input(device, a.k),
          heads_input(device, a.v),
          read_or_null(device, a.query_rect),
          read_or_null(device, a.key_rect),
          read_or_null(device, a.key_count),
          int(a.padded_width),
          int(a.kept)};
}

std::tuple<Tensor, Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  std::optional<Tensor> query_rect,
                                                  std::optional<Tensor> key_rect,
                                                  std::optional<Tensor> key_count,
                                                  int64_t padded_width, int64_t kept,
                                                  std::optional<Tensor> seed) {
  const AttentionArguments given = {q, k, v, query_rect, key_rect, key_count, padded_width, kept};
  check_attention(given);
  const bool dropout = kept < kKeepLevels;
  STD_TORCH_CHECK(dropout == seed.has_value(), "seed: expected one if and only if kept < ",
                  kKeepLevels, ", got kept = ", kept);
  if (seed) {
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long, "seed: expected dtype Long, got ",
                    seed->scalar_type());
    check_shape(*seed, "seed", {});
    check_device(*seed, "seed", q, "q");
  }
  const int64_t images = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  const auto empty = [&](const std::vector<int64_t>& sizes, ScalarType type) {
    return torch::stable::new_empty(q, sizes, type);
  };
  const Tensor out = empty({images, queries, heads, kHeadDim}, q.scalar_type());
  const Tensor lse = empty({images, heads, queries}, ScalarType::Float);
  const int64_t words = dropout ? keep_words(int(keys)) : 0;
  const Tensor keep = empty({images, heads, queries, words}, ScalarType::Int);
  const DeviceScope device(q);
  const AttentionArguments arguments = laid_out(given);
  AttentionOutputs outputs = {};
  if (dropout) {
    outputs.seed = device.read<int64_t>(*seed);
    outputs.keep = reinterpret_cast<uint32_t*>(device.write<int32_t>(keep));
  }
  outputs.out = write_elements(device, out);
  outputs.lse = device.write<float>(lse);
  launch_attention(kernel_inputs(device, arguments), outputs, device.stream());
  device.check_launch();
  return {out, lse, keep};
}

std::vector<Tensor> attention_backward_cuda(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const Tensor& keep, std::optional<Tensor> query_rect,
                                            std::optional<Tensor> key_rect,
                                            std::optional<Tensor> key_count, int64_t padded_width,
                                            int64_t kept) {
  const AttentionArguments given = {q, k, v, query_rect, key_rect, key_count, padded_width, kept};
  check_attention(given);
  const int64_t images = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  const std::vector<int64_t> rows_first = {images, queries, heads, kHeadDim};
  check_shape(grad, "grad", rows_first);
  check_alike(grad, "grad", q, "q");
  check_shape(out, "out", rows_first);
  check_alike(out, "out", q, "q");
  check_shape(lse, "lse", {images, heads, queries});
  const bool dropout = kept < kKeepLevels;
  const int64_t words = dropout ? keep_words(int(keys)) : 0;
  check_shape(keep, "keep", {images, heads, queries, words});
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && keep.scalar_type() == ScalarType::Int,
                  "lse and keep: expected dtypes Float and Int, got ", lse.scalar_type(), " and ",
                  keep.scalar_type());
  const auto empty = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_empty(q, sizes);
  };
  const bool block = queries == keys;
  std::vector<Tensor> gradients;
  if (block) {
    gradients.push_back(empty({images, queries, 3, heads, kHeadDim}));
  } else {
    for (const int64_t rows : {queries, keys, keys}) {
      gradients.push_back(empty({images, rows, heads, kHeadDim}));
    }
  }
  const DeviceScope device(q);
  const AttentionArguments arguments = laid_out(given);
  const Tensor upstream = aligned(heads_second(grad)), result = aligned(heads_second(out));
  const Tensor sums = dense(lse), bits = dense(keep);
  const Tensor statistics = torch::stable::new_empty(
      q, {images, heads, statistics_rows(int(queries)), 4}, ScalarType::Float);
  AttentionGradients g = {};
  g.grad = heads_input(device, upstream);
  g.out = heads_input(device, result);
  g.lse = device.read<float>(sums);
  if (dropout) g.keep = reinterpret_cast<const uint32_t*>(device.read<int32_t>(bits));
  g.statistics = device.scratch<float>(statistics);
  const int64_t row = heads * kHeadDim;
  if (block) {
    auto* const all = static_cast<uint16_t*>(write_elements(device, gradients[0]));
    g.grad_q = all;
    g.grad_k = all + row;
    g.grad_v = all + 2 * row;
  } else {
    g.grad_q = write_elements(device, gradients[0]);
    g.grad_k = write_elements(device, gradients[1]);
    g.grad_v = write_elements(device, gradients[2]);
  }
  g.query_step = g.key_step = block ? 3 * row : row;
  launch_attention_backward(kernel_inputs(device, arguments), g, device.stream());
  device.check_launch();
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, DETR_FAST_CUDA_KEY, m) {
  m.impl("attention", TORCH_BOX(&attention_cuda));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cuda));
}

}  // namespace detr_fast
