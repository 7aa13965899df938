# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes: real steps of a run on its own data, in one table.

A run is timed undisturbed first. Its phases are measured in a pass of their own, in which the host
waits for the device at the border of every phase: their sum is more than the undisturbed time where
host and device work at the same time, and that difference is told, too.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.config import Config, UsageError
from detr_fast.engine.backend import chosen_ops
from detr_fast.engine.batch import Batch
from detr_fast.engine.dispatched import Recorder
from detr_fast.engine.log import MetricLogger
from detr_fast.engine.metrics import StepMetrics, lateness_on
from detr_fast.engine.optim import training_mode
from detr_fast.engine.profile_table import PHASES, Counts, Profile, read_trace
from detr_fast.engine.train import Run

COUNTED = 3  # steps whose calls are counted or traced: their number varies little
SYNC_WARNING = "synchronizing CUDA operation"

# of the command line, beside those of training
FLAGS: dict[str, dict[str, Any]] = {
    "steps": {"type": int, "help": "batches that are timed (20)"},
    "warmup": {"type": int, "help": "batches before them, which are not (5)"},
    "trace": {"metavar": "FILE", "help": f"write a Chrome trace of {COUNTED} steps (JSON)"},
}


class Options(NamedTuple):
    """What a profile is told beside the flags of the run."""

    steps: int = 20
    warmup: int = 5
    trace: str = ""

    def checked(self) -> "Options":
        """Itself.

        Raises:
            UsageError: if a number is out of range or the trace has nowhere to go.
        """
        for name, least in (("steps", 1), ("warmup", 0)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"--{name}: expected at least {least}, got {value}")
        if self.trace and not Path(self.trace).parent.is_dir():
            raise UsageError(f"--trace {self.trace}: there is no such folder")
        return self


class PhaseClock:
    """Shares out the time since the mark before to the phase that ends with a mark.

    Args:
        device (torch.device): is waited for at every mark.

    Attributes:
        seconds (dict[str, float]): by phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forget everything; time counts from here."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        wait_for(self.device)
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """A phase ends here, and the next one begins."""
        wait_for(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


class _WatchedLoader:
    """A loader that tells a clock how long its batches were waited for."""

    def __init__(self, loader: Any, clock: PhaseClock) -> None:
        self._loader, self._clock = loader, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            self._clock.mark("copy")  # of batches that are sent ahead
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._clock.mark("data")
            yield batch


class Steps:
    """Training steps of a run, one after the other, over as many epochs as it takes.

    Args:
        run (Run): what trains; nothing is evaluated or written.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.device = run, run.device
        self.metrics = StepMetrics(MetricLogger(), run.watch, lateness=lateness_on(run.device))
        self._batches = self._endless()
        self._turns = 0

    def _endless(self) -> Iterator[tuple[int, Batch]]:
        batches, epoch = self.run.train_batches, self.run.progress.epoch
        while True:
            batches.loader.batch_sampler.begin(epoch)
            yield from enumerate(batches)
            epoch += 1

    def __call__(self, count: int, clock: PhaseClock | None = None) -> list[Batch]:
        """Make `count` steps, each a batch, as `train_one_epoch` makes them.

        Args:
            count (int): how many.
            clock (PhaseClock, optional): is told where phases end.

        Returns:
            list[Batch]: their batches, without the pixels.
        """
        mark = clock.mark if clock else lambda phase: None
        seen = []
        for _ in range(count):
            number, batch = next(self._batches)
            mark("copy")
            values = self.run.step(batch, number, len(self.run.train_batches))
            mark("optimizer")
            self.metrics.add(number, batch.image_ids, values)
            if self._turns % self.run.config.print_freq == 0:
                self.metrics.turn()
            self._turns += 1
            mark("metrics")
            shape = torch.empty(batch.images.tensors.shape, device="meta")
            seen.append(batch._replace(images=batch.images._replace(tensors=shape)))
        return seen

    def calls(self, count: int) -> float | None:
        """Calls of torch in a step, without loader and log; None of a compiled model.

        That would be compiled anew to be watched.
        """
        if self.run.config.compile == "on":
            return None
        recorder = Recorder()
        for _ in range(count):
            number, batch = next(self._batches)
            with recorder:
                self.run.step(batch, number, len(self.run.train_batches))
        return len(recorder.names) / count

    @contextmanager
    def watched(self, clock: PhaseClock) -> Iterator[None]:
        """Within this context the clock hears of the phases inside of a step, too."""
        step, batches, loader = self.run.step, self.run.train_batches, self.run.train_batches.loader
        learner = step.learner
        backward = learner.backward

        def marked(loss: Tensor) -> None:
            clock.mark("match and loss")
            backward(loss)
            clock.mark("backward")

        # before the criterion and not behind the model, which may be compiled
        hook = step.criterion.register_forward_pre_hook(lambda *_: clock.mark("forward"))
        batches.loader, learner.backward = _WatchedLoader(loader, clock), marked
        try:
            yield
        finally:
            hook.remove()
            batches.loader = loader
            del learner.backward  # that of the class comes back


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(
    config: Config, checkpoint: dict[str, Any] | None = None, options: Options | None = None
) -> Profile:
    """Train for some steps and tell where their time went; leaves nothing but the trace.

    Args:
        config (Config): the flags of the run.
        checkpoint (dict, optional): the content of the file of ``--resume`` or ``--finetune``.
        options (Options, optional): how many steps, and where the trace goes.

    Raises:
        UsageError: if an option is out of range.
    """
    options = (options or Options()).checked()
    config = replace(config, output_dir="")
    with chosen_ops(config):
        run = _ready(config, checkpoint)
        steps = Steps(run)
        steps(options.warmup)
        _forget_peak(run.device)
        wait_for(run.device)
        start = time.perf_counter()
        batches = steps(options.steps)
        wait_for(run.device)
        seconds = time.perf_counter() - start
        memory = peak_memory(run.device)
        counts = count(steps, options.trace)
        phases = _phases(run, checkpoint, options)
    return Profile(run, options.steps, options.warmup, seconds, phases, batches, counts, memory)


