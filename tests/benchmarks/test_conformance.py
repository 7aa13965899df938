# SPDX-License-Identifier: Apache-2.0
"""The part `conformance`: PTX that is carried or emitted, the golden file, its verdict."""

import json
from pathlib import Path

import pytest

from benchmarks import conformance, gpu_parts
from benchmarks.gpu_parts import Setting
from tests.cudasim import golden, simulate
from tests.cudasim.conformance import CASES


@pytest.fixture
def without_nvcc(monkeypatch):
    monkeypatch.setattr(conformance, "toolkit", lambda: (None, "no toolkit found"))


def test_carried_ptx_is_taken_where_nvcc_is_missing(without_nvcc, tmp_path):
    carried = tmp_path / "conformance.ptx"
    with pytest.raises(FileNotFoundError, match=r"no toolkit found.*conformance\.py --emit"):
        conformance.ptx(carried)
    carried.write_text(conformance.stamp() + ".version 8.0\n")
    assert conformance.ptx(carried).endswith(".version 8.0\n")
    carried.write_text(f"{conformance.STAMP}0123456789abcdef\n.version 8.0\n")
    with pytest.raises(ValueError, match="of other kernels than the checkout's"):
        conformance.ptx(carried)


def test_emitted_ptx_runs_on_the_oldest_architecture_and_holds_every_kernel(tmp_path):
    home, reason = conformance.toolkit()
    if home is None:
        pytest.skip(reason)
    text = conformance.ptx(tmp_path / "conformance.ptx")
    assert ".target sm_80\n" in text
    assert all(f".entry {name}(" in text for name in CASES)
    assert (tmp_path / "conformance.ptx").read_text() == text


@pytest.mark.usefixtures("needs_simulator")
def test_part_writes_a_golden_file_and_reports_what_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conformance, "device_name", lambda kind: ("ACME G-1 (80 GB)", ""))
    assert conformance.main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    file = tmp_path / "acme-g-1-80-gb.json"
    assert json.loads(file.read_text())["device"] == "ACME G-1 (80 GB)"
    assert {*golden.read(file)} == {*CASES}
    assert (
        f"{len(CASES)} cases in {file.name}; the simulator differs in 0" in capsys.readouterr().out
    )

    def wrong(name, grid, block, *arrays, **options):
        with simulate.scheduled() as simulator:
            simulator.launch(name, grid, block, *arrays, **options)
        arrays[-1][..., 0] += name == "votes"

    monkeypatch.setattr(conformance, "launcher", lambda device: wrong)
    assert conformance.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert output.startswith("votes: output 0, row 0, column 0: ")
    assert "the simulator differs in 1" in output


def test_machine_without_the_simulator_writes_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(conformance, "unsupported", lambda: "not for aarch64 Linux")
    assert conformance.simulated_differences(tmp_path / "any") == ({}, "not for aarch64 Linux")


@pytest.mark.parametrize(
    ("device", "quick", "kept"),
    [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)],
)
def test_only_a_whole_run_on_a_gpu_touches_the_checkout(tmp_path, monkeypatch, device, quick, kept):
    commands = []

    def run(self, name, command, seconds):
        commands.append(command)
        return gpu_parts.Ended(0, "told\n14 cases", 1.0)

    monkeypatch.setattr(Setting, "run", run)
    found = gpu_parts.conformance(Setting(device, quick=quick, work=Path(tmp_path)))
    assert found == {"status": "passed", "note": "14 cases"}
    assert ("--output" not in commands[0]) == kept
