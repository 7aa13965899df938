# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share."""

import pytest
import torch

from tests.cudasim import simulated


@pytest.fixture(params=["cpu", "cudasim", "cuda"])
def device(request):
    """Where the op under test runs: one test body serves the CPU twin, the simulator and a GPU."""
    if request.param == "cudasim":
        with simulated():
            yield torch.device("cpu")
        return
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    yield torch.device(request.param)
