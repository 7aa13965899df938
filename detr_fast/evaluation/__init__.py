# SPDX-License-Identifier: Apache-2.0
"""Average precision of detections."""

from detr_fast.evaluation.coco import CocoEvaluator, CocoResult

__all__ = ["CocoEvaluator", "CocoResult"]
