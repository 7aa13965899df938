# SPDX-License-Identifier: Apache-2.0
"""The compiled ops.  Each has a reference twin of the same name in `detr_fast.reference`."""

from detr_fast.ops._library import backend, use_reference
from detr_fast.ops.attention import attention, attention_weights
from detr_fast.ops.boxes import (
    box_area,
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    check_boxes,
    generalized_box_iou,
    generalized_box_iou_loss,
    matched_box_losses,
)
from detr_fast.ops.criterion import ClassLoss, set_loss
from detr_fast.ops.image import normalize_images
from detr_fast.ops.matcher import (
    ClassCost,
    CostWeights,
    Match,
    MatchStatus,
    hungarian_match,
    linear_sum_assignment,
)

__all__ = [
    "ClassCost",
    "ClassLoss",
    "CostWeights",
    "Match",
    "MatchStatus",
    "attention",
    "attention_weights",
    "backend",
    "box_area",
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "check_boxes",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "hungarian_match",
    "linear_sum_assignment",
    "matched_box_losses",
    "normalize_images",
    "set_loss",
    "use_reference",
]
