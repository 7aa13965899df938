# SPDX-License-Identifier: Apache-2.0
"""Plain torch versions of the ops: same names, same signatures, the measure of all tests."""

from detr_fast.reference.attention import attention, attention_weights
from detr_fast.reference.boxes import (
    box_area,
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    generalized_box_iou_loss,
    matched_box_losses,
)
from detr_fast.reference.criterion import set_loss
from detr_fast.reference.image import normalize_images
from detr_fast.reference.matcher import hungarian_match, linear_sum_assignment

__all__ = [
    "attention",
    "attention_weights",
    "box_area",
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "hungarian_match",
    "linear_sum_assignment",
    "matched_box_losses",
    "normalize_images",
    "set_loss",
]
