# SPDX-License-Identifier: Apache-2.0
"""The simulator's tests of CUDA's functions, run again on the PTX that nvcc emits for them."""

import pytest

from tests.cudasim import ptx
from tests.cudasim.ptx.emit import emitted, toolkit
from tests.cudasim.test_conformance import *  # noqa: F403 (they take the fixture below)
from tests.cudasim.test_conformance import SOURCE


@pytest.fixture
def launch():
    home, reason = toolkit()
    if home is None:
        pytest.skip(reason)
    module = emitted(SOURCE, home)

    def launch(name, grid, block, *arguments, shared_bytes=0, updates=False):
        ptx.launch(module.kernels[name], grid, block, *arguments, shared_bytes=shared_bytes)

    return launch
