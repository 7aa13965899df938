# SPDX-License-Identifier: Apache-2.0
"""A part that fails, hangs or cannot run is recorded; the others run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_parts import Ended, Setting, read_junit, read_sanitizer

SCRIPT = Path(gpu_check.__file__).with_suffix(".sh")


@pytest.fixture
def setting(tmp_path):
    return Setting("cuda", quick=True, work=tmp_path)


def good(setting):
    return gpu_parts.passed(records=[{"tool": "any"}])


def bad(setting):
    raise ZeroDivisionError("in a part")


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Run gpu_check with parts of our own on a device of our own."""

    def run(*arguments, **parts):
        monkeypatch.setattr(gpu_check, "parts", lambda: parts)
        monkeypatch.setattr(gpu_parts, "install", good)
        monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
        monkeypatch.setattr(gpu_check, "device_name", lambda kind: ("ACME G-1 (80 GB)", ""))
        command = ["--device", "cpu", "--output", str(tmp_path), *arguments]
        status = gpu_check.main(command)
        return status, json.loads((tmp_path / "acme-g-1-80-gb.json").read_text())["parts"]

    return run


def test_part_that_raises_is_recorded_and_the_rest_runs(check, tmp_path):
    status, parts = check(first=bad, second=good)
    assert status == 1
    assert {name: part["status"] for name, part in parts.items()} == {
        "install": "passed",
        "first": "failed",
        "second": "passed",
    }
    assert parts["first"]["note"] == "ZeroDivisionError: in a part"
    assert parts["first"].keys() >= {"seconds", "commit", "date"}
    page = (tmp_path / "acme-g-1-80-gb.md").read_text()
    assert page.startswith("# ACME G-1 (80 GB)\n")
    assert "| first | failed |" in page


def test_parts_merge_with_those_of_earlier_runs(check):
    assert check("first", first=bad, second=good)[0] == 1
    status, parts = check("second", first=good, second=good)
    assert (status, parts["first"]["status"]) == (0, "failed")
    status, parts = check("first", first=good, second=good)
    assert (status, parts["first"]["status"]) == (0, "passed")
    assert list(parts) == ["install", "first", "second"]


def test_skipped_part_is_no_failure(check):
    assert check(first=lambda setting: gpu_parts.skipped("not installed"))[0] == 0


def test_part_beyond_the_budget_is_recorded_with_the_command_that_runs_it(check):
    status, parts = check("--budget", "-1", first=good)
    assert status == 1
    assert "`bash benchmarks/gpu_check.sh first`" in parts["first"]["note"]


def test_unreadable_results_of_before_are_replaced(check, tmp_path):
    (tmp_path / "acme-g-1-80-gb.json").write_text("{")
    assert check(first=good)[0] == 0


def test_unknown_part_is_named(check, capsys):
    with pytest.raises(SystemExit):
        check("third", first=good)
    assert "no part 'third'; there are first" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpu_one_line_and_status_2():
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    result = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stdout.startswith("gpu_check: no GPU: torch ")
    assert len(result.stdout.splitlines()) == 1


def test_names_of_devices():
    assert gpu_check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu_check.slug("AMD EPYC(tm) 7B13") == "amd-epyc-tm-7b13"


def is_running(stat):
    try:
        return stat.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_command_that_hangs_is_ended_with_its_children(setting):
    start = time.monotonic()
    ended = setting.run("hang", ["sh", "-c", "sleep 99 & echo $!; wait"], 1)
    assert time.monotonic() - start < 10
    assert ended.status is None
    child = Path(f"/proc/{ended.output.strip()}/stat")
    while is_running(child) and time.monotonic() - start < 30:  # a busy machine is slow to end it
        time.sleep(0.05)
    assert not is_running(child)
    assert "out of time" in ended.failure()["note"]


def test_deadline_of_the_run_ends_a_command(setting):
    setting.deadline = time.monotonic() + 0.5
    assert setting.run("late", ["sleep", "99"], 60).status is None


def test_crashing_benchmark_keeps_the_records_before(setting, monkeypatch):
    program = (
        'import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\'[{"case": "one"}]\');'
        "os.abort()"
    )
    command = [sys.executable, "-c", program, setting.work / "boxes.json"]
    monkeypatch.setattr(Setting, "benchmark", lambda self, *arguments: command)
    found = gpu_parts.benchmark(setting, "boxes")
    assert (found["status"], found["note"]) == ("failed", "exit status -6")
    assert found["records"] == [{"case": "one"}]


def test_failing_case_is_named(setting, monkeypatch):
    records = '[{"case": "one"}, {"case": "two", "error": "AssertionError: differs"}]'
    program = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); sys.exit(1)"
    command = [sys.executable, "-c", program, setting.work / "boxes.json", records]
    monkeypatch.setattr(Setting, "benchmark", lambda self, *arguments: command)
    assert gpu_parts.benchmark(setting, "boxes")["note"] == "failed: two"


