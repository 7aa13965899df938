# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: a case, its contenders, the record and the command line.

A module ``bench_<subject>.py`` has ``cases(device, quick) -> list[Case]``.  The first contender of
a case is its subject, the others are its peers.  `compare` asserts that all of them agree
with an independent expression before it times any of them.
"""

import argparse
import functools
import importlib
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.testing import assert_close

from benchmarks.limits import MIB, clocks_of_all_sms, measured_limits
from benchmarks.memory import Held, peak_bytes
from benchmarks.report import records_table
from benchmarks.timing import Run, Time, time_all, time_on_gpu
from detr_fast.engine.dispatched import dispatched

HERE = Path(__file__).resolve().parent
SECONDS = {"cpu": 0.5, "cuda": 0.2}  # spent on each contender
QUICK_SECONDS = 0.02

Check = Callable[[Any, Any], None]
Floor = str | tuple[str, str]  # a peer; or two contenders


@dataclass(frozen=True)
class Contender:
    """One way to compute the outputs of a case.

    Args:
        run (Callable): a call without arguments, which is timed.
        checked (Callable): returns what is compared; ``run`` unless that is random.
        check (Callable): in place of the case's, where it computes in another precision.
        slow_start (bool): compiles first; left out of quick runs and where nothing is timed.
        waits (bool): synchronises with the GPU, so that no CUDA graph can hold it.
        before (Callable): sets what holds for the whole process, before each round of it; such a
            round begins with a call that does not count.
        held (Callable): bytes of GPU memory that it keeps between calls; with it the record of a
            GPU tells the peak of a call, `benchmarks.memory.peak_bytes`.
    """

    run: Run
    checked: Run | None = None
    check: Check | None = None
    slow_start: bool = False
    waits: bool = False
    before: Run | None = None
    held: Held | None = None


@dataclass(frozen=True)
class Missing:
    """A peer that cannot take part, and why."""

    reason: str


@dataclass(frozen=True)
class Setup:
    """Contenders of a case, the subject first, and the outputs that all of them must reach."""

    expected: Run
    contenders: dict[str, Contender | Missing]


@dataclass(frozen=True)
class Case:
    """One line of a benchmark.

    Args:
        name (str): operation, shape and direction.
        build (Callable): makes the inputs; called when the case runs.
        check (Callable): raises AssertionError unless (actual, expected) agree.
        bytes (int): each input read once and each output written once.
        flops (int): floating-point operations, counted for matmul-bound cases.
        scores (int): products of a query and a key that attention has to compute.
        scores_per_clock (float): the most that the design of its kernels allows an SM.
        floors (dict): the least ratio of a peer to the subject, or of the first of two contenders
            to the second; less fails a run that is not quick.
        count_ops (bool): record how many calls of torch each contender makes.
        images (int): of a call; with it the record tells images a second.
        in_graph (bool): on a GPU, also time the kernels alone, many calls in one CUDA graph.
        all_threads (bool): a CPU computes with as many threads as it has cores; others with one.
        small (Callable): makes the inputs at a size at which a slow case is quick, for runs that
            compare and time nothing.
    """

    name: str
    build: Callable[[], Setup] = field(repr=False)
    check: Check = field(default=assert_close, repr=False)
    bytes: int = 0
    flops: int = 0
    scores: int = 0
    scores_per_clock: float = 0.0
    floors: dict[Floor, float] = field(default_factory=dict, repr=False)
    count_ops: bool = field(default=False, repr=False)
    images: int = 0
    in_graph: bool = field(default=True, repr=False)
    all_threads: bool = field(default=False, repr=False)
    small: Callable[[], Setup] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.name

    def setup(self, timed: bool) -> Setup:
        """The contenders with their inputs, small ones where nothing is timed."""
        return self.build() if timed or self.small is None else self.small()


def on_cpu(device: torch.device, floors: dict[Floor, float] | None) -> dict[Floor, float]:
    """The floors of a case, where it has any: none of them speaks of a GPU."""
    return floors or {} if device.type == "cpu" else {}


def optional(module: str) -> ModuleType | Missing:
    """The module of a peer, or the reason why there is none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return Missing(f"not installed: {error}")


