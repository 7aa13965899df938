// SPDX-License-Identifier: Apache-2.0
// Argument checks. A message says which argument, what was expected and what was found.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

namespace detr_fast {

using torch::stable::Tensor;

constexpr int64_t kAnySize = -1;

// "(*, 4)" for {kAnySize, 4}
template <typename Sizes>
std::string shape_string(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "(";
  for (const int64_t size : sizes) {
    text << separator;
    size == kAnySize ? text << "*" : text << size;
    separator = ", ";
  }
  text << (sizes.size() == 0 ? "()" : sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

template <typename Sizes = std::initializer_list<int64_t>>
void check_shape(const Tensor& tensor, const char* name, const Sizes& expected) {
  const auto sizes = tensor.sizes();
  const bool fits =
      std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end(),
                 [](int64_t size, int64_t wanted) { return wanted == kAnySize || size == wanted; });
  STD_TORCH_CHECK(fits, name, ": expected shape ", shape_string(expected), ", got ",
                  shape_string(sizes));
}

inline void check_floating(const Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                  ": expected dtype Float or Double, got ", dtype, "; call ", name, ".float()");
}

inline void check_floating_or_half(const Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  name, ": expected dtype Float, Double, Half or BFloat16, got ", dtype);
}

inline std::string device_string(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "other:") + std::to_string(tensor.get_device_index());
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& model,
                         const char* model_name) {
  STD_TORCH_CHECK(tensor.device() == model.device(), name, ": expected the device of ", model_name,
                  ", ", device_string(model), ", got ", device_string(tensor));
}

// Checks that `tensor` has the element type and the device of `model`.
inline void check_alike(const Tensor& tensor, const char* name, const Tensor& model,
                        const char* model_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == model.scalar_type(), name, ": expected the dtype of ",
                  model_name, ", ", model.scalar_type(), ", got ", tensor.scalar_type());
  check_device(tensor, name, model, model_name);
}

// Checks that a layer's input has the element type and the device of the first one.
inline void check_layer(const std::vector<Tensor>& layers, size_t layer, const char* list,
                        const std::vector<int64_t>& sizes, const Tensor& logits) {
  const std::string name = std::string(list) + "[" + std::to_string(layer) + "]";
  check_floating_or_half(layers[layer], name.c_str());
  check_shape(layers[layer], name.c_str(), sizes);
  const std::string first = std::string(list) + "[0]";
  check_alike(layers[layer], name.c_str(), layers[0], first.c_str());
  check_device(layers[layer], name.c_str(), logits, "logits[0]");
}

}  // namespace detr_fast
