# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share."""

import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tests.cudasim import simulated, unsupported

ROOT = Path(__file__).resolve().parents[1]

# opcheck then refuses ops that return two views of one tensor; torch does so by itself where CI=1
torch._functorch.config.error_on_custom_op_aliasing = True


@pytest.fixture(scope="session")
def needs_simulator():
    """Skips where the simulator does not run."""
    if reason := unsupported():
        pytest.skip(reason)


@pytest.fixture(params=["cpu", "cudasim-forward", "cudasim-reverse", "cudasim-random", "cuda"])
def device(request):
    """Where the op under test runs: one test body serves the CPU twin, the simulator and a GPU."""
    name, _, schedule = request.param.partition("-")
    if name == "cudasim":
        request.getfixturevalue("needs_simulator")
        with simulated(schedule=schedule):
            yield torch.device("cpu")
        return
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch {torch.__version__} sees none")
    yield torch.device(name)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images and annotations, which is not part of the repository."""
    folder = Path(os.environ.get("DETR_FAST_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set DETR_FAST_TEST_DATA)")
    return folder.resolve()


class MetaAutocast(TorchFunctionMode):
    """Products in half precision, as autocast would have them: it does not know the meta device."""

    products = (F.conv2d, F.linear, F.scaled_dot_product_attention)

    def __init__(self):
        super().__init__()
        self.dtypes = [None]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.products and self.dtypes[-1]:
            args = [x.to(self.dtypes[-1]) if isinstance(x, torch.Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))

    @contextmanager
    def computing_in(self, dtype):
        self.dtypes.append(dtype)
        with nullcontext() if dtype is None else self:
            yield
        self.dtypes.pop()


@pytest.fixture
def meta(monkeypatch):
    """The meta device, where looking at a number raises; autocast alone does not know it."""
    autocast, on_meta = torch.autocast, MetaAutocast()

    def known(device_type, dtype=None, enabled=True, **options):
        if device_type == "meta":
            return on_meta.computing_in(dtype if enabled else None)
        return autocast(device_type, dtype=dtype, enabled=enabled, **options)

    monkeypatch.setattr(torch, "autocast", known)
    return torch.device("meta")
