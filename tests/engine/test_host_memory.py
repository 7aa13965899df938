# SPDX-License-Identifier: Apache-2.0
"""Memory that steps free stays with the process, unless the user has said otherwise."""

import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from detr_fast.engine.host_memory import keep_freed_memory

FAULTS = """
import resource
import torch
from detr_fast.engine.host_memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
torch.set_num_threads(1)
def step():
    tensors = [torch.zeros(1 << 20) for _ in range(8)]
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def library(answer=1):
    calls = []
    return SimpleNamespace(mallopt=lambda *given: calls.append(given) or answer), calls


def test_both_thresholds_are_set():
    glibc, calls = library()
    assert keep_freed_memory(glibc)
    assert calls == [(-3, 32 << 20), (-1, 1 << 30)]


def test_a_refusal_is_told():
    assert not keep_freed_memory(library(answer=0)[0])


def test_another_library_is_left_alone():
    assert not keep_freed_memory(SimpleNamespace())


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    glibc, calls = library()
    assert not keep_freed_memory(glibc)
    assert not calls


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc")
def test_steps_get_their_memory_again():
    """Without it the 32 MiB of each step come anew: thousands of faults each.

    But where by chance something small was put behind them in the heap, which then cannot shrink:
    so the most of several processes counts.
    """
    faults = {}
    for keep in (False, True):
        code = [sys.executable, "-c", FAULTS.format(keep=keep)]
        runs = (subprocess.run(code, capture_output=True, check=True) for _ in range(3))
        faults[keep] = max(int(run.stdout) for run in runs)
    page = resource.getpagesize()
    assert faults[True] < 0.01 * 10 * (8 << 22) / page
    assert faults[False] > 10 * faults[True] + 100
