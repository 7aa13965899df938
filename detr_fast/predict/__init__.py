# SPDX-License-Identifier: Apache-2.0
"""Finding objects in images with a trained model."""

from detr_fast.predict.detections import Detections
from detr_fast.predict.detector import Detector

__all__ = ["Detections", "Detector"]
