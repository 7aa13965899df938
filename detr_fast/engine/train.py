# SPDX-License-Identifier: Apache-2.0
"""The training loop of DETR."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from types import FrameType
from typing import Any

from detr_fast.config import Config, UsageError
from detr_fast.engine.backend import Execution, chosen_ops
from detr_fast.engine.batch import DeviceBatches
from detr_fast.engine.build import (
    begin_epoch,
    bucket_of,
    build_criterion,
    build_device,
    build_loader,
    build_model,
    load_starting_weights,
)
from detr_fast.engine.datasets import build_datasets, say_unusable_images
from detr_fast.engine.diagnose import why_no_ap
from detr_fast.engine.evaluate import evaluate, per_class_lines
from detr_fast.engine.log import MetricLogger, SmoothedValue, say
from detr_fast.engine.loggers import Loggers
from detr_fast.engine.metrics import DivergenceWatch, StepMetrics, lateness_on
from detr_fast.engine.optim import freeze, training_mode
from detr_fast.engine.output import OutputFolder
from detr_fast.engine.reference import ReferenceStep
from detr_fast.engine.resume import Progress
from detr_fast.engine.step import TrainingStep, reports
from detr_fast.models.checkpoint import CheckpointError


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish that the loop grants between two updates.

    Attributes:
        signal (int): the signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0

    def _make(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one is for good

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Within this context the signals are heard here."""
        before = {s: signal.signal(s, self._make) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_one_epoch(
    step: TrainingStep | ReferenceStep,
    batches: DeviceBatches,
    epoch: int,
    *,
    print_freq: int,
    stop: StopRequest,
    metrics: StepMetrics | None = None,
    first: int = 0,
    after_update: Callable[[int], None] = lambda batches: None,
) -> int:
    """Train on every batch of the loader once.

    Args:
        step (TrainingStep | ReferenceStep): makes the updates.
        batches (DeviceBatches): from number ``first`` on; its length counts all.
        epoch (int): its number, for the log.
        print_freq (int): batches between two lines of the log.
        stop (StopRequest): ends the epoch after the update in hand.
        metrics (StepMetrics, optional): collects the metrics.
        first (int): batches of this epoch that were done before.
        after_update (Callable): called with the number of batches done, when no gradient waits.

    Returns:
        int: batches done; fewer than the loader's length if the epoch was stopped.

    Raises:
        TrainingDivergedError: if the losses of many updates in a row are not finite (in the
            reference step: of one); the weights are those of the update before.
    """
    learner = step.learner
    training_mode(learner.model)
    step.criterion.train()
    metrics = metrics or StepMetrics(MetricLogger(), epoch=epoch)
    log, length = metrics.log, len(batches)
    lines = log.log_every(batches, print_freq, f"Epoch: [{epoch}]", first, metrics.turn)
    for number, batch in enumerate(lines, first):
        metrics.add(number, batch.image_ids, step(batch, number, length))
        log.update(lr=learner.rate)
        if learner.updated:
            after_update(number + 1)
            if stop.signal:
                metrics.finish()
                return number + 1
    metrics.finish()
    log.say(f"Averaged stats: {log}" + (f"  skipped: {n}" if (n := metrics.skipped) else ""))
    return length


def epoch_log(meters: dict[str, Any]) -> MetricLogger:
    """The meters of a training epoch in the original's form; ``meters`` of its first part."""
    log = MetricLogger(delimiter="  ")
    log.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    log.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    log.restore(meters)
    return log


def is_milestone(epoch: int, lr_drop: int) -> bool:
    """Whether this epoch's checkpoint is kept: before the learning rate drops, and every 100."""
    return (epoch + 1) % lr_drop == 0 or (epoch + 1) % 100 == 0


class Run:
    """A training from its first to its last epoch.

    Args:
        config (Config): the flags.
        checkpoint (dict, optional): the content of the file of ``--resume`` or ``--finetune``.
    """

    def __init__(self, config: Config, checkpoint: dict[str, Any] | None) -> None:
        self.config = config
        self.device = build_device(config)
        execution = Execution.of(config, self.device)
        self.train_set, self.val_set = build_datasets(config, ("train", "val"))
        self.model = build_model(config, self.train_set.num_classes)
        goes_on = load_starting_weights(self.model, config, checkpoint, self.train_set.class_names)
        self.model.to(self.device)
        freeze(self.model, config.freeze)
        self.criterion = build_criterion(config, self.train_set.num_classes).to(self.device)
        self.step = execution.training_step(self.model, self.criterion)
        self.learner = self.step.learner
        self.infer = execution.inference(self.learner.evaluated, self.step)
        self.train_batches, self.val_batches = (
            DeviceBatches(
                build_loader(dataset, config, self.device, shuffle=shuffle),
                self.criterion,
                self.device,
            )
            for dataset, shuffle in ((self.train_set, True), (self.val_set, False))
        )
        bucket = bucket_of(config, self.train_set)
        self.progress = Progress.of(config, len(self.train_set), bucket)
        if goes_on:
            try:
                self.learner.load_state_dict(checkpoint)
                self.progress = self.progress.resumed(checkpoint)
            except UsageError:
                raise
            except Exception as error:  # a file from elsewhere can fail in any line
                raise CheckpointError(
                    f"{config.resume}: its training state does not fit ({error!r}): start from its "
                    "weights with --finetune"
                ) from error
        self.output = OutputFolder(config.output_dir, self.progress.epoch, config.keep_checkpoints)
        self.loggers = Loggers(
            config.logger_names,
            self.output.path,
            asdict(config),
            self.progress.epoch * len(self.train_batches) + self.progress.batch,
        )
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.stop = StopRequest()
        self.watch = DivergenceWatch(config.max_skipped_steps)

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint: all that `Run` needs to go on exactly."""
        return {
            "model": self.model.state_dict(),
            **self.learner.state_dict(),
            **self.progress.state_dict(),
            "args": asdict(self.config),
            "model_config": asdict(self.model.config),
            "class_names": self.train_set.class_names,
            "category_ids": self.train_set.category_ids,
        }

    def train_epoch(self) -> MetricLogger:
        """Train the rest of the epoch in hand, and write checkpoints on the way and at its end."""
        log, epoch, first = (
            epoch_log(self.progress.meters),
            self.progress.epoch,
            self.progress.batch,
        )
        metrics = StepMetrics(
            log,
            self.watch,
            epoch=epoch,
            lateness=lateness_on(self.device),
            skipped=self.progress.skipped,
            tell=self.tell,
        )

        def save(batches: int) -> None:
            metrics.finish()
            self.progress = replace(
                self.progress, batch=batches, meters=log.state(), skipped=metrics.skipped
            )
            self.output.write_checkpoint(self.state_dict())

        def save_at_times(batches: int) -> None:
            steps = self.config.checkpoint_steps
            if steps and batches - self.progress.batch >= steps:
                save(batches)

        begin_epoch(self.train_batches.loader, epoch, first)
        done = train_one_epoch(
            self.step,
            self.train_batches,
            epoch,
            print_freq=self.config.print_freq,
            stop=self.stop,
            metrics=metrics,
            first=first,
            after_update=save_at_times,
        )
        if done > self.progress.batch:
            save(done)
        return log

    def tell(self, batch: int, values: Mapping[str, float]) -> None:
        """Send the losses of a batch to the loggers, as often as the log has a line."""
        if batch % self.config.print_freq == 0:
            step = self.progress.epoch * len(self.train_batches) + batch
            self.loggers.scalars({f"step/{name}": v for name, v in values.items()}, step)

    def send(self, record: Mapping[str, Any]) -> None:
        """Send what an epoch leaves to the loggers."""
        # its last one: what counts as done at the next start is not taken back
        step = (record["epoch"] + 1) * len(self.train_batches) - 1
        numbers = {name: v for name, v in record.items() if isinstance(v, int | float)}
        stats = zip(("AP", "AP50", "AP75"), record["test_coco_eval_bbox"][:3], strict=True)
        self.loggers.scalars(numbers | {f"test_{name}": value for name, value in stats}, step)
        if self.output.path:
            for name in ("curves", "detections"):
                self.loggers.picture(name, self.output.path / f"{name}.png", step)

    def finish_epoch(self, log: MetricLogger) -> None:
        """Evaluate, and leave pictures, log and checkpoint of the epoch.

        The checkpoint comes last: a run that is killed before evaluates again, and nothing of what
        an epoch leaves is missing.
        """
        config, epoch = self.config, self.progress.epoch
        evaluation = evaluate(
            self.learner.evaluated,
            self.criterion,
            self.val_batches,
            infer=self.infer,
            evaluator=config.evaluator,
            print_freq=config.print_freq,
            stopped=lambda: bool(self.stop.signal),
        )
        if evaluation is None:  # the last checkpoint stands before it
            return
        for line in reports(self.step, self.infer):
            say(line)
        record = {
            **{f"train_{name}": value for name, value in log.averages().items()},
            **{f"test_{name}": value for name, value in evaluation.metrics.items()},
            "test_coco_eval_bbox": evaluation.result.stats,
            **({"train_skipped": self.progress.skipped} if self.progress.skipped else {}),
            "epoch": epoch,
            "n_parameters": self.parameters,
        }
        self.learner.end_epoch()
        self.output.write_evaluation(epoch, evaluation)
        self.output.draw(self.val_set, evaluation)
        self.output.write_log(record)
        self.send(record)
        ap = evaluation.result.stats[0]
        copies = [f"{epoch:04}"] if is_milestone(epoch, config.lr_drop_epoch) else []
        if ap > self.progress.best_ap:
            self.progress = replace(self.progress, best_ap=ap, best_epoch=epoch)
            copies.append("_best")
        self.progress = replace(self.progress, epoch=epoch + 1, batch=0, meters={}, skipped=0)
        self.output.write_checkpoint(self.state_dict(), *copies)
        if advice := why_no_ap(record, self.learner.steps, config):
            say(advice)
        if config.per_class or epoch + 1 == config.epochs or self.out_of_patience():
            say("\n".join(per_class_lines(evaluation.result, self.train_set)))

    def out_of_patience(self) -> bool:
        """Whether ``--patience`` epochs have gone by without a better AP."""
        since = self.progress.epoch - 1 - self.progress.best_epoch
        return 0 < self.config.patience <= since

    def __call__(self) -> int:
        """Train to the end; return the exit code: 0, or 128 + the signal that stopped it."""
        config = self.config
        say(f"number of params: {self.parameters}")
        if self.progress.epoch >= config.epochs:
            seen = self.progress.epoch
            say(f"nothing to train: {seen} of --epochs {config.epochs} are done")
        elif config.lr_drop_epoch >= config.epochs:
            say(
                f"the learning rates stay as they are: --lr_drop {config.lr_drop:g} is not within "
                f"--epochs {config.epochs} (a share is fine, too: --lr_drop 0.67)"
            )
        began = time.perf_counter()
        try:
            with self.stop.listening() as stop:
                while self.progress.epoch < config.epochs and not stop.signal:
                    if self.out_of_patience():
                        say(
                            f"stopped early: no AP above {self.progress.best_ap:.3f} (epoch "
                            f"{self.progress.best_epoch}) for {config.patience} epochs"
                        )
                        break
                    log = self.train_epoch()
                    if not stop.signal:
                        self.finish_epoch(log)
        finally:
            self.loggers.close()
        say_unusable_images(self.train_set, self.val_set)
        say(f"Training time {timedelta(seconds=int(time.perf_counter() - began))}")
        path = self.output.path
        if path:
            say(f"{path}: {', '.join(sorted(p.name for p in path.iterdir()))}")
        if stop.signal:
            say(f"stopped; continue with --resume {path}/checkpoint.pth" if path else "stopped")
            return 128 + stop.signal
        return 0


def fit(config: Config, checkpoint: dict[str, Any] | None) -> int:
    """Train as the flags say, evaluate after each epoch, leave everything in the output folder.

    Args:
        config (Config): the flags.
        checkpoint (dict, optional): the content of the file of ``--resume`` or ``--finetune``;
            it is emptied.

    Returns:
        int: exit code of the program; 130 after Ctrl-C, 143 after SIGTERM.
    """
    run = Run(config, checkpoint)
    if checkpoint is not None:
        checkpoint.clear()  # the run has what it needs; the caller need not hold a copy meanwhile
    with chosen_ops(config):
        return run()
