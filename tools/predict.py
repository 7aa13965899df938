# SPDX-License-Identifier: Apache-2.0
"""Find objects in images: ``uv run tools/predict.py --checkpoint FILE --input FOLDER``."""

import sys

from detr_fast.cli import predict

if __name__ == "__main__":
    sys.exit(predict())
