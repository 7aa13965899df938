# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=["cpu", "cudasim", "cuda"])
def device(request):
    """Where the op under test runs: one test body serves the CPU twin, the simulator and a GPU."""
    if request.param == "cudasim":
        from tests.cudasim import simulated  # compiles the kernels: only where a test asks

        with simulated():
            yield torch.device("cpu")
        return
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    yield torch.device(request.param)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images and annotations, which is not part of the repository."""
    folder = Path(os.environ.get("DETR_FAST_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set DETR_FAST_TEST_DATA)")
    return folder.resolve()
