# SPDX-License-Identifier: Apache-2.0
"""What is mutated: folders of csrc, the files in which mutants are made, and what has to notice."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.cudasim.build import CSRC
from tests.mutations import attention_checks, boxes_checks, image_checks
from tests.mutations.checks import Check
from tests.mutations.mutants import Mutant, mutants_of


class Subject(NamedTuple):
    """A folder of csrc."""

    folder: str
    files: tuple[str, ...]  # of csrc
    checks: Callable[[], list[Check]]

    def sources(self) -> list[Path]:
        """What a library of its simulated ops is made of."""
        folder = CSRC / self.folder
        return [CSRC / "ops.cpp", *sorted([*folder.glob("*_cuda.cpp"), *folder.glob("*.cu")])]

    def mutants(self) -> list[Mutant]:
        return [mutant for name in self.files for mutant in mutants_of(CSRC / name)]


BOXES = Subject(
    "boxes",
    ("boxes/boxes_kernels.cu", "boxes/box_math.h", "boxes/boxes_cuda.cpp", "common/warp.cuh"),
    boxes_checks.all_checks,
)
ATTENTION = Subject(
    "attention",
    tuple(
        f"attention/{name}"
        for name in (
            "attention_forward.cu",
            "attention_backward.cu",
            "gradients.cuh",
            "key_gradients.cuh",
            "query_gradients.cuh",
            "tiles.cuh",
            "rows.h",
            "dropout.h",
            "attention_kernels.h",
            "attention.h",
            "attention_cuda.cpp",
        )
    ),
    attention_checks.all_checks,
)
IMAGE = Subject(
    "image",
    ("image/image_kernels.cu", "image/image_math.h", "image/image.h", "image/image_cuda.cpp"),
    image_checks.all_checks,
)
SUBJECTS = {subject.folder: subject for subject in (BOXES, ATTENTION, IMAGE)}
