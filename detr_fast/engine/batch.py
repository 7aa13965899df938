# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to the device, made ready so that a step need not wait for it."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from detr_fast.criterion import SetCriterion
from detr_fast.data.batch import ImageBatch
from detr_fast.data.packed import PackedBatch
from detr_fast.engine.prefetch import Prefetch
from detr_fast.matcher.packing import Targets
from detr_fast.ops.image import normalize_images


class Batch(NamedTuple):
    """A batch on the device.

    Attributes:
        images (ImageBatch): uint8, or normalised floats.
        targets (Targets): packed.
        annotations (Sequence[dict]): the targets of each image, on the host.
    """

    images: ImageBatch
    targets: Targets
    annotations: Sequence[dict[str, Any]] | PackedBatch

    @property
    def image_ids(self) -> list[int]:
        """The ids of the images."""
        if isinstance(self.annotations, PackedBatch):
            return list(self.annotations.image_ids)
        return [int(target["image_id"]) for target in self.annotations]


class DeviceBatches:
    """The batches of a loader, on a device.

    On CUDA a batch is good until the next but one is asked for; see `Prefetch`.

    Args:
        loader (Iterable): gives a PackedBatch, an ImageBatch and the list of its targets, or None;
            has a length.
        criterion (SetCriterion): knows the classes.
        device (torch.device): where the batches go.
        prefetch (Prefetch, optional): takes them there; made by itself for CUDA.
    """

    def __init__(
        self,
        loader: DataLoader,
        criterion: SetCriterion,
        device: torch.device,
        prefetch: Prefetch | None = None,
    ) -> None:
        self.loader, self.criterion, self.device = loader, criterion, device
        if prefetch is None and device.type == "cuda":
            prefetch = Prefetch(device)
        self._prefetch = prefetch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch | None]:
        on_host: deque[PackedBatch | None] = deque()

        def checked() -> Iterator[PackedBatch | None]:
            for batch in self.loader:
                packed = batch
                if isinstance(batch, tuple):
                    packed = PackedBatch.of(*batch)
                if packed is not None:  # before they travel, when a look costs nothing
                    self.criterion.check_labels(packed.targets)
                on_host.append(packed)
                yield packed

        sent = self._prefetch(checked()) if self._prefetch else map(self._sent, checked())
        for batch in sent:
            annotations = on_host.popleft()
            yield None if batch is None else Batch(batch.images, batch.targets, annotations)

    def _sent(self, batch: PackedBatch | None) -> PackedBatch | None:
        return None if batch is None else batch.to(self.device, non_blocking=True)


def model_input(images: ImageBatch, dtype: torch.dtype) -> ImageBatch:
    """Images as the model takes them: bytes are normalised, floats are what they are.

    Args:
        images (ImageBatch): uint8, or normalised floats.
        dtype (torch.dtype): of the result, where it was bytes.
    """
    if images.tensors.dtype != torch.uint8:
        return images
    return images._replace(tensors=normalize_images(*images, dtype=dtype))
