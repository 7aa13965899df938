# SPDX-License-Identifier: Apache-2.0
"""Plain torch versions of the ops: same names, same signatures, the measure of all tests."""

from detr_fast.reference.boxes import (
    box_cxcywh_to_xyxy,
    generalized_box_iou,
    matched_box_losses,
)
from detr_fast.reference.matcher import linear_sum_assignment

__all__ = [
    "box_cxcywh_to_xyxy",
    "generalized_box_iou",
    "linear_sum_assignment",
    "matched_box_losses",
]
