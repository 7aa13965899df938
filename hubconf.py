# SPDX-License-Identifier: Apache-2.0
"""Entry points of torch.hub, named as those of facebookresearch/detr."""

from detr_fast.models import (
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_tiny,
)

dependencies = ["torch", "numpy"]

__all__ = [
    "detr_resnet50",
    "detr_resnet50_dc5",
    "detr_resnet50_dc5_panoptic",
    "detr_resnet50_panoptic",
    "detr_resnet101",
    "detr_resnet101_dc5",
    "detr_resnet101_panoptic",
    "detr_tiny",
]


def _panoptic(
    pretrained: bool = False,
    num_classes: int = 250,
    threshold: float = 0.85,
    return_postprocessor: bool = False,
):
    """Raise NotImplementedError: panoptic heads are not in this version."""
    raise NotImplementedError(
        "panoptic heads are not in this version of detr_fast: use detr_resnet50 and its kin, or "
        "facebookresearch/detr"
    )


detr_resnet50_panoptic = _panoptic
detr_resnet50_dc5_panoptic = _panoptic
detr_resnet101_panoptic = _panoptic