def test_selection_takes_the_device_and_not_the_simulator(tmp_path):
    (tmp_path / "test_any.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('device', ['cpu', 'cudasim-forward', 'cuda'])\n"
        "@pytest.mark.parametrize('size', ['big', 'small'])\n"
        "def test_op(device, size): pass\n"
        "@pytest.mark.parametrize('device', ['cpu', 'cudasim-forward', 'cuda'])\n"
        "def test_one(device): pass\n"
        "def test_cuda_graph(): pass\n"
        "def test_cpu_only(): pass\n"
    )

    def chosen(device):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-c", os.devnull]
        command += ["--rootdir", str(tmp_path), "-k", gpu_parts.selection(device), str(tmp_path)]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        options = {"capture_output": True, "text": True, "check": True, "env": environment}
        output = subprocess.run(command, **options).stdout
        return {line.split("::")[1] for line in output.splitlines() if "::" in line}

    ops = {"test_op[big-{}]", "test_op[small-{}]", "test_one[{}]"}
    assert chosen("cuda") == {op.format("cuda") for op in ops} | {"test_cuda_graph"}
    assert chosen("cpu") == {op.format("cpu") for op in ops}


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops" name="test_a[cuda]"/>
<testcase classname="tests.ops" name="test_b[cuda]"><skipped message="no GPU"/></testcase>
<testcase classname="tests.ops" name="test_c[cuda]">
  <failure message="assert">ModuleNotFoundError: No module named 'x'</failure></testcase>
<testcase classname="" name="tests.test_d">
  <error message="collection failure">E   ModuleNotFoundError: No module named 'pandas'</error>
</testcase>
<testcase classname="" name="tests.test_e"><error message="collection failure">E boom</error>
</testcase></testsuite></testsuites>"""


def test_junit_tells_failures_from_packages_that_are_not_installed(tmp_path):
    (tmp_path / "tests.xml").write_text(JUNIT)
    counts, failures, absent = read_junit(tmp_path / "tests.xml")
    assert counts == {"passed": 1, "skipped": 1, "failed": 2}
    assert failures == ["tests.ops::test_c[cuda]", "tests.test_e"]
    assert absent == ["pandas (tests.test_d)"]


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
FINDING = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 4 bytes\n"
    "=========     at void detr_fast::kernel<float>(float *)+0x50 in boxes_kernels.cu:30\n"
    "========= ERROR SUMMARY: 1 error\n"
)
FOREIGN = FINDING.replace("detr_fast::", "at::native::")


@pytest.mark.parametrize(
    ("tool", "status", "output", "expected"),
    [
        ("memcheck", 0, CLEAN, "passed"),
        ("memcheck", 9, FINDING, "failed"),
        ("initcheck", 9, FINDING, "failed"),
        ("initcheck", 9, FOREIGN, "passed"),
        ("racecheck", 9, FOREIGN, "failed"),
        ("memcheck", 1, CLEAN, "failed"),  # the program under it failed
        ("memcheck", 0, "========= COMPUTE-SANITIZER\n", "failed"),  # saw nothing
        ("memcheck", None, CLEAN, "failed"),
        ("memcheck", 1, "========= Error: Device not supported\n", "skipped"),
    ],
)
def test_verdict_on_a_sanitizer_run(tool, status, output, expected):
    assert read_sanitizer(tool, Ended(status, output, 1.0))["status"] == expected


def test_sanitizer_runs_every_tool_on_the_benchmarks(setting, tmp_path):
    fake = tmp_path / "compute-sanitizer"
    (tmp_path / "answer").write_text(CLEAN)
    fake.write_text('#!/bin/sh\ncd "$(dirname "$0")" && echo "$@" >> calls && cat answer\n')
    fake.chmod(0o755)
    setting.environment["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    found = gpu_parts.sanitizer(setting)
    assert found["status"] == "passed"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == list(gpu_parts.SANITIZER_TOOLS)
    ours = " assignment attention boxes criterion image matcher --device cuda --quick --equality"
    assert all(ours in call for call in calls)
    assert ["kns=detr_fast" in call for call in calls] == [True, True, False, True]


def test_sanitizer_that_is_not_installed_is_named(setting):
    setting.environment["PATH"] = str(setting.work)
    assert gpu_parts.sanitizer(setting) == gpu_parts.skipped("compute-sanitizer is not installed")


def test_wheel_is_installed_beside_the_environment(setting, tmp_path, monkeypatch):
    package = tmp_path / "source" / "detr_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "class ops:\n    backend = lambda: {'cuda': 'compiled (for 9.0)', 'cpu': 'none (why)'}\n"
    )
    wheel = tmp_path / "detr_fast-0.1.0-py3-none-any.whl"
    subprocess.run([sys.executable, "-m", "zipfile", "-c", wheel, package], check=True)
    monkeypatch.setattr(gpu_parts, "find_spec", lambda name: None)  # no pip
    setting.environment["DETR_FAST_WHEEL"] = str(wheel)
    found = gpu_parts.install(setting)
    assert found == {"status": "passed", "note": f"{wheel.name}, compiled (for 9.0)"}
    setting.device = "cpu"
    assert "on cpu: none (why)" in gpu_parts.install(setting)["note"]
    setting.environment["DETR_FAST_WHEEL"] = "absent.whl"
    assert "there is no file" in gpu_parts.install(setting)["note"]
