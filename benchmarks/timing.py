# SPDX-License-Identifier: Apache-2.0
"""Medians of interleaved rounds: processor or wall time on a CPU, events on a GPU."""

import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]
SHORTEST_ROUND = 5e-3  # seconds: long enough that what the others left in the caches is forgotten
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
LONG = 0.5  # seconds: a call to which warm caches mean nothing, so that each of them counts
ONCE = 20.0  # seconds that count: a call that is made once, of which no spread is known
RUNS_PER_GRAPH = 20  # shares out the launch of the graph


class Time(NamedTuple):
    """Median time of one call, and how far apart the quartiles of the rounds lie."""

    us: float
    spread: float | None  # (third - first quartile) / median; None of a single call


def time_all(
    runs: dict[str, Run],
    device: torch.device,
    seconds: float,
    before: Mapping[str, Run] = MappingProxyType({}),
) -> dict[str, Time]:
    """Time callables against each other on one device.

    Round by round, every callable in turn: what disturbs the machine disturbs all of them.

    Args:
        runs (dict[str, Callable]): what to time, warmed up here.
        device (torch.device): CPU or CUDA.
        seconds (float): wall time to spend on each of them, about.
        before (dict[str, Callable]): for some of the names, what sets their process up before each
            of their rounds, which then begins with a call that does not count, however long.

    Returns:
        dict[str, Time]: for each name, microseconds of a call.  On a CPU that is processor time
        where one thread computes: it equals wall time on an idle machine, and other processes on a
        busy one do not add to it; with more threads it is wall time.  On a GPU it is the time
        between events, as the caller sees it: the launches are included where they take longer
        than the kernels.
    """
    one_round = _cuda_round if device.type == "cuda" else _cpu_round
    counts, warm, rounds = {}, {}, MOST_ROUNDS
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        before.get(name, _nothing)()
        start = time.perf_counter()
        first = one_round(run, 1)  # waits for its end
        once = time.perf_counter() - start
        if first >= ONCE:
            samples[name].append(first)
            continue
        if once < LONG:
            _wall_time(one_round, run, 1)
            once = max(_wall_time(one_round, run, 3) / 3, 1e-9)
        warm[name] = once < LONG or name in before
        counts[name] = max(1, round(SHORTEST_ROUND / once))
        rounds = min(rounds, int(seconds / (counts[name] * once)))
    for _ in range(max(rounds, LEAST_ROUNDS)):
        for name in counts:
            before.get(name, _nothing)()
            if warm[name]:
                runs[name]()
            samples[name].append(one_round(runs[name], counts[name]) / counts[name])
    return {name: summary(values) for name, values in samples.items()}


def _nothing() -> None:
    pass


def summary(seconds: list[float]) -> Time:
    """Median in microseconds and relative spread of samples in seconds."""
    if len(seconds) == 1:
        return Time(us=seconds[0] * 1e6, spread=None)
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Time(us=median * 1e6, spread=(third - first) / median)


def time_on_gpu(run: Run, seconds: float) -> Time:
    """GPU time of one call without its launches: a CUDA graph of many calls, replayed.

    Raises:
        RuntimeError: if the call cannot be captured, because it waits for the GPU, say.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(RUNS_PER_GRAPH):
            run()
    replays = time_all({"graph": graph.replay}, torch.device("cuda"), seconds)["graph"]
    return replays._replace(us=replays.us / RUNS_PER_GRAPH)


def _wall_time(one_round: Callable[[Run, int], float], run: Run, count: int) -> float:
    start = time.perf_counter()
    one_round(run, count)  # waits for its end
    return time.perf_counter() - start


def _cpu_round(run: Run, count: int) -> float:
    # of several threads each counts while it waits, too
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(count):
        run()
    return clock() - start


def _cuda_round(run: Run, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