def _ready(config: Config, checkpoint: dict[str, Any] | None) -> Run:
    run = Run(config, checkpoint)
    training_mode(run.model)
    run.step.criterion.train()
    return run


def _phases(run: Run, checkpoint: dict[str, Any] | None, options: Options) -> dict[str, float]:
    """Seconds of each phase in a pass of their own, over the same batches.

    A CUDA graph has no borders that the host could wait at: that pass does without.
    """
    if run.device.type == "cuda" and run.config.cuda_graphs != "off":
        run = _ready(replace(run.config, cuda_graphs="off"), checkpoint)
    steps, clock = Steps(run), PhaseClock(run.device)
    with steps.watched(clock):
        steps(options.warmup)
        clock.restart()
        steps(options.steps, clock)
    return clock.seconds


def count(steps: Steps, trace: str) -> Counts:
    """Calls of torch, kernels and waits of a step, and the trace where one is asked for."""
    cuda = steps.device.type == "cuda"
    syncs = count_syncs(steps, COUNTED) / COUNTED if cuda else None
    if not (cuda or trace):
        return Counts(calls=steps.calls(COUNTED))
    with TemporaryDirectory() as folder:
        file = Path(trace or f"{folder}/trace.json")
        with torch.profiler.profile() as profiler:
            steps(COUNTED)
            wait_for(steps.device)
        profiler.export_chrome_trace(str(file))
        if not cuda:
            return Counts(calls=steps.calls(COUNTED))
        return read_trace(file, COUNTED)._replace(syncs=syncs)


def count_syncs(steps: Steps, number: int) -> int:
    """How often some steps make the host wait, as far as torch knows of it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            steps(number)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum(SYNC_WARNING in str(warning.message) for warning in found)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at peak: of the timed steps on CUDA, else of the process since its start."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    try:
        import resource
    except ImportError:  # Windows
        return {}
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
