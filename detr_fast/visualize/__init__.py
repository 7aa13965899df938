# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: curves of its training and of its evaluation, detections drawn on images."""

from detr_fast.visualize.curves import plot_training_curves, training_curves_figure
from detr_fast.visualize.detections import detections_figure, draw_detections
from detr_fast.visualize.evaluation import (
    confusion_figure,
    precision_recall_figure,
    size_figure,
)

__all__ = [
    "confusion_figure",
    "detections_figure",
    "draw_detections",
    "plot_training_curves",
    "precision_recall_figure",
    "size_figure",
    "training_curves_figure",
]