def within(atol: float = 0.0, rtol: float = 0.0) -> Check:
    """Compare element by element, in the dtype of the expected outputs."""
    return functools.partial(assert_close, atol=atol, rtol=rtol, check_dtype=False)


def within_norm(limit: float) -> Check:
    """Compare by ``|actual - expected| / |expected|`` of each output, in float32."""

    def check(actual: Any, expected: Any) -> None:
        for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
            error = ((a.float() - e.float()).norm() / e.float().norm()).item()
            assert error <= limit, f"output {number}: relative error {error:.1e} > {limit:.1e}"

    return check


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for the very shapes of one case, without graph breaks.

    What earlier cases compiled is forgotten: the guards of their shapes would cost time, and beyond
    eight of them torch would run the function uncompiled.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def agreeing(case: Case, setup: Setup, slow: bool) -> dict[str, Contender | Missing]:
    """Run every contender once and assert its outputs; a peer that cannot run becomes Missing.

    Raises:
        AssertionError: with the name of the contender whose outputs differ.
    """
    expected, result = setup.expected(), dict(setup.contenders)
    subject = next(iter(result))
    for name, contender in setup.contenders.items():
        if isinstance(contender, Missing):
            continue
        if contender.slow_start and not slow:
            result[name] = Missing("left out: starts slowly")
            continue
        try:
            actual = contender.run()
            if contender.checked:
                actual = contender.checked()
        except Exception as error:
            if name == subject:
                raise
            result[name] = Missing(f"{type(error).__name__}: {_first_line(error)}")
            continue
        try:
            (contender.check or case.check)(actual, expected)
        except AssertionError as error:
            raise AssertionError(f"{case}, {name}: {error}") from None
    return result


