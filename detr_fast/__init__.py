# SPDX-License-Identifier: Apache-2.0
"""DETR at the speed of the hardware."""

from importlib.metadata import version
from typing import Any

from detr_fast import ops
from detr_fast.criterion import SetCriterion
from detr_fast.data import Targets
from detr_fast.matcher import HungarianMatcher
from detr_fast.models import (
    PostProcess,
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_tiny,
)
from detr_fast.ops import generalized_box_iou

__version__ = version("detr-fast")
__all__ = [
    "Detector",
    "HungarianMatcher",
    "PostProcess",
    "SetCriterion",
    "Targets",
    "detr_resnet50",
    "detr_resnet50_dc5",
    "detr_resnet101",
    "detr_resnet101_dc5",
    "detr_tiny",
    "generalized_box_iou",
    "ops",
]


def __getattr__(name: str) -> Any:
    """`Detector`, which needs the packages of the extra ``train``, when it is asked for."""
    if name == "Detector":
        from detr_fast.predict import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
