# SPDX-License-Identifier: Apache-2.0
"""The parts of gpu_check: each runs commands of its own and returns what it found.

Only the standard library is needed here: a machine that lacks pytest, torchvision or
compute-sanitizer gets a result that says so.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
TAIL = 3000  # characters of a failing command's output that the result keeps

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_ERROR = 9  # exit status of the sanitizer when it found something
QUICK_TESTS = "ops/test_boxes.py"
# benchmarks that run no kernel of detr_fast but those of others, beside a whole model, or none
NOT_OURS = {"evaluation", "inference", "loader", "train_step"}
# seconds that a benchmark may take; whole models compile for a minute each
SECONDS, SECONDS_OF = 120, {"limits": 40, "evaluation": 240, "inference": 400, "train_step": 500}

PROBE = """
import json, detr_fast
print(json.dumps([detr_fast.__file__, detr_fast.ops.backend()]))
"""

Found = dict[str, Any]


@dataclass
class Setting:
    """What all parts of one run share."""

    device: str  # "cuda" or "cpu"
    quick: bool
    work: Path  # an own folder for logs, records and an installed wheel
    deadline: float = float("inf")  # of time.monotonic()
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def site(self) -> Path:
        """Where a carried wheel is installed, so that the environment stays as it was."""
        return self.work / "site"

    def run(self, name: str, command: list[Any], seconds: float, **variables: str) -> "Ended":
        """Run a command in the work folder, where no detr_fast of the checkout is importable.

        At its time limit or at the deadline it is ended with all its children.
        """
        log = self.work / f"{name}.log"
        limit = max(min(seconds, self.deadline - time.monotonic()), 0.0)
        start = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.work,
                env=self.environment | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return Ended(status, log.read_text(errors="replace"), time.monotonic() - start)

    def benchmark(self, *arguments: Any) -> list[Any]:
        """The command line of the benchmarks on this device."""
        quick = ["--quick"] if self.quick else []
        return [self.python, BENCHMARKS, *arguments, "--device", self.device, *quick]


@dataclass(frozen=True)
class Ended:
    """How a command ended; no status where it ran out of time."""

    status: int | None
    output: str
    seconds: float

    def failure(self, reason: str = "") -> Found:
        what = reason or (f"exit status {self.status}" if self.status is not None else "")
        note = what or f"ended after {self.seconds:.0f} s: out of time"
        return {"status": "failed", "note": note, "output": tail(self.output)}


def tail(output: str) -> str:
    """The end of an output, its paths relative to the checkout: results are published."""
    return output[-TAIL:].replace(f"{ROOT}/", "")


def passed(**found: Any) -> Found:
    return {"status": "passed", **found}


def skipped(reason: str) -> Found:
    return {"status": "skipped", "note": reason}


def install(setting: Setting) -> Found:
    """Find detr_fast: $DETR_FAST_WHEEL, what is importable, dist/*.whl, or a build."""
    wheel = setting.environment.get("DETR_FAST_WHEEL")
    if wheel:
        return _install_wheel(setting, Path(wheel).resolve())
    found = _importable(setting, "already installed")
    if found["status"] == "passed":
        return found
    if wheels := sorted((ROOT / "dist").glob("detr_fast-*.whl"), key=os.path.getmtime):
        return _install_wheel(setting, wheels[-1])
    if find_spec("pip") is None:
        return found | {"note": "nothing to install from: no wheel in dist/, and no pip to build"}
    built = setting.run(
        "build",
        [*_pip(setting), "--no-build-isolation", ROOT],
        seconds=240,
        DETR_FAST_CUDA="1" if setting.device == "cuda" else "0",
    )
    return built.failure() if built.status else _use_site(setting, "built from the checkout")


def _install_wheel(setting: Setting, wheel: Path) -> Found:
    if not wheel.is_file():
        return {"status": "failed", "note": f"DETR_FAST_WHEEL: there is no file {wheel}"}
    shutil.rmtree(setting.site, ignore_errors=True)
    unpack = [setting.python, "-m", "zipfile", "-e", wheel, setting.site]
    command = [*_pip(setting), wheel] if find_spec("pip") else unpack
    ended = setting.run("install", command, seconds=60)
    return ended.failure() if ended.status != 0 else _use_site(setting, wheel.name)


def _pip(setting: Setting) -> list[Any]:
    command = [setting.python, "-m", "pip", "install", "--no-deps", "--no-index", "--upgrade"]
    return [*command, "--target", setting.site]


def _use_site(setting: Setting, source: str) -> Found:
    before = setting.environment.get("PYTHONPATH")
    setting.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(setting.site), before]))
    return _importable(setting, source)


def _importable(setting: Setting, source: str) -> Found:
    """Passed if detr_fast can be imported and runs compiled ops on the device."""
    ended = setting.run("import", [setting.python, "-c", PROBE], seconds=120)
    if ended.status != 0:
        return ended.failure("detr_fast cannot be imported")
    file, backend = json.loads(ended.output.splitlines()[-1])
    if not backend[setting.device].startswith("compiled"):
        return ended.failure(f"{file} on {setting.device}: {backend[setting.device]}")
    return passed(note=f"{source}, {backend[setting.device]}")


def benchmark(setting: Setting, subject: str) -> Found:
    """One benchmark, or the limits of the device; a case that fails fails the part."""
    file = setting.work / f"{subject}.json"
    file.unlink(missing_ok=True)
    command = setting.benchmark(subject, "--json", file)
    ended = setting.run(subject, command, seconds=SECONDS_OF.get(subject, SECONDS))
    records = json.loads(file.read_text()) if file.exists() else []
    failed = [record["case"] for record in records if "error" in record]
    if ended.status == 0 and records and not failed:
        return passed(records=records)
    reason = f"failed: {', '.join(failed)}" if failed and ended.status is not None else ""
    return ended.failure(reason) | {"records": records}


def tests(setting: Setting) -> Found:
    """The tests whose parameter or name says that they run on this device."""
    if find_spec("pytest") is None:
        return {"status": "failed", "note": "pytest is not installed"}
    report = setting.work / "tests.xml"
    report.unlink(missing_ok=True)
    chosen = ROOT / "tests" / QUICK_TESTS if setting.quick else ROOT / "tests"
    command = [setting.python, "-m", "pytest", chosen, "-c", ROOT / "pyproject.toml", "-q"]
    command += ["--rootdir", ROOT, "-k", selection(setting.device), "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--junitxml", report]
    ended = setting.run("tests", command, seconds=200)
    if not report.exists():
        return ended.failure()
    counts, failures, absent = read_junit(report)
    found = {"records": [counts | {"failures": failures, "not installed": absent}]}
    note = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    if failures or not counts["passed"] or ended.status is None:
        return ended.failure(note or "no test was selected") | found
    return passed(note=note, **found)


def selection(device: str) -> str:
    """pytest's ``-k``: tests with the device among their parameters, or CUDA in their name."""
    chosen = " or ".join(form.format(device) for form in ("[{}]", "[{}-", "-{}-", "-{}]"))
    return f"{chosen} or (cuda and not cudasim)" if device == "cuda" else chosen


def read_junit(report: Path) -> tuple[dict[str, int], list[str], list[str]]:
    """Counts, the tests that failed, and test files that need a package which is not installed."""
    counts = dict.fromkeys(("passed", "skipped", "failed"), 0)
    failures, absent = [], []
    for case in ElementTree.parse(report).iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        broken = case.find("failure") if case.find("failure") is not None else case.find("error")
        if broken is None:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
        elif module := re.search(r"ModuleNotFoundError: No module named '([^']+)'", _text(broken)):
            absent.append(f"{module[1]} ({name})")
        else:
            counts["failed"] += 1
            failures.append(name)
    return counts, failures, absent


def _text(element: ElementTree.Element) -> str:
    """What pytest says of a test file that it cannot collect; nothing for a test that ran."""
    collected = element.get("message") != "collection failure"
    return "" if collected else element.text or ""


def conformance(setting: Setting) -> Found:
    """Golden files: what this device makes of the simulator's conformance kernels."""
    command = [setting.python, BENCHMARKS / "conformance.py", "--device", setting.device]
    if setting.quick or setting.device == "cpu":
        command += ["--output", setting.work / "golden"]
    ended = setting.run("conformance", command, seconds=60)
    return ended.failure() if ended.status != 0 else passed(note=ended.output.splitlines()[-1])


def sanitizer(setting: Setting) -> Found:
    """compute-sanitizer over the smallest case of every op, forward and backward."""
    if setting.device != "cuda":
        return skipped("compute-sanitizer needs a GPU")
    program = shutil.which("compute-sanitizer", path=setting.environment.get("PATH"))
    if program is None:
        return skipped("compute-sanitizer is not installed")
    records = [_sanitize(setting, program, tool) for tool in SANITIZER_TOOLS]
    found = {"records": records}
    if failed := [record for record in records if record["status"] == "failed"]:
        note = "; ".join(f"{record['tool']}: {record['note']}" for record in failed)
        return {"status": "failed", "note": note, **found}
    if any(record["status"] == "skipped" for record in records):
        return skipped(records[0]["note"]) | found
    return passed(note="no findings", **found)


def _sanitize(setting: Setting, program: str, tool: str) -> Found:
    command: list[Any] = [program, "--tool", tool, "--target-processes", "all"]
    command += ["--show-backtrace", "no", "--error-exitcode", SANITIZER_ERROR]
    if tool != "initcheck":  # which has to see what torch's kernels write
        command += ["--kernel-name", "kns=detr_fast"]
    if tool == "memcheck":  # torch probes the driver with calls that may fail
        command += ["--report-api-errors", "no"]
    subjects = [s for s in benchmark_subjects() if s not in NOT_OURS]
    run = [setting.python, BENCHMARKS, *subjects, "--device", "cuda", "--quick", "--equality"]
    # each tensor its own allocation: what lies behind its end is out of bounds
    ended = setting.run(
        f"sanitizer-{tool}", [*command, *run], seconds=60, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    return {"tool": tool, "seconds": round(ended.seconds, 1)} | read_sanitizer(tool, ended)


def read_sanitizer(tool: str, ended: Ended) -> Found:
    """Passed only where the tool reached its summary and named no kernel of detr_fast."""
    lines = [line for line in ended.output.splitlines() if line.startswith("=========")]
    ours = [line.strip("= ") for line in lines if "detr_fast" in line]
    summary = next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), "")
    if ours:
        return ended.failure(f"{len(ours)} findings, first: {ours[0][:300]}")
    if refusal := next((line for line in lines if "Device not supported" in line), None):
        return skipped(refusal.strip("= "))
    if ended.status is None or not summary:
        return ended.failure("" if ended.status is None else "the tool gave no summary")
    if ended.status != 0 and not (tool == "initcheck" and ended.status == SANITIZER_ERROR):
        return ended.failure(f"exit status {ended.status}, {summary}")
    return passed(note=summary)


def benchmark_subjects() -> list[str]:
    """One part for each file bench_*.py."""
    return sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))