@contextmanager
def threads_of(case: Case, device: torch.device) -> Iterator[None]:
    """Within this context a CPU computes with the threads of the case, which is one for most."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(before if case.all_threads else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    case: Case, setup: Setup, device: torch.device, *, timed: bool = True, quick: bool = False
) -> dict[str, Any]:
    """Assert that all contenders agree, then time them; returns the record of the case."""
    contenders = agreeing(case, setup, slow=timed and not quick)
    absent = {k: {"missing": c.reason} for k, c in contenders.items() if isinstance(c, Missing)}
    ready = {k: c for k, c in contenders.items() if isinstance(c, Contender)}
    if not timed:
        missing = "; ".join(f"{name} ({entry['missing']})" for name, entry in absent.items())
        return {"case": case.name, "equal": ", ".join(ready), "missing": missing}
    seconds = QUICK_SECONDS if quick else SECONDS[device.type]
    before = {name: c.before for name, c in ready.items() if c.before}
    times = time_all({name: c.run for name, c in ready.items()}, device, seconds, before)
    entries = {name: _rounded(time) | _images(case, time) for name, time in times.items()}
    if device.type == "cuda":
        for name, contender in ready.items():
            entries[name] |= _peak(contender)
            entries[name] |= _gpu_time(contender, seconds) if case.in_graph else {}
    if case.count_ops:
        for name, contender in ready.items():
            if not contender.slow_start:  # a compiled graph would be compiled anew
                entries[name]["ops"] = len(dispatched(contender.run))
    subject = next(iter(contenders))
    ours = entries.pop(subject)
    for name, entry in entries.items():
        entry["ratio"] = round(times[name].us / times[subject].us, 2)
        if "gpu_us" in entry and "gpu_us" in ours:
            entry["gpu_ratio"] = round(entry["gpu_us"] / ours["gpu_us"], 2)
    peers = {name: entries.get(name) or absent[name] for name in contenders if name != subject}
    for names, floor in ({} if quick else case.floors).items():
        slower, faster = (names, subject) if isinstance(names, str) else names
        if not {slower, faster} <= times.keys():
            continue  # a peer that is missing shows nothing
        ratio, of = round(times[slower].us / times[faster].us, 2), slower
        of += f" over {faster}" if faster != subject else ""
        assert ratio >= floor, f"{case}: {ratio}x of {of}, the floor is {floor}x"
    rates = _rates(case, ours.get("gpu_us", ours["us"]), device, quick)
    threads = {"threads": torch.get_num_threads()} if case.all_threads else {}
    return {"case": case.name, "subject": subject} | threads | ours | rates | {"peers": peers}


def run_benchmark(
    subject: str, device: torch.device, *, timed: bool = True, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """Records of ``bench_<subject>.py``; a case that fails leaves a record with its error."""
    if subject == "limits":
        yield {"case": "limits", **measured_limits(device, quick)._asdict()}
        return
    module = importlib.import_module(f"benchmarks.bench_{subject}")
    for case in module.cases(device, quick):
        try:
            with threads_of(case, device):
                yield compare(case, case.setup(timed), device, timed=timed, quick=quick)
        except Exception as error:
            traceback.print_exc()
            yield {"case": case.name, "error": f"{type(error).__name__}: {error}"[:2000]}


def subjects() -> list[str]:
    """Names of the benchmarks of this folder."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(argv: list[str] | None = None) -> int:
    """Run benchmarks without pytest; returns 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python benchmarks", description=main.__doc__)
    known = ["limits", *subjects()]
    parser.add_argument("subject", nargs="*", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--quick", action="store_true", help="small shapes, times that mean little")
    parser.add_argument("--equality", action="store_true", help="compare outputs, time nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records here")
    options = parser.parse_args(argv)
    for unknown in set(options.subject) - set(known):
        parser.error(f"no benchmark {unknown!r}; there are {', '.join(known)}")
    records = []
    for subject in options.subject or (subjects() if options.equality else known):
        for record in run_benchmark(
            subject, options.device, timed=not options.equality, quick=options.quick
        ):
            records.append(record)
            if options.json:  # as it stands: what ends this process leaves the cases before
                options.json.write_text(json.dumps(records, indent=1) + "\n")
    print(records_table(records))
    return int(any("error" in record for record in records))


def _rounded(time: Time) -> dict[str, Any]:
    spread = {} if time.spread is None else {"spread": round(time.spread, 3)}
    return {"us": _digits(time.us)} | spread


def _images(case: Case, time: Time) -> dict[str, Any]:
    return {"img_s": _digits(case.images / time.us * 1e6)} if case.images else {}


def _peak(contender: Contender) -> dict[str, Any]:
    if contender.held is None:
        return {}
    return {"peak_mib": round(peak_bytes(contender.run, contender.held) / MIB)}


def _gpu_time(contender: Contender, seconds: float) -> dict[str, Any]:
    if contender.waits:
        return {"no_gpu_us": "waits for the GPU"}
    try:
        return {"gpu_us": _digits(time_on_gpu(contender.run, seconds).us)}
    except Exception as error:  # the times that are there already shall stay
        return {"no_gpu_us": _first_line(error)}


def _rates(case: Case, us: float, device: torch.device, quick: bool) -> dict[str, Any]:
    """Bytes and operations a second, and their share of what this device was measured to do.

    Scores are measured against a bound from the design of the kernels.
    """
    rates: dict[str, Any] = {}
    if case.bytes:
        gb_s = case.bytes / us / 1e3
        limit = measured_limits(device, quick).copy_gb_s
        rates |= {"gb_s": _digits(gb_s), "copy_share": round(gb_s / limit, 4)}
    if case.flops:
        tflop_s = case.flops / us / 1e6
        limit = measured_limits(device, quick).matmul_tflop_s
        rates |= {"tflop_s": _digits(tflop_s), "matmul_share": round(tflop_s / limit, 4)}
    if case.scores:
        scores_s = case.scores / us * 1e6
        rates["scores_s"] = _digits(scores_s)
        if clocks := clocks_of_all_sms(device):
            rates["bound_share"] = round(scores_s / (case.scores_per_clock * clocks), 4)
    return rates


def _digits(value: float) -> float:
    """Four significant digits: the fifth is noise."""
    return float(f"{value:.4g}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
