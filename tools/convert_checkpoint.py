# SPDX-License-Identifier: Apache-2.0
"""Weights from one form into another: ``uv run tools/convert_checkpoint.py IN OUT``."""

import sys

from detr_fast.cli import convert

if __name__ == "__main__":
    sys.exit(convert())
