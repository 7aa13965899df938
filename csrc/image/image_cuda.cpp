// SPDX-License-Identifier: Apache-2.0
// Host side of normalize_images on CUDA. It reads nothing back and waits for nothing.
#include "common/device_element.h"
#include "common/library.h"
#include "image/image.h"
#include "image/image_kernels.h"

namespace detr_fast {
namespace {

Tensor normalize_images_cuda(const Tensor& images, std::optional<Tensor> sizes,
                             std::vector<double> mean, std::vector<double> std,
                             torch::headeronly::ScalarType dtype) {
  const NormalizeInputs inputs = check_normalize_images(images, sizes, mean, std, dtype);
  const Tensor out = new_normalized(images, dtype);
  if (out.numel() == 0) return out;
  const DeviceScope device(images);
  const ImageInputs arguments = {device.read<uint8_t>(images),
                                 images.stride(0),
                                 images.stride(1),
                                 images.stride(2),
                                 images.stride(3),
                                 inputs.sizes ? device.read<int32_t>(*inputs.sizes) : nullptr,
                                 int(images.size(0)),
                                 int(images.size(2)),
                                 int(images.size(3)),
                                 inputs.statistics};
  launch_normalize_images(arguments, element_type(out), write_elements(device, out),
                          device.stream());
  device.check_launch();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DETR_FAST_NAMESPACE, DETR_FAST_CUDA_KEY, m) {
  m.impl("normalize_images", TORCH_BOX(&normalize_images_cuda));
}

}  // namespace detr_fast
