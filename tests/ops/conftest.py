# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of ops."""

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def machine(request):
    """Devices without the simulator, which has nothing to do with what torch makes of an op."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch {torch.__version__} sees none")
    return torch.device(request.param)


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch {torch.__version__} sees none")
    return torch.device("cuda")
