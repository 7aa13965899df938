# SPDX-License-Identifier: Apache-2.0
"""DETR at the speed of the hardware."""

from importlib.metadata import version

from detr_fast import ops
from detr_fast.ops import generalized_box_iou

__version__ = version("detr-fast")
__all__ = ["generalized_box_iou", "ops"]
