# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: its training curves, and detections drawn on images."""

from detr_fast.visualize.curves import plot_training_curves, training_curves_figure
from detr_fast.visualize.detections import draw_detections

__all__ = ["draw_detections", "plot_training_curves", "training_curves_figure"]
