# SPDX-License-Identifier: Apache-2.0
"""The launches that a GPU would get: a stand-in for libcuda runs them on the simulator."""

import ctypes

import numpy as np
import pytest

from tests.cudasim import golden, load_test_kernels, scheduled
from tests.cudasim.conformance import CASES, SOURCE
from tests.cudasim.driver import Driver


class FakeLibrary:
    """Records calls; a launch goes to the simulator, with arrays at the addresses it was given."""

    def __init__(self, fails=""):
        self.calls, self.names, self.fails = [], [], fails

    def cuModuleLoadData(self, module, text):
        module._obj.value = 11
        return self._end("load", text)

    def cuModuleGetFunction(self, function, module, name):
        self.names.append(name.decode())
        function._obj.value = len(self.names)
        return self._end("function", module.value, name)

    def cuLaunchKernel(self, function, *arguments):
        name = self.names[function.value - 1]
        sizes, (stream, parameters, extra) = arguments[:7], arguments[7:]
        arrays = []
        for array, place in zip(
            (*CASES[name].inputs, *CASES[name].outputs), parameters, strict=True
        ):
            address = ctypes.c_void_p.from_address(place).value
            memory = (ctypes.c_uint8 * array.nbytes).from_address(address)
            arrays.append(np.frombuffer(memory, array.dtype))
        with scheduled() as simulator:
            simulator.launch(
                name, sizes[:3], sizes[3:6], *arrays, shared_bytes=sizes[6], updates=True
            )
        return self._end("launch", name, sizes, stream.value, extra)

    def cuGetErrorString(self, status, text):
        text._obj.value = b"no kernel image"

    def _end(self, what, *arguments):
        self.calls.append((what, *arguments))
        return 209 if what == self.fails else 0


@pytest.fixture(autouse=True)
def _kernels(needs_simulator):
    load_test_kernels(SOURCE)


def test_launches_are_those_of_the_cases():
    library = FakeLibrary()
    driver = Driver(".version 8.0", library, device="cpu")
    CASES["shared_memory"].run("shared_memory", driver.launch)
    assert library.calls == [
        ("load", b".version 8.0"),
        ("function", 11, b"shared_memory"),
        ("launch", "shared_memory", (1, 1, 1, 8, 4, 2, 256), None, None),
    ]


def test_golden_file_of_the_driver_is_that_of_the_simulator(tmp_path):
    golden.write(tmp_path / "driver.json", "any", Driver("", FakeLibrary(), device="cpu").launch)
    with scheduled() as simulator:
        golden.write(tmp_path / "simulator.json", "any", simulator.launch)
    assert (tmp_path / "driver.json").read_text() == (tmp_path / "simulator.json").read_text()


@pytest.mark.parametrize(
    ("fails", "function"),
    [
        ("load", "cuModuleLoadData"),
        ("function", "cuModuleGetFunction"),
        ("launch", "cuLaunchKernel"),
    ],
)
def test_error_of_the_driver_is_told(fails, function):
    with pytest.raises(RuntimeError, match=f"{function}: error 209, no kernel image"):
        CASES["votes"].run("votes", Driver("", FakeLibrary(fails), device="cpu").launch)
