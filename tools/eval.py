# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint: ``uv run tools/eval.py --resume CHECKPOINT``, see ``--help``."""

import sys

from detr_fast.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
