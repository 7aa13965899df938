# SPDX-License-Identifier: Apache-2.0
"""Times are those of one call, medians, and taken turn by turn."""

import pytest
import torch

from benchmarks import timing
from benchmarks.limits import measured_limits
from benchmarks.timing import LEAST_ROUNDS, ONCE, summary, time_all

CPU = torch.device("cpu")


class Clock:
    """In place of the module `time`: what a call takes is said, so that no machine disturbs it."""

    def __init__(self):
        self.processor = self.wall = 0.0

    def process_time(self):
        return self.processor

    def perf_counter(self):
        return self.wall

    def compute(self, seconds):
        self.processor += seconds
        self.wall += seconds

    def sleep(self, seconds):
        self.wall += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(timing, "time", clock := Clock())
    return clock


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_clock_runs():
    """The real one, of which no test here can say how fast it runs."""
    assert time_all({"a": lambda: sum(range(1000))}, CPU, 0)["a"].us > 0


def test_time_is_that_of_one_call(clock):
    times = time_all({"2": lambda: clock.compute(2e-3), "0.2": lambda: clock.compute(2e-4)}, CPU, 0)
    assert times["2"].us == pytest.approx(2000)
    assert times["0.2"].us == pytest.approx(200)


@pytest.mark.usefixtures("one_thread")
def test_waiting_for_other_processes_does_not_count(clock):
    times = time_all({"waits": lambda: clock.sleep(2e-3) or clock.compute(2e-3)}, CPU, 0)
    assert times["waits"].us == pytest.approx(2000)


def test_of_several_threads_waiting_counts(clock, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    times = time_all({"waits": lambda: clock.sleep(2e-3) or clock.compute(2e-3)}, CPU, 0)
    assert times["waits"].us == pytest.approx(4000)


def test_callables_take_turns(clock):
    calls = []

    def call(name):
        calls.append(name)
        clock.compute(6e-3)  # longer than a round must last: one call to warm up, one that counts

    time_all({"a": lambda: call("a"), "b": lambda: call("b")}, CPU, seconds=0)
    assert calls[-4 * LEAST_ROUNDS :] == ["a", "a", "b", "b"] * LEAST_ROUNDS


def test_summary_ignores_one_outlier():
    times = summary([1e-6, 2e-6, 3e-6, 4e-6, 1.0])
    assert times.us == pytest.approx(3)
    assert times.spread == pytest.approx(2 / 3)


def test_a_call_beyond_patience_is_made_once(clock):
    calls = []
    slow = 1.2 * ONCE
    runs = {"slow": lambda: calls.append(clock.compute(slow)), "fast": lambda: clock.compute(1e-3)}
    times = time_all(runs, CPU, seconds=0)
    assert len(calls) == 1
    assert times["slow"].us == pytest.approx(slow * 1e6)
    assert times["slow"].spread is None
    assert times["fast"].spread is not None


def test_limits_are_plausible_and_measured_once():
    limits = measured_limits(CPU, quick=True)
    assert 0.1 < limits.copy_gb_s < 10_000
    assert 0.0001 < limits.matmul_tflop_s < 1000
    assert measured_limits(CPU, quick=True) is limits


def test_rounds_begin_with_their_setting_and_a_call(clock):
    """Also of calls that are long: their memory is still as the other contender had it."""
    calls = []

    def call(name):
        calls.append(name)
        clock.compute(2.0)

    runs = {"a": lambda: call("a"), "b": lambda: call("b")}
    time_all(runs, CPU, seconds=0, before={"a": lambda: calls.append("set")})
    assert calls[-4 * LEAST_ROUNDS :] == ["set", "a", "a", "b"] * LEAST_ROUNDS
