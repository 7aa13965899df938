# SPDX-License-Identifier: Apache-2.0
"""Runs as an HTML page: ``uv run tools/report.py --runs outputs/shapes``."""

import sys

from detr_fast.cli import report

if __name__ == "__main__":
    sys.exit(report())
