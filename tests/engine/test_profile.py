# SPDX-License-Identifier: Apache-2.0
"""A profile tells where the time goes: phases add up, counts are right, nothing is left behind."""

import json
import warnings

import pytest
import torch

from detr_fast import cli
from detr_fast.config import configure
from detr_fast.data.batch import ImageBatch
from detr_fast.engine import profile as engine
from detr_fast.engine.batch import Batch
from detr_fast.engine.profile import Options, PhaseClock, Steps, count_syncs, profile
from detr_fast.engine.profile_table import PHASES, Waste, padding_waste, read_trace
from detr_fast.engine.train import Run

SMALL = {"device": "cpu", "batch_size": 2, "num_queries": 4, "output_dir": ""}


def small(**flags):
    return configure(SMALL | flags)


@pytest.mark.parametrize("flags", [{}, {"backend": "reference"}, {"accumulate_steps": 2}])
def test_phases_add_up_to_their_pass(flags, monkeypatch):
    spans = []

    class Clock(PhaseClock):
        def restart(self):
            super().restart()
            self.first = self.last

        def mark(self, phase):
            super().mark(phase)
            spans.append((sum(self.seconds.values()), self.last - self.first))

    monkeypatch.setattr(engine, "PhaseClock", Clock)
    found = profile(small(**flags), options=Options(steps=3, warmup=1))
    added, passed = spans[-1]
    assert added == pytest.approx(passed, rel=1e-6)
    assert sum(found.phases.values()) == pytest.approx(passed, rel=1e-6)
    assert set(found.phases) == set(PHASES)
    # every border was seen: what belongs to one phase is not in its neighbour
    for phase in ("data", "forward", "match and loss", "backward", "optimizer"):
        assert 0 < found.phases[phase] < passed, phase
    assert found.images == 6
    assert found.counts.calls > 100


def test_time_goes_to_the_phase_that_takes_it():
    run = Run(small(), None)
    steps, clock = Steps(run), PhaseClock(run.device)
    spent = {"forward": 0.3, "backward": 0.2, "optimizer": 0.1}

    def slower(method, seconds):
        def slow(*args):
            end = engine.time.perf_counter() + seconds
            while engine.time.perf_counter() < end:
                pass
            return method(*args)

        return slow

    run.model.register_forward_hook(slower(lambda *_: None, spent["forward"]))
    learner = run.step.learner
    type_backward = type(learner).backward
    try:
        type(learner).backward = slower(type_backward, spent["backward"])
        learner.finish = slower(learner.finish, spent["optimizer"])
        with steps.watched(clock):
            steps(1)
            clock.restart()
            steps(1, clock)
    finally:
        type(learner).backward = type_backward
    for phase, seconds in spent.items():
        assert clock.seconds[phase] >= seconds, phase
    assert clock.seconds["match and loss"] < min(spent.values())


def test_watching_leaves_nothing_behind():
    run = Run(small(), None)
    loader = run.train_batches.loader
    with pytest.raises(ZeroDivisionError), Steps(run).watched(PhaseClock(run.device)):
        raise ZeroDivisionError
    assert run.train_batches.loader is loader
    assert "backward" not in vars(run.step.learner)
    assert not run.step.criterion._forward_pre_hooks


def test_table_and_trace(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "--device cpu --batch_size 2 --num_queries 4 --steps 2 --warmup 1 --trace trace.json"
    assert cli.main(["profile", *line.split()]) == 0
    printed = capsys.readouterr().out
    for text in (*PHASES.values(), "undisturbed", "images/s", "2 steps after 1 of warm-up"):
        assert text in printed
    assert "back end fast, --amp auto" in printed
    assert "padding: 1.00 times the pixels of the images, 1 shapes in 2 batches" in printed
    assert "host syncs a step: n/a, there is no GPU" in printed
    assert "calls of torch a step: " in printed
    assert "MiB resident" in printed
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::convolution" for event in events)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]  # no output folder


def test_epochs_follow_each_other():
    """A profile may be longer than an epoch, whose batches an accumulation counts."""
    run = Run(small(batch_size=900, accumulate_steps=2), None)
    assert len(run.train_batches) == 2
    numbers = []
    run.step = lambda batch, number, batches: (
        numbers.append((number, batches)) or {"loss": torch.zeros(())}
    )
    Steps(run)(3)
    assert numbers == [(0, 2), (1, 2), (0, 2)]


def batch(height, width, sizes):
    sizes = None if sizes is None else torch.tensor(sizes, dtype=torch.int32)
    images = torch.empty(2, 3, height, width, device="meta")
    return Batch(ImageBatch(images, sizes), None, [])


def test_padding_waste():
    batches = [batch(10, 20, [(10, 10), (5, 20)]), batch(10, 10, None), batch(10, 10, None)]
    assert padding_waste(batches) == Waste((400 + 200 + 200) / (200 + 200 + 200), 2)


def test_counts_of_a_gpu_trace(tmp_path):
    names = {"kernel": "gemm", "gpu_memcpy": "HtoD", "cuda_runtime": "cudaGraphLaunch"}
    events = [{"cat": kind, "name": name} for kind, name in names.items()]
    events = [*events, *events[:1] * 5, {"name": "no category"}]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    counts = read_trace(tmp_path / "trace.json", 2)
    assert (counts.kernels, counts.copies, counts.graphs) == (3, 0.5, 0.5)


def test_syncs_are_the_warnings_of_torch(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def steps(count):
        for _ in range(count):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)

    assert count_syncs(steps, 4) == 4
    assert modes == ["warn", 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--steps 0", "--steps: expected at least 1, got 0"),
        ("--warmup -1", "--warmup: expected at least 0, got -1"),
        ("--trace /nowhere/at/all.json", "--trace /nowhere/at/all.json: there is no such folder"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("--eval --resume x.pth", "x.pth: no such file"),
        ("--check_data", "leave them out of a profile"),
    ],
)
def test_mistakes_end_with_one_line(line, message, capsys):
    assert cli.profile_step(line.split()) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_training_knows_no_flag_of_the_profile(capsys):
    assert cli.train(["--steps", "3"]) == 2
    assert "unrecognized arguments: --steps" in capsys.readouterr().err
