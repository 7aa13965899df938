# SPDX-License-Identifier: Apache-2.0
"""From DETR's list of target dicts to padded tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


def pack_targets(targets: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, list[int]]:
    """Stack the targets of B images, padded with zeros to the largest number of boxes T.

    Args:
        targets (Sequence[Mapping]): for each image ``"labels"`` (Tensor[n], an integer dtype) and
            ``"boxes"`` (Tensor[n, 4], a floating dtype).  An image without boxes may hold empty
            tensors of any shape and dtype, as ``torch.tensor([])`` is.

    Returns:
        tuple[Tensor[B, T], Tensor[B, T, 4], list[int]]: int64 labels, float32 boxes (float64 if
        any are), number of boxes of each image.

    Raises:
        ValueError: if a key is missing or a shape or dtype does not fit; names image and key.
    """
    labels, boxes = [], []
    for image, target in enumerate(targets):
        for key in ("labels", "boxes"):
            if key not in target:
                found = ", ".join(map(str, target)) or "nothing"
                raise ValueError(f"targets[{image}] has no {key!r}; it holds {found}")
        label, box = target["labels"], target["boxes"]
        if label.numel() == 0 and box.numel() == 0:
            label, box = label.new_empty(0, dtype=torch.int64), box.new_empty(0, 4).float()
        if label.dim() != 1 or label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(
                f"targets[{image}]['labels']: expected integers of shape (n,), "
                f"got {label.dtype} of shape {tuple(label.shape)}"
            )
        if box.dim() != 2 or box.shape[1] != 4 or not box.is_floating_point():
            raise ValueError(
                f"targets[{image}]['boxes']: expected floats of shape (n, 4), "
                f"got {box.dtype} of shape {tuple(box.shape)}"
            )
        if len(label) != len(box):
            raise ValueError(f"targets[{image}] has {len(label)} labels for {len(box)} boxes")
        labels.append(label.to(torch.int64))
        boxes.append(box)
    if not labels:
        return torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0, 4), []
    dtype = torch.float64 if any(b.dtype == torch.float64 for b in boxes) else torch.float32
    return (
        pad_sequence(labels, batch_first=True),
        pad_sequence([box.to(dtype) for box in boxes], batch_first=True),
        [len(label) for label in labels],
    )


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
