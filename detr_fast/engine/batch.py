# SPDX-License-Identifier: Apache-2.0
"""The targets of a batch, made ready on the host for a step that does not wait for the device."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detr_fast.criterion import SetCriterion
from detr_fast.matcher.packing import Targets


def packed_targets(
    targets: Sequence[Mapping[str, Tensor]], criterion: SetCriterion, device: torch.device
) -> Targets:
    """Pack the targets of a batch, and check them where that costs nothing: before they travel.

    Args:
        targets (Sequence[Mapping]): for each image ``"labels"`` (Tensor[n]) and ``"boxes"``
            (Tensor[n, 4]), on the CPU.
        criterion (SetCriterion): knows the classes.
        device (torch.device): where they will go; for CUDA they are in page-locked memory.

    Raises:
        ValueError: if a label is out of range, a key is missing or a shape does not fit.
    """
    packed = Targets.from_list(targets)
    criterion.check_labels(packed)
    return packed.pin_memory() if device.type == "cuda" else packed


def image_ids(targets: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """The ids of the images of a batch."""
    return [int(target["image_id"]) for target in targets]
