# SPDX-License-Identifier: Apache-2.0
"""DETR models."""

from detr_fast.models.detr import (
    DETR,
    build_detr,
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_tiny,
)
from detr_fast.models.model_config import ModelConfig
from detr_fast.models.postprocess import PostProcess

__all__ = [
    "DETR",
    "ModelConfig",
    "PostProcess",
    "build_detr",
    "detr_resnet50",
    "detr_resnet50_dc5",
    "detr_resnet101",
    "detr_resnet101_dc5",
    "detr_tiny",
]
