# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as ONNX or torch.export: ``uv run tools/export.py --checkpoint FILE``."""

import sys

from detr_fast.cli import export

if __name__ == "__main__":
    sys.exit(export())
