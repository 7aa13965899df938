# SPDX-License-Identifier: Apache-2.0
"""From DETR's list of target dicts to padded tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
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
