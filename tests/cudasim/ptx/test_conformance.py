# SPDX-License-Identifier: Apache-2.0
"""The simulator's tests of CUDA's functions, run again on the PTX that nvcc emits for them."""

import pytest

from tests.cudasim import ptx
from tests.cudasim.conformance import SOURCE
from tests.cudasim.ptx.emit import emitted, product_kernels, toolkit
from tests.cudasim.test_conformance import *  # noqa: F403 (they take the fixture below)


@pytest.fixture
def home():
    home, reason = toolkit()
    if home is None:
        pytest.skip(reason)
    return home


@pytest.fixture
def launch(home):
    module = emitted(SOURCE, home)

    def launch(name, grid, block, *arguments, shared_bytes=0, updates=False):
        ptx.launch(module.kernels[name], grid, block, *arguments, shared_bytes=shared_bytes)

    return launch


def test_interpreter_knows_what_kernels_use_and_no_more(home):
    kernels = [*emitted(SOURCE, home).kernels.values(), *product_kernels(home).values()]
    used = {instruction.name[0] for kernel in kernels for instruction in kernel.code}
    used.discard("call")  # pow of doubles is a function, which no case of the interpreter reaches
    assert used == {*ptx.EXECUTE, *ptx.MEET, "bra", "ret", "bar"}
