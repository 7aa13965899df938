# SPDX-License-Identifier: Apache-2.0
"""From DETR's list of target dicts to padded tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
_FLOAT32 = torch.float32  # whatever the default dtype is
_FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def pack_targets(
    targets: Sequence[Mapping[str, Tensor]], labels_key: str = "labels", boxes_key: str = "boxes"
) -> tuple[Tensor, Tensor, list[int]]:
    """Stack the targets of B images, padded with zeros to the largest number of boxes T.

    Args:
        targets (Sequence[Mapping]): for each image ``"labels"`` (Tensor[n], an integer dtype) and
            ``"boxes"`` (Tensor[n, 4], a floating dtype).  An image without boxes may hold empty
            tensors of any shape and dtype, as ``torch.tensor([])`` is.
        labels_key (str): what the labels are called.
        boxes_key (str): what the boxes are called.

    Returns:
        tuple[Tensor[B, T], Tensor[B, T, 4], list[int]]: int64 labels, float32 boxes (float64 if
        any are), number of boxes of each image.

    Raises:
        ValueError: if a key is missing or a shape or dtype does not fit; names image and key.
    """
    labels, boxes, counts = _lists(targets, labels_key, boxes_key)
    return *_padded(labels, boxes, counts, max(counts, default=0)), counts


def _lists(
    targets: Sequence[Mapping[str, Tensor]], labels_key: str, boxes_key: str
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Labels, boxes and their number, of each image, checked."""
    try:
        labels = [target[labels_key] for target in targets]
        boxes = [target[boxes_key] for target in targets]
    except KeyError:
        raise _missing_key(targets, labels_key, boxes_key) from None
    # few looks at each image, for this is a good part of what a matching on the CPU costs
    if (
        {label.dtype for label in labels} <= _INTEGERS
        and {box.dtype for box in boxes} <= _FLOATS
        and {label.dim() for label in labels} == {1}
    ):
        counts = [label.size(0) for label in labels]
        if [box.shape for box in boxes] == [(n, 4) for n in counts]:
            return labels, boxes, counts
    for image, (label, box) in enumerate(zip(labels, boxes, strict=True)):
        labels[image], boxes[image] = _checked(image, label, box, labels_key, boxes_key)
    return labels, boxes, [label.size(0) for label in labels]


def _missing_key(targets: Sequence[Mapping[str, Tensor]], *keys: str) -> ValueError:
    image, key = next((i, k) for i, target in enumerate(targets) for k in keys if k not in target)
    found = ", ".join(map(str, targets[image])) or "nothing"
    return ValueError(f"targets[{image}] has no {key!r}; it holds {found}")


def _checked(
    image: int, label: Tensor, box: Tensor, labels_key: str, boxes_key: str
) -> tuple[Tensor, Tensor]:
    if label.numel() == 0 and box.numel() == 0:
        return label.new_empty(0, dtype=torch.int64), box.new_empty(0, 4, dtype=torch.float32)
    if label.dim() != 1 or label.dtype not in _INTEGERS:
        raise ValueError(
            f"targets[{image}][{labels_key!r}]: expected integers of shape (n,), "
            f"got {label.dtype} of shape {tuple(label.shape)}"
        )
    if box.dim() != 2 or box.shape[1] != 4 or box.dtype not in _FLOATS:
        raise ValueError(
            f"targets[{image}][{boxes_key!r}]: expected floats of shape (n, 4), "
            f"got {box.dtype} of shape {tuple(box.shape)}"
        )
    if len(label) != len(box):
        raise ValueError(f"targets[{image}] has {len(label)} {labels_key} for {len(box)} boxes")
    return label, box


def _padded(
    labels: Sequence[Tensor], boxes: Sequence[Tensor], counts: Sequence[int], width: int
) -> tuple[Tensor, Tensor]:
    """(B, width) int64 and (B, width, 4), on the device of the boxes, by one concatenation each.

    Labels may be elsewhere, for as an index of scores on a GPU a CPU tensor does.
    """
    if not counts:
        return torch.empty(0, width, dtype=torch.int64), torch.empty(0, width, 4, dtype=_FLOAT32)
    # zeros of these dtypes also make int32 labels int64 and bfloat16 boxes float32
    free = [width - n for n in counts]
    no_label = torch.zeros(sum(free), dtype=torch.int64, device=labels[0].device)
    no_box = torch.zeros(sum(free), 4, dtype=_FLOAT32, device=boxes[0].device)
    packed_labels = torch.cat(_interleaved(labels, no_label.split_with_sizes(free)))
    packed_boxes = torch.cat(_interleaved(boxes, no_box.split_with_sizes(free)))
    if packed_labels.device != packed_boxes.device:
        packed_labels = packed_labels.to(packed_boxes.device)
    shape = len(counts), width
    return packed_labels.view(shape), packed_boxes.view(*shape, 4)


def _interleaved(parts: Sequence[Tensor], padding: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for pair in zip(parts, padding, strict=True) for tensor in pair]


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
    def from_list(
        cls,
        targets: Sequence[Mapping[str, Tensor]],
        labels_key: str = "labels",
        boxes_key: str = "boxes",
    ) -> Targets:
        """Pack the ``"labels"`` (n,) and ``"boxes"`` (n, 4) of each image; n may be 0.

        Raises:
            ValueError: if a key is missing or a shape or dtype does not fit; names image and key.
        """
        labels, boxes, counts = _lists(targets, labels_key, boxes_key)
        largest = max(counts, default=0)
        width = max(8, 1 << (largest - 1).bit_length())
        packed_labels, packed_boxes = _padded(labels, boxes, counts, width)
        count, device = torch.tensor(counts, dtype=torch.int32), packed_labels.device
        if device.type == "cuda":  # from pinned memory the copy waits for nothing
            count = count.pin_memory().to(device, non_blocking=True)
        return cls(packed_labels, packed_boxes, count, tuple(counts))

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
