# SPDX-License-Identifier: Apache-2.0
"""Guards the guard: a kernel broken on purpose must be reported."""

import shutil

import pytest
import torch

import detr_fast
from tests.cudasim import CSRC, simulated

MUTANTS = {
    "no_bounds_check": ("if (pair >= pairs) return;", "", "out-of-bounds"),
    "last_not_written": ("if (pair >= pairs)", "if (pair + 1 >= pairs)", "never written"),
    "every_lane_stores": ("if (lane == 0) store_box", "store_box", "race"),
    "one_lane_too_few": ("T value) {", "T value) {\n  if (threadIdx.x == 1) return value;", "warp"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_checker_reports_broken_kernel(tmp_path, mutant):
    right, wrong, report = MUTANTS[mutant]
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    for source in (csrc / "boxes/boxes_kernels.cu", csrc / "common/warp.cuh"):
        source.write_text(source.read_text().replace(right, wrong))
    boxes1 = torch.rand(7, 4).cumsum(1).requires_grad_()
    boxes2 = torch.rand(5, 4).cumsum(1)
    with simulated(csrc, f"detr_fast_{mutant}"), pytest.raises(RuntimeError, match=report):
        detr_fast.generalized_box_iou(boxes1, boxes2).sum().backward()
