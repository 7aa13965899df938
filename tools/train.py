# SPDX-License-Identifier: Apache-2.0
"""Train DETR: ``uv run tools/train.py``, see ``--help``."""

import sys

from detr_fast.cli import train

if __name__ == "__main__":
    sys.exit(train())
