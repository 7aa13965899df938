# SPDX-License-Identifier: Apache-2.0
"""From bytes to what a model takes, in one pass over memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast import reference
from detr_fast.ops._library import Path, chooses_path, why_no_kernel, with_reference
from detr_fast.reference.image import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "normalize_images"]

_ops = torch.ops.detr_fast
_CHANNELS = 3
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(
    images: Tensor,
    sizes: Tensor | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> None:
    if images.dtype != torch.uint8:
        raise RuntimeError(
            f"images: expected dtype torch.uint8, got {images.dtype}; floats are normalised by "
            "detr_fast.data.transforms.normalize"
        )
    if images.dim() != 4 or images.shape[1] != _CHANNELS:
        raise RuntimeError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
    if sizes is not None:
        expected = (images.shape[0], 2)
        if sizes.dtype != torch.int32:
            raise RuntimeError(
                f"sizes: expected dtype torch.int32, got {sizes.dtype}; call sizes.int()"
            )
        if tuple(sizes.shape) != expected:
            raise RuntimeError(f"sizes: expected shape {expected}, got {tuple(sizes.shape)}")
        if sizes.device != images.device:
            raise RuntimeError(
                f"sizes: expected the device of images, {images.device}, got {sizes.device}"
            )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != _CHANNELS:
            raise ValueError(f"{name}: expected {_CHANNELS} numbers, got {len(values)}")
    if not all(value > 0 for value in std):
        raise ValueError(f"std: expected positive numbers, got {tuple(std)}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")


@with_reference(reference.normalize_images, check=_check)
def normalize_images(
    images: Tensor,
    sizes: Tensor | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standardise a padded batch of RGB images: ``(x / 255 - mean) / std``, 0 where it is padding.

    What torchvision's ``to_dtype(scale=True)`` and ``normalize`` compute, and the zeros that the
    original DETR pads with (Carion et al., ECCV 2020, ``nested_tensor_from_tensor_list``), in one
    kernel that reads a byte and writes an element once.  It has no gradient and does not wait for
    a GPU.  float32 values are those of `detr_fast.data.transforms.normalize` bit for bit.

    Args:
        images (ByteTensor[B, 3, H, W]): uint8, in any strides; fastest where they are contiguous or
            channels_last and H * W is a multiple of 8.
        sizes (IntTensor[B, 2] | None): int32 (height, width) in pixels of each image, which is at
            the upper left of its own; what lies outside of them counts as padding, whatever it
            holds.  Beyond H, W an image has no padding; below 0 it is nothing else.
        mean (Sequence[float]): of each channel, of values in [0, 1].
        std (Sequence[float]): of each channel, more than 0.
        dtype (torch.dtype): float32, bfloat16 or float16.

    Returns:
        Tensor[B, 3, H, W]: of ``dtype``, in memory channels_last: computed in float32 and rounded.

    Raises:
        RuntimeError: if a shape, dtype or device does not fit.
        ValueError: if mean or std are not three numbers, a std is not positive, or dtype is
            another one.

    Examples:
        >>> images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
        >>> sizes = torch.tensor([[4, 6], [3, 5]], dtype=torch.int32)
        >>> pixels = detr_fast.ops.normalize_images(images, sizes, dtype=torch.bfloat16)
    """
    if why_no_kernel("normalize_images", images.device):
        return reference.normalize_images(images, sizes, mean=mean, std=std, dtype=dtype)
    pixels: Tensor = _ops.normalize_images.default(images, sizes, mean, std, dtype)
    return pixels.permute(0, 3, 1, 2)


@chooses_path("normalize_images")
def _path(images: Tensor, *_: Any, **__: Any) -> Path:
    why_not = why_no_kernel("normalize_images", images.device)
    if why_not:
        return "reference", why_not
    return "fused", f"{images.device.type} has a kernel for this"


@torch.library.register_fake("detr_fast::normalize_images")
def _normalize_images_fake(
    images: Tensor,
    sizes: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    count, channels, height, width = images.shape
    return images.new_empty(count, height, width, channels, dtype=dtype)
