# SPDX-License-Identifier: Apache-2.0
"""Batches: images padded to one size with their mask, and targets packed into tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from detr_fast.matcher.packing import pack_targets


class ImageBatch(NamedTuple):
    """Images of one size and what of them is padding.

    Attributes:
        tensors (Tensor[B, 3, H, W]): the images, zero where padded.
        mask (Tensor[B, H, W]): bool, True where padded.
    """

    tensors: Tensor
    mask: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """Copy to a device."""
        return ImageBatch(*(t.to(device, non_blocking=non_blocking) for t in self))


def pad_images(images: Sequence[Tensor]) -> ImageBatch:
    """Pad images with zeros at the right and the bottom to the largest height and width.

    Args:
        images (Sequence[Tensor[C, h, w]]): at least one image; all of one C, dtype and device.

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
    height, width = (max(image.shape[d] for image in images) for d in (1, 2))
    tensors = first.new_zeros(len(images), first.shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=first.device)
    for index, image in enumerate(images):
        h, w = image.shape[1:]
        tensors[index, :, :h, :w] = image
        mask[index, :h, :w] = False
    return ImageBatch(tensors, mask)


def collate(
    samples: Sequence[tuple[Tensor, dict[str, Any]] | None],
) -> tuple[ImageBatch, list[dict[str, Any]]] | None:
    """Batch the samples of a data set: padded images, and the targets in their list.

    Args:
        samples (Sequence[tuple[Tensor[3, h, w], dict] | None]): image and target of each sample;
            None for an image that could not be used.

    Returns:
        tuple[ImageBatch, list[dict]] | None: None if no image could be used.
    """
    usable = [sample for sample in samples if sample is not None]
    if not usable:
        return None
    images, targets = zip(*usable, strict=True)
    return pad_images(images), list(targets)


@dataclass(frozen=True)
class Targets:
    """The targets of B images, padded with zeros to a common number of boxes T.

    T is 8, 16, 32, 64 and so on, so that shapes repeat from batch to batch.

    Attributes:
        labels (Tensor[B, T]): int64 classes.
        boxes (Tensor[B, T, 4]): ``(cx, cy, w, h)`` relative to the image, in [0, 1].
        count (Tensor[B]): int32, the number of boxes of each image.
        count_host (tuple[int, ...]): the same, known without a copy from the device.
    """

    labels: Tensor
    boxes: Tensor
    count: Tensor
    count_host: tuple[int, ...]

    @classmethod
    def from_list(cls, targets: Sequence[Mapping[str, Tensor]]) -> Targets:
        """Pack the ``"labels"`` (n,) and ``"boxes"`` (n, 4) of each image; n may be 0.

        Raises:
            ValueError: if a key is missing or a shape or dtype does not fit; names image and key.
        """
        labels, boxes, counts = pack_targets(targets)
        largest = labels.shape[1]
        missing = max(8, 1 << (largest - 1).bit_length()) - largest
        return cls(
            pad(labels, (0, missing)),
            pad(boxes, (0, 0, 0, missing)),
            torch.tensor(counts, dtype=torch.int32, device=labels.device),
            tuple(counts),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """Copy to a device; ``non_blocking`` counts where the memory is pinned."""
        labels, boxes, count = (
            t.to(device, non_blocking=non_blocking) for t in (self.labels, self.boxes, self.count)
        )
        return Targets(labels, boxes, count, self.count_host)

    def pin_memory(self) -> Targets:
        """Copy to page-locked memory; a DataLoader with ``pin_memory=True`` calls this."""
        labels, boxes, count = (t.pin_memory() for t in (self.labels, self.boxes, self.count))
        return Targets(labels, boxes, count, self.count_host)

    def to_list(self) -> list[dict[str, Tensor]]:
        """DETR's list of dicts with ``"labels"`` (n,) and ``"boxes"`` (n, 4): views, no copies."""
        return [
            {"labels": labels[:n], "boxes": boxes[:n]}
            for labels, boxes, n in zip(self.labels, self.boxes, self.count_host, strict=True)
        ]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.count_host)
