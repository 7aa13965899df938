# SPDX-License-Identifier: Apache-2.0
"""Times are those of one call, medians, and taken turn by turn."""

import time

import pytest
import torch

from benchmarks.limits import measured_limits
from benchmarks.timing import LEAST_ROUNDS, summary, time_all

CPU = torch.device("cpu")


def compute(seconds):
    """Keep the processor busy."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_time_is_that_of_one_call():
    times = time_all({"2 ms": lambda: compute(2e-3), "0.2 ms": lambda: compute(2e-4)}, CPU, 0)
    assert 2000 <= times["2 ms"].us < 2500
    assert 200 <= times["0.2 ms"].us < 300


def test_waiting_for_other_processes_does_not_count():
    times = time_all({"waits": lambda: time.sleep(2e-3) or compute(2e-3)}, CPU, 0)
    assert 2000 <= times["waits"].us < 3000


def test_callables_take_turns():
    calls = []

    def call(name):
        calls.append(name)
        time.sleep(6e-3)  # longer than a round must last: one call to warm up and one that counts

    time_all({"a": lambda: call("a"), "b": lambda: call("b")}, CPU, seconds=0)
    assert calls[-4 * LEAST_ROUNDS :] == ["a", "a", "b", "b"] * LEAST_ROUNDS


def test_summary_ignores_one_outlier():
    times = summary([1e-6, 2e-6, 3e-6, 4e-6, 1.0])
    assert times.us == pytest.approx(3)
    assert times.spread == pytest.approx(2 / 3)


def test_limits_are_plausible_and_measured_once():
    limits = measured_limits(CPU, quick=True)
    assert 0.1 < limits.copy_gb_s < 10_000
    assert 0.0001 < limits.matmul_tflop_s < 1000
    assert measured_limits(CPU, quick=True) is limits
