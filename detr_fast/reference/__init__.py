# SPDX-License-Identifier: Apache-2.0
"""Plain torch versions of the ops: same names, same signatures, the measure of all tests."""

from detr_fast.reference.boxes import generalized_box_iou

__all__ = ["generalized_box_iou"]
