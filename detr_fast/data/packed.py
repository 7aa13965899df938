# SPDX-License-Identifier: Apache-2.0
"""Batches in two pieces of memory, however many images and boxes: so they travel cheaply.

Each tensor that a loader's worker sends costs a file descriptor, a mapping and a message to fetch
them, some 0.2 ms on both sides, and on its way to a GPU one copy in page-locked memory and one on
the device. The original sends seven tensors per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_fast.data.batch import ImageBatch
from detr_fast.matcher.packing import Targets

_ALIGNMENT = 64  # bytes: what kernels read at once begins at a multiple of it
_Layout = tuple[tuple[torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch of B images as a loader gives it.

    ``batch[i]`` is the target of image i, as a data set gives it: a dict with image_id (int64[1]),
    orig_size (int64[2]), labels (int64[n]) and boxes (float32[n, 4]), all of them views.

    Attributes:
        pixels (Tensor[B, 3, H, W]): the images, padded.
        record (Tensor[bytes]): uint8: all other tensors, one behind the other.
        layout (tuple): dtype and shape of each of these.
        counts (tuple[int, ...]): number of boxes of each image.
        image_ids (tuple[int, ...]): the ids of the images.
    """

    pixels: Tensor
    record: Tensor
    layout: _Layout
    counts: tuple[int, ...]
    image_ids: tuple[int, ...]

    @classmethod
    def of(cls, images: ImageBatch, annotations: Sequence[dict[str, Any]]) -> PackedBatch:
        """Pack images and the targets in their list, on the CPU.

        Raises:
            ValueError: if a key is missing or a shape or dtype does not fit; names image and key.
        """
        targets = Targets.from_list(annotations)
        orig_sizes = torch.stack([target["orig_size"] for target in annotations])
        tensors = [targets.labels, targets.boxes, targets.count, orig_sizes]
        if images.sizes is not None:
            tensors.append(images.sizes)
        record, layout = _record(tensors)
        ids = tuple(int(target["image_id"]) for target in annotations)
        return cls(images.tensors, record, layout, targets.count_host, ids)

    @property
    def images(self) -> ImageBatch:
        """The images with their sizes."""
        sizes = _tensors(self.record, self.layout)[4:]
        return ImageBatch(self.pixels, *sizes)

    @property
    def targets(self) -> Targets:
        """The targets of the criterion."""
        labels, boxes, count, *_ = _tensors(self.record, self.layout)
        return Targets(labels, boxes, count, self.counts)

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The batch in other memory: ``change`` copies a tensor there."""
        return replace(self, pixels=change(self.pixels), record=change(self.record))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Copy to a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Copy to page-locked memory; a DataLoader with ``pin_memory=True`` calls this."""
        return self.map(Tensor.pin_memory)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.counts)

    def __getitem__(self, image: int) -> dict[str, Tensor]:
        labels, boxes, _, orig_sizes, *_ = _tensors(self.record, self.layout)
        count = self.counts[image]
        return {
            "image_id": torch.tensor([self.image_ids[image]]),
            "orig_size": orig_sizes[image],
            "labels": labels[image, :count],
            "boxes": boxes[image, :count],
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # the record goes with the message itself: a few kilobytes are not worth shared memory
        record = self.record.numpy()
        return _unpickled, (self.pixels, record, self.layout, self.counts, self.image_ids)


def _unpickled(pixels: Tensor, record: np.ndarray, *rest: Any) -> PackedBatch:
    return PackedBatch(pixels, torch.from_numpy(record), *rest)


class PackedCollate:
    """Packs what another function makes a batch of.

    Args:
        collate (Callable): from a list of samples to ImageBatch and list of targets, or None.
    """

    def __init__(
        self, collate: Callable[[Sequence[Any]], tuple[ImageBatch, list[dict[str, Any]]] | None]
    ) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> PackedBatch | None:
        """The batch of some samples; None if no image could be used."""
        batch = self.collate(samples)
        return None if batch is None else PackedBatch.of(*batch)


def _starts(layout: _Layout) -> list[int]:
    """Where in a record each tensor begins, and its length at the end."""
    starts = [0]
    for dtype, shape in layout:
        length = dtype.itemsize * int(np.prod(shape))
        starts.append(starts[-1] + -(-length // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _record(tensors: Sequence[Tensor]) -> tuple[Tensor, _Layout]:
    layout = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
    record = torch.zeros(_starts(layout)[-1], dtype=torch.uint8)
    for place, tensor in zip(_tensors(record, layout), tensors, strict=True):
        place.copy_(tensor)
    return record, layout


def _tensors(record: Tensor, layout: _Layout) -> list[Tensor]:
    """The tensors of a record: views."""
    views = []
    for (dtype, shape), start in zip(layout, _starts(layout), strict=False):
        length = dtype.itemsize * int(np.prod(shape))
        views.append(record[start : start + length].view(dtype).view(shape))
    return views
