# SPDX-License-Identifier: Apache-2.0
"""Simulator and interpreter against what GPUs made of the same kernels."""

import json

import numpy as np
import pytest

from tests.cudasim import SCHEDULES, golden, load_test_kernels, ptx, scheduled
from tests.cudasim.conformance import CASES, SOURCE
from tests.cudasim.ptx.emit import emitted, toolkit

GOLDEN = [
    pytest.param(file, name, id=f"{file.stem}-{name}")
    for file in sorted(golden.FOLDER.glob("*.json"))
    for name in CASES
] or [pytest.param(None, None, marks=pytest.mark.skip("no golden file: no GPU has written one"))]


@pytest.fixture(params=[*SCHEDULES, "ptx"])
def launch(request):
    if request.param == "ptx":
        home, reason = toolkit()
        if home is None:
            pytest.skip(reason)
        kernels = emitted(SOURCE, home).kernels

        def interpret(name, *arguments, updates, **options):
            ptx.launch(kernels[name], *arguments, **options)

        yield interpret
        return
    request.getfixturevalue("needs_simulator")
    load_test_kernels(SOURCE)
    with scheduled(request.param) as simulator:
        yield simulator.launch


@pytest.fixture
def simulate(needs_simulator):
    load_test_kernels(SOURCE)
    with scheduled() as simulator:
        yield simulator.launch


@pytest.fixture
def file(simulate, tmp_path):
    """A golden file that the simulator has written in place of a GPU."""
    golden.write(tmp_path / "golden" / "none.json", "none", simulate)
    return tmp_path / "golden" / "none.json"


@pytest.mark.parametrize(("golden_file", "name"), GOLDEN)
def test_equals_the_gpu(launch, golden_file, name):
    outputs = golden.read(golden_file).get(name)
    if outputs is None:
        pytest.skip(f"{golden_file.name} is of another {name}: run gpu_check.sh conformance there")
    assert golden.differences(outputs, name, launch) == ""


def test_simulator_and_interpreter_agree(launch, file):
    outputs = golden.read(file)
    assert {*outputs} == {*CASES}
    found = {name: golden.differences(outputs[name], name, launch) for name in CASES}
    assert found == dict.fromkeys(CASES, "")


@pytest.mark.parametrize("name", [name for name in CASES if 0 not in CASES[name].tolerance])
def test_changed_bit_is_noticed(simulate, file, name):
    page = json.loads(file.read_text())
    number = len(CASES[name].outputs) - 1
    rows = page["cases"][name]["outputs"][number]["rows"]
    rows[0] = f"{int(rows[0][:2], 16) ^ 1:02x}{rows[0][2:]}"
    file.write_text(json.dumps(page))
    message = golden.differences(golden.read(file)[name], name, simulate)
    assert message.startswith(f"output {number}, row 0, column 0: ")
    assert message.count("column") == 1


@pytest.mark.parametrize(("factor", "told"), [(1 + 1e-6, False), (1 + 1e-4, True), (np.nan, True)])
@pytest.mark.parametrize(("name", "row"), [("float_functions", 10), ("atomics_of_floats", 0)])
def test_approximations_keep_to_their_tolerance(simulate, file, name, row, factor, told):
    (outputs,) = golden.read(file)[name]
    outputs[row, 0] *= np.float32(factor)
    message = golden.differences([outputs], name, simulate)
    assert message.startswith(f"output 0, row {row}, column 0: ") == told
    assert bool(message) == told


def test_bits_beside_approximations_are_exact(simulate, file):
    (outputs,) = golden.read(file)["float_functions"]
    outputs[3, 5] = np.nextafter(outputs[3, 5], np.float32(0))  # the reciprocal, rounded correctly
    message = golden.differences([outputs], "float_functions", simulate)
    assert message.startswith("output 0, row 3, column 5: ")


def test_many_differences_are_counted(simulate, file):
    (outputs,) = golden.read(file)["shuffles"]
    message = golden.differences([outputs + 1], "shuffles", simulate)
    assert message.count("column") == 3
    assert message.endswith("and 509 more")


def test_entry_of_another_kernel_says_nothing(file, tmp_path, monkeypatch):
    changed = tmp_path / "conformance.cu"
    changed.write_text(SOURCE.read_text().replace("value, 5));", "value, 6));"))
    monkeypatch.setattr(golden, "SOURCE", changed)
    assert {*CASES} - {*golden.read(file)} == {"shuffles"}
