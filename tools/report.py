# SPDX-License-Identifier: Apache-2.0
"""A page of pictures on one or more runs: ``uv run tools/report.py outputs/shapes``."""

import sys

from detr_fast.cli import report

if __name__ == "__main__":
    sys.exit(report())
