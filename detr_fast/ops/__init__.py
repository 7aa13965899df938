# SPDX-License-Identifier: Apache-2.0
"""The compiled ops.  Each has a reference twin of the same name in :mod:`detr_fast.reference`."""

from detr_fast.ops._library import backend, use_reference
from detr_fast.ops.boxes import generalized_box_iou

__all__ = ["backend", "generalized_box_iou", "use_reference"]
