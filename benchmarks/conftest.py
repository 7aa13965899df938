# SPDX-License-Identifier: Apache-2.0
"""``pytest benchmarks/``: one test a case, with pytest-benchmark where that is installed."""

import json

import pytest
import torch

from benchmarks.harness import Contender, compare, threads_of
from benchmarks.report import records_table

RECORDS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("detr_fast benchmarks")
    group.addoption("--bench-device", default="cpu", type=torch.device, help="default: cpu")
    group.addoption("--bench-quick", action="store_true", help="small shapes")
    group.addoption("--bench-json", metavar="FILE", help="write the records here")


def pytest_configure(config):
    config.stash[RECORDS] = []


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        options = metafunc.config.option
        cases = metafunc.module.cases(options.bench_device, options.bench_quick)
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture
def bench(request):
    """Runs a case: equal outputs first, then times, unless ``--benchmark-disable``."""
    option = request.config.option
    plugin = request.config.pluginmanager.hasplugin("benchmark")
    benchmark = request.getfixturevalue("benchmark") if plugin else None
    timed = benchmark is None or benchmark.enabled

    def run(case):
        device = option.bench_device
        with threads_of(case, device):
            setup = case.setup(timed)
            record = compare(case, setup, device, timed=timed, quick=option.bench_quick)
            request.config.stash[RECORDS].append(record)
            if benchmark is not None:
                subject = next(iter(setup.contenders.values()))
                assert isinstance(subject, Contender)
                benchmark.pedantic(waiting(subject.run, device), rounds=5, iterations=1)
                benchmark.extra_info.update(record)

    return run


def waiting(run, device):
    """The same call, ended when the GPU has ended."""
    if device.type == "cpu":
        return run

    def run_and_wait():
        run()
        torch.cuda.synchronize(device)

    return run_and_wait


def pytest_terminal_summary(terminalreporter, config):
    if records := config.stash[RECORDS]:
        terminalreporter.section("against the peers")
        terminalreporter.write(records_table(records))
    if config.option.bench_json:
        with open(config.option.bench_json, "w") as file:
            json.dump(records, file, indent=1)
