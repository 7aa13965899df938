# SPDX-License-Identifier: Apache-2.0
"""``python benchmarks boxes --device cuda``: the benchmarks without pytest."""

import sys
from pathlib import Path

# at the end: a detr_fast that is installed stands before the checkout's, which may not be built
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import main

if __name__ == "__main__":
    sys.exit(main())
