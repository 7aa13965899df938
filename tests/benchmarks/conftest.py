# SPDX-License-Identifier: Apache-2.0
"""Makes ``benchmarks`` importable, behind any detr_fast that is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
