# SPDX-License-Identifier: Apache-2.0
"""Collect the evidence of one machine: tests, sanitizer, limits and every benchmark.

Parts run one by one or all in turn; each leaves its result in ``results/<device>.json``, beside
the results of other parts from earlier runs, and the same as tables in ``<device>.md``.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))  # at the end: an installed detr_fast stands before the checkout's

from benchmarks import gpu_parts  # noqa: E402
from benchmarks.gpu_parts import Found, Setting, benchmark_subjects  # noqa: E402
from benchmarks.report import results_page  # noqa: E402

WORK = ROOT / "build" / "gpu_check"
BUDGET = 530  # seconds: under 9 minutes
NO_GPU = 2
LONG = ("evaluation", "inference", "train_step")  # behind the others, better in a run of their own
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def parts() -> dict[str, Callable[[Setting], Found]]:
    """All parts by name, in the order of a whole run: short ones first."""
    benchmarks = {
        subject: functools.partial(gpu_parts.benchmark, subject=subject)
        for subject in ("limits", *benchmark_subjects())
    }
    long = {name: benchmarks.pop(name) for name in LONG if name in benchmarks}
    checks = {
        "conformance": gpu_parts.conformance,
        "tests": gpu_parts.tests,
        "sanitizer": gpu_parts.sanitizer,
    }
    return benchmarks | checks | long


def run_parts(
    chosen: dict[str, Callable[[Setting], Found]], setting: Setting, facts: Callable[[], Found]
) -> dict[str, Found]:
    """Run parts, whatever becomes of the ones before; a part that raises is a part that failed."""
    results = {}
    for name, part in chosen.items():
        start = time.monotonic()
        if start > setting.deadline:
            again = f"run `bash benchmarks/gpu_check.sh {name}`"
            found: Found = {"status": "failed", "note": f"not run, the time is used up: {again}"}
        else:
            print(f"{name} ...", flush=True)
            try:
                found = part(setting)
            except Exception as error:
                found = {"status": "failed", "note": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - start, 1)
        results[name] = {"status": found["status"], "seconds": seconds} | facts() | found
        print(f"{name}: {found['status']} in {seconds} s {found.get('note', '')}", flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    """Run parts and write their results; 0 all fine, 1 one failed, 2 no GPU."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("part", nargs="*", help=f"of {', '.join(parts())}; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny cases, figures mean nothing")
    parser.add_argument("--output", type=Path, help="default: results/; build/ with --quick")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    options = parser.parse_args(argv)
    for unknown in set(options.part) - set(parts()):
        parser.error(f"no part {unknown!r}; there are {', '.join(parts())}")
    name, reason = device_name(options.device)
    if name is None:
        print(f"gpu_check: no GPU: {reason} (`--device cpu --quick` tries the parts without)")
        return NO_GPU
    WORK.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.budget
    setting = Setting(options.device, options.quick, WORK, deadline)
    chosen = {part: run for part, run in parts().items() if part in (options.part or parts())}
    facts = functools.partial(part_facts, options.device)
    results = run_parts({"install": gpu_parts.install} | chosen, setting, facts)
    folder = options.output or (WORK / "results" if options.quick else HERE / "results")
    header = {"name": name, "device": slug(name), "quick": options.quick} | machine_facts()
    file = write_results(folder, header, results)
    print(f"results: {file} and {file.with_suffix('.md').name}")
    return int(any(found["status"] == "failed" for found in results.values()))


def device_name(kind: str) -> tuple[str | None, str]:
    """The name of the device, or None with the reason why there is none."""
    try:
        import torch
    except ImportError as error:
        return None, f"{sys.executable} has no torch: {error}"
    if kind == "cuda":
        if not torch.cuda.is_available():
            return None, f"torch {torch.__version__} sees none"
        return torch.cuda.get_device_name(), ""
    with contextlib.suppress(OSError):
        if model := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M):
            return model[1], ""
    return platform.processor() or platform.machine(), ""


def slug(name: str) -> str:
    """A file name: lower case, every other character as ``-``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_facts() -> Found:
    """What the figures depend on, besides the device."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": nvidia_smi("driver_version")[0] if torch.cuda.is_available() else None,
        "threads": "1 for times on a CPU",
    }


def part_facts(kind: str) -> Found:
    """Commit, date and clocks when a part ended."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts: Found = {"commit": commit(), "date": now}
    if kind == "cuda":
        facts["clocks"] = dict(zip(CLOCKS, nvidia_smi(*CLOCKS), strict=False))
    return facts


def commit() -> str:
    """The commit of the checkout, `+` if it was changed; $DETR_FAST_COMMIT where git has none."""
    git = ["git", "-C", str(ROOT)]
    head, changes = (
        _output([*git, *arguments])
        for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    if not head:
        return os.environ.get("DETR_FAST_COMMIT", "unknown")
    return head + ("+" if changes else "")


def nvidia_smi(*fields: str) -> list[str]:
    """Values with their units, of the GPU that torch uses."""
    import torch

    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}"]
    answer = _output([*query, "--format=csv,noheader"])
    return answer.split(", ") if answer else ["unknown"] * len(fields)


def _output(command: list[str]) -> str:
    """What a command prints; nothing where it fails or is not installed."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def write_results(folder: Path, header: Found, results: dict[str, Found]) -> Path:
    """Put results beside those of other parts, which keep their own commit and date."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{header['device']}.json"
    before: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = json.loads(file.read_text()).get("parts", {})
    page = header | {"parts": before | results}
    unfinished = file.with_suffix(".json.new")
    unfinished.write_text(json.dumps(page, indent=1) + "\n")
    unfinished.replace(file)
    file.with_suffix(".md").write_text(results_page(page))
    return file


if __name__ == "__main__":
    sys.exit(main())
