# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes: ``uv run tools/profile_step.py``, see ``--help``."""

import sys

from detr_fast.cli import profile_step

if __name__ == "__main__":
    sys.exit(profile_step())
