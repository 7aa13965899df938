# SPDX-License-Identifier: Apache-2.0
"""A trained model as one file: ``uv run tools/export.py CHECKPOINT model.onnx``."""

import sys

from detr_fast.cli import export

if __name__ == "__main__":
    sys.exit(export())
