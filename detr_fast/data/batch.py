# SPDX-License-Identifier: Apache-2.0
"""Batches: images padded to one size, and targets packed into tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class ImageBatch(NamedTuple):
    """Images of one size, each at the upper left of its own.

    Attributes:
        tensors (Tensor[B, 3, H, W]): the images, normalised, or uint8 to be normalised on the
            device; zero where padded.
        sizes (IntTensor[B, 2] | None): int32 (height, width) of each image without its padding;
            None if no image has any.
    """

    tensors: Tensor
    sizes: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """True where a pixel is padding (BoolTensor[B, H, W]); made on each access."""
        images, _, height, width = self.tensors.shape
        device = self.tensors.device
        if self.sizes is None:
            return torch.zeros(images, height, width, dtype=torch.bool, device=device)
        rows = torch.arange(height, device=device)[:, None] >= self.sizes[:, 0, None, None]
        columns = torch.arange(width, device=device) >= self.sizes[:, 1, None, None]
        return rows | columns

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """Copy to a device."""
        return ImageBatch(
            *(None if t is None else t.to(device, non_blocking=non_blocking) for t in self)
        )


def pad_images(images: Sequence[Tensor], multiple: int | None = None) -> ImageBatch:
    """Pad images with zeros at the right and the bottom to one height and width.

    Args:
        images (Sequence[Tensor[C, h, w]]): at least one image; all of one C, dtype and device. The
            batch has the memory format of the first.
        multiple (int, optional): round height and width of the batch up to multiples of it, and
            state the sizes always; by default they are those of the largest image.

    Raises:
        ValueError: if there is no image, or one does not fit the first; names its index.
    """
    if not images:
        raise ValueError("pad_images needs at least one image")
    first = images[0]
    for index, image in enumerate(images):
        if image.dim() != 3:
            raise ValueError(f"images[{index}]: expected shape (C, h, w), got {tuple(image.shape)}")
        if (image.shape[0], image.dtype) != (first.shape[0], first.dtype):
            raise ValueError(
                f"images[{index}] has {image.shape[0]} channels of {image.dtype}, "
                f"images[0] has {first.shape[0]} of {first.dtype}"
            )
    sizes = [tuple(image.shape[1:]) for image in images]
    step = multiple or 1
    height, width = (-(-max(side) // step) * step for side in zip(*sizes, strict=True))
    tensors = _batch_like(first, (len(images), first.shape[0], height, width))
    for padded, image, (h, w) in zip(tensors, images, sizes, strict=True):
        padded[:, :h, :w] = image
        padded[:, h:] = 0
        padded[:, :h, w:] = 0
    if multiple is None and len(set(sizes)) == 1:
        return ImageBatch(tensors)
    # from memory that is not page-locked, so the copy is done with it when the call returns
    on_host = torch.tensor(sizes, dtype=torch.int32)
    return ImageBatch(tensors, on_host.to(first.device, non_blocking=True))


def _batch_like(image: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Memory for a batch, in the memory format of an image."""
    # images whose channels lie together are copied row by row into a batch of this kind
    layout = torch.contiguous_format if image.is_contiguous() else torch.channels_last
    if get_worker_info() is None:
        return torch.empty(shape, dtype=image.dtype, device=image.device, memory_format=layout)
    # as in torch's own default_collate: what a worker puts elsewhere is copied once more to be sent
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * image.element_size())
    strides = torch.empty(shape, device="meta", memory_format=layout).stride()
    return image.new_empty(0).set_(storage, 0, shape, strides)


def collate(
    samples: Sequence[tuple[Tensor, dict[str, Any]] | None], multiple: int | None = None
) -> tuple[ImageBatch, list[dict[str, Any]]] | None:
    """Batch the samples of a data set: padded images, and the targets in their list.

    Args:
        samples (Sequence[tuple[Tensor[3, h, w], dict] | None]): image and target of each sample;
            None for an image that could not be used.
        multiple (int, optional): see `pad_images`.

    Returns:
        tuple[ImageBatch, list[dict]] | None: None if no image could be used.
    """
    usable = [sample for sample in samples if sample is not None]
    if not usable:
        return None
    images, targets = zip(*usable, strict=True)
    return pad_images(images, multiple), list(targets)
