# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels of csrc/ on the CPU, thread by thread, and checks every access.

The sources are those of the package: the folder ``common`` beside this file stands before
``csrc/common`` on the include path, and its two headers are all that differs.
"""

from tests.cudasim.build import CSRC, library, unsupported
from tests.cudasim.simulate import SCHEDULES, load_test_kernels, scheduled, simulated

__all__ = [
    "CSRC",
    "SCHEDULES",
    "library",
    "load_test_kernels",
    "scheduled",
    "simulated",
    "unsupported",
]
