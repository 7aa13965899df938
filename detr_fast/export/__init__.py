# SPDX-License-Identifier: Apache-2.0
"""A trained model as one file for onnxruntime, TensorRT or a program without Python."""

from detr_fast.export.files import FORMS, Exported, write
from detr_fast.export.program import Deployed, exported_program

__all__ = ["FORMS", "Deployed", "Exported", "exported_program", "write"]
