# SPDX-License-Identifier: Apache-2.0
"""From bytes to what a model takes, in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(
    images: Tensor,
    sizes: Tensor | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `detr_fast.ops.normalize_images`."""
    # tensors on the device: by a number, torch multiplies with its reciprocal on a GPU
    largest = torch.full((), 255.0, device=images.device)
    shift, scale = (images.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
    pixels = (images.float() / largest - shift) / scale
    if sizes is not None:
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device) < sizes[:, :1]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]
        real = rows[:, None, :, None] & columns[:, None, None, :]
        pixels = pixels.masked_fill(~real, 0)
    return pixels.to(dtype, memory_format=torch.channels_last)
