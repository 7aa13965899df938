# SPDX-License-Identifier: Apache-2.0
"""The default run by the fast and by the reference back end: steps a second, and the AP they reach.

``python -m benchmarks.default_run``: both train in one process on the generated data with the flags
of ``tools/train.py`` without any, by the product's own loop and loader, from their first to their
last epoch.  They take turns by epochs.  In the first one the pictures are painted, which is the
same work for both.  Other flags of training go to both: ``--epochs 3`` for a shorter run.
"""

import contextlib
import io
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch

from detr_fast.command_line import parse
from detr_fast.config import configure
from detr_fast.engine.backend import chosen_ops
from detr_fast.engine.evaluate import evaluate
from detr_fast.engine.train import Run, train_one_epoch

BACKENDS = ("fast", "reference")


class Outcome(NamedTuple):
    """What a back end came to."""

    seconds: list[float]  # of each epoch
    steps: int  # of an epoch
    ap: float
    ap50: float


class Trainer:
    """A run of which an epoch is timed at a time.

    Args:
        flags (dict): of the command line.
        backend (str): ``fast`` or ``reference``.
    """

    def __init__(self, flags: dict[str, Any], backend: str) -> None:
        self.run = Run(configure(flags | {"backend": backend, "output_dir": ""}), None)
        self.seconds: list[float] = []

    def train_epoch(self) -> None:
        """Train for an epoch and note its time."""
        run, batches = self.run, self.run.train_batches
        epoch = len(self.seconds)
        batches.loader.batch_sampler.begin(epoch)
        start = time.perf_counter()
        with chosen_ops(run.config), contextlib.redirect_stdout(io.StringIO()):
            train_one_epoch(
                run.step, batches, epoch, print_freq=run.config.print_freq, stop=run.stop
            )
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        self.seconds.append(time.perf_counter() - start)
        run.learner.end_epoch()

    def outcome(self) -> Outcome:
        """Evaluate what has been learnt."""
        run = self.run
        with chosen_ops(run.config), contextlib.redirect_stdout(io.StringIO()):
            found = evaluate(run.learner.evaluated, run.criterion, run.val_batches, infer=run.infer)
        return Outcome(self.seconds, len(run.train_batches), *found.result.stats[:2])


def measured(flags: dict[str, Any]) -> dict[str, Outcome]:
    """Train both back ends to the end, epoch by epoch in turn."""
    trainers = {backend: Trainer(flags, backend) for backend in BACKENDS}
    epochs = configure(flags).epochs
    for epoch in range(epochs):
        for trainer in trainers.values():
            trainer.train_epoch()
        times = ", ".join(
            f"{name} {trainer.seconds[-1]:.1f} s" for name, trainer in trainers.items()
        )
        print(f"epoch {epoch + 1} of {epochs}: {times}", file=sys.stderr)
    return {backend: trainer.outcome() for backend, trainer in trainers.items()}


def table(outcomes: dict[str, Outcome], batch_size: int) -> str:
    """Rates of the whole runs, the AP after them, and the ratio of their times.

    Beside it the median of the ratios of epochs, in each of which both met the same machine.
    """
    lines = ["| back end | steps | steps/s | images/s | AP | AP50 |", "| --- |" + " ---: |" * 5]
    for backend, found in outcomes.items():
        steps = found.steps * len(found.seconds)
        rate = steps / sum(found.seconds)
        numbers = f"{rate:.2f} | {rate * batch_size:.1f} | {found.ap:.3f} | {found.ap50:.3f}"
        lines.append(f"| {backend} | {steps} | {numbers} |")
    fast, slow = (outcomes[backend].seconds for backend in BACKENDS)
    ratios = [b / a for a, b in zip(fast, slow, strict=True)]
    epochs = f"median of {len(ratios)} epochs {statistics.median(ratios):.2f}"
    span = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return "\n".join(
        [*lines, "", f"fast over reference: {sum(slow) / sum(fast):.2f} ({epochs}, {span})"]
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    flags = parse("python -m benchmarks.default_run", __doc__, argv)
    flags = {"dataset_file": "shapes"} | flags
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print(table(measured(flags), configure(flags).batch_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
