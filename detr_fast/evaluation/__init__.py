# SPDX-License-Identifier: Apache-2.0
"""Average precision of detections, and what stands behind it."""

from detr_fast.evaluation.analysis import Errors, find_errors, operating_points
from detr_fast.evaluation.coco import CocoEvaluator, CocoResult

__all__ = ["CocoEvaluator", "CocoResult", "Errors", "find_errors", "operating_points"]
