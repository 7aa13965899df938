# SPDX-License-Identifier: Apache-2.0
"""``--dry_run``: whether a run would start, fit into memory and learn, before it is left alone."""

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from typing import Any

import torch

from detr_fast.config import Config, UsageError
from detr_fast.data.annotations import DatasetError
from detr_fast.data.sampler import BucketedBatches
from detr_fast.engine.backend import chosen_ops
from detr_fast.engine.batch import Batch
from detr_fast.engine.evaluate import Evaluated
from detr_fast.engine.log import MetricLogger, say
from detr_fast.engine.metrics import StepMetrics
from detr_fast.engine.optim import training_mode
from detr_fast.engine.profile import peak_memory, wait_for
from detr_fast.engine.train import Run

STEPS = 2
GIB = 1 << 30


def dry_run(config: Config, checkpoint: dict[str, Any] | None = None) -> None:
    """Make two training steps and one batch of the evaluation, and say how it went.

    The steps are those of the largest batches of the first epoch, where batches are planned
    (``--padding bucket``). Nothing is written.

    Args:
        config (Config): the flags of the run.
        checkpoint (dict, optional): the content of the file of ``--resume`` or ``--finetune``.

    Raises:
        UsageError: if the device has too little memory; names the batch and what helps.
        DatasetError: if not one validation image of a batch can be used.
    """
    config = replace(config, output_dir="")
    with chosen_ops(config):
        if config.eval and checkpoint:
            evaluated = Evaluated.of(config, checkpoint)
        else:
            run = Run(config, checkpoint)
            _train(run)
            evaluated = Evaluated(run.learner.evaluated, run.criterion, run.val_batches, run.infer)
        _evaluate(evaluated)
    device = evaluated.batches.device
    say(f"memory at peak: {_memory(device)}")
    say("the dry run is over; nothing was written")


def _train(run: Run) -> None:
    batches, accumulated = run.train_batches, run.config.accumulate_steps
    count = min(STEPS * accumulated, len(batches))
    epoch, first, which = run.progress.epoch, 0, "the first"
    sampler = batches.loader.batch_sampler
    sampler.begin(epoch)
    if isinstance(sampler, BucketedBatches):
        which, first = "the largest", min(sampler.largest(), len(batches) - count)
        sampler.begin(epoch, first)
    training_mode(run.model)
    run.step.criterion.train()
    metrics = StepMetrics(MetricLogger(), run.watch, epoch=epoch)
    seconds = []
    start = time.perf_counter()
    for number, batch in enumerate(islice(batches, count), first):
        with _memory_of(batch):
            values = run.step(batch, number, len(batches))
            wait_for(run.device)
        metrics.add(number, batch.image_ids, values)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        say(
            f"training step {len(seconds)} of {count} ({which} batches of epoch {epoch}): "
            f"{_shape(batch)}, {seconds[-1]:.2f} s, loss {values['loss'].item():.3f}"
        )
    metrics.finish()
    epochs = run.config.epochs - epoch
    at_most = timedelta(seconds=round(seconds[-1] * len(batches)))
    say(
        f"at the pace of the last one an epoch of {len(batches)} batches takes {at_most}; "
        f"{epochs} are to be trained"
    )


@torch.no_grad()
def _evaluate(evaluated: Evaluated) -> None:
    model, criterion, batches, infer = evaluated
    model.eval()
    criterion.eval()
    start = time.perf_counter()
    batch = next(_usable(batches), None)
    if batch is None:
        raise DatasetError("no image to evaluate can be used: see the warnings above")
    with _memory_of(batch):
        losses = criterion(infer(batch.images), batch.targets)
        wait_for(batches.device)
    say(
        f"validation batch 1 of {len(batches)}: {_shape(batch)}, "
        f"{time.perf_counter() - start:.2f} s, loss_ce {losses['loss_ce'].item():.3f}"
    )


def _usable(batches: Any) -> Iterator[Batch]:
    return (batch for batch in batches if batch is not None)


def _shape(batch: Batch) -> str:
    images, _, height, width = batch.images.tensors.shape
    return f"{images} image{'s' * (images > 1)} in {height}x{width}"


class _memory_of:
    """Within this context too little memory is a mistake of the user, who is told the remedy."""

    def __init__(self, batch: Batch) -> None:
        self.shape = _shape(batch)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise UsageError(
                f"too little GPU memory for a batch of {self.shape}: lower --batch_size (and raise "
                "--accumulate_steps), lower --image_size, or take --amp bf16"
            ) from error


def _memory(device: torch.device) -> str:
    peak = peak_memory(device)
    text = ", ".join(f"{size / GIB:.2f} GiB {name}" for name, size in peak.items()) or "not known"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        text += f" of {total / GIB:.1f} GiB"
    return text
