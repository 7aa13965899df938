# SPDX-License-Identifier: Apache-2.0
"""``python -m detr_fast train|eval``."""

import sys

from detr_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
