# SPDX-License-Identifier: Apache-2.0
"""The training loop of DETR."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from detr_fast.config import Config
from detr_fast.criterion import SetCriterion
from detr_fast.engine.build import (
    build_criterion,
    build_dataset,
    build_device,
    build_loader,
    build_model,
)
from detr_fast.engine.evaluate import evaluate, to_device, weighted_losses
from detr_fast.engine.log import MetricLogger, SmoothedValue, say
from detr_fast.engine.optim import build_optimizer, build_schedule
from detr_fast.engine.output import OutputFolder


class TrainingDivergedError(RuntimeError):
    """The loss is not finite."""


class StopRequest:
    """Turns the first Ctrl-C into a wish that the loop grants between two steps."""

    def __init__(self) -> None:
        self.made = False

    def _make(self, *_: Any) -> None:
        self.made = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one is for good

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Within this context Ctrl-C is heard here."""
        before = signal.signal(signal.SIGINT, self._make)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)


def train_one_epoch(
    model: nn.Module,
    criterion: SetCriterion,
    loader: DataLoader,
    optimizer: AdamW,
    device: torch.device,
    epoch: int,
    *,
    clip_max_norm: float,
    print_freq: int,
    stop: StopRequest,
) -> dict[str, float]:
    """Train on every batch of the loader once; return the averaged metrics.

    Raises:
        TrainingDivergedError: if the loss is not finite; the weights are those of the step before.
    """
    model.train()
    criterion.train()
    log = MetricLogger(delimiter="  ")
    log.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    log.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    for images, targets in log.log_every(loader, print_freq, f"Epoch: [{epoch}]"):
        outputs = model(images.to(device))
        losses = criterion(outputs, to_device(targets, device))
        total, terms = weighted_losses(losses, criterion.weight_dict)
        if not math.isfinite(total.item()):  # waits for the device
            bad = ", ".join(f"{k} = {v.item()}" for k, v in losses.items() if not v.isfinite())
            ids = [int(t["image_id"]) for t in targets]
            raise TrainingDivergedError(
                f"loss is {total.item()} in epoch {epoch} ({bad}; images {ids}): lower --lr, or "
                "look at the boxes of these images"
            )
        optimizer.zero_grad()
        total.backward()
        if clip_max_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip_max_norm)
        optimizer.step()
        log.update(class_error=losses["class_error"], loss=total.detach(), **terms)
        log.update(lr=optimizer.param_groups[0]["lr"])
        if stop.made:
            break
    log.say(f"Averaged stats: {log}")
    return log.averages()


def is_milestone(epoch: int, lr_drop: int) -> bool:
    """Whether this epoch's checkpoint is kept: before the learning rate drops, and every 100."""
    return (epoch + 1) % lr_drop == 0 or (epoch + 1) % 100 == 0


def fit(config: Config, checkpoint: dict[str, Any] | None) -> int:
    """Train as the flags say, evaluate after each epoch, leave everything in the output folder.

    Args:
        config (Config): the flags.
        checkpoint (dict, optional): the content of the file of ``--resume``.

    Returns:
        int: exit code of the program; 130 after Ctrl-C.
    """
    device = build_device(config)
    train_set, val_set = (build_dataset(name, config) for name in ("train", "val"))
    names, num_classes = train_set.class_names, train_set.num_classes
    model = build_model(config, checkpoint, names, num_classes)
    model.to(device)
    criterion = build_criterion(config, num_classes).to(device)
    optimizer = build_optimizer(
        model, lr=config.lr, lr_backbone=config.lr_backbone, weight_decay=config.weight_decay
    )
    schedule = build_schedule(optimizer, config.lr_drop)
    start_epoch, best = config.start_epoch, -1.0
    if checkpoint and "optimizer" in checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["lr_scheduler"])
        start_epoch, best = checkpoint["epoch"] + 1, checkpoint.get("best_ap", best)
    train_loader = build_loader(train_set, config, device, shuffle=True)
    val_loader = build_loader(val_set, config, device, shuffle=False)
    output = OutputFolder(config.output_dir, start_epoch)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"number of params: {parameters}")
    if start_epoch >= config.epochs:
        say(f"nothing to train: {config.resume} has seen {start_epoch} of --epochs {config.epochs}")

    def state(epoch: int) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": schedule.state_dict(),
            "epoch": epoch,
            "best_ap": best,
            "args": asdict(config),
            "model_config": asdict(model.config),
            "class_names": names,
        }

    began = time.perf_counter()
    with StopRequest().listening() as stop:
        for epoch in range(start_epoch, config.epochs):
            train_metrics = train_one_epoch(
                model,
                criterion,
                train_loader,
                optimizer,
                device,
                epoch,
                clip_max_norm=config.clip_max_norm,
                print_freq=config.print_freq,
                stop=stop,
            )
            if stop.made:  # the epoch counts as not begun: --resume repeats it from these weights
                output.write_checkpoint(state(epoch - 1))
                break
            schedule.step()
            evaluation = evaluate(
                model,
                criterion,
                val_loader,
                device,
                evaluator=config.evaluator,
                print_freq=config.print_freq,
            )
            ap = evaluation.result.stats[0]
            copies = [f"{epoch:04}"] if is_milestone(epoch, config.lr_drop) else []
            if ap > best:
                best = ap
                copies.append("_best")
            output.write_checkpoint(state(epoch), *copies)
            output.write_evaluation(epoch, evaluation)
            output.draw(val_set, evaluation)
            output.write_log(
                {
                    **{f"train_{name}": value for name, value in train_metrics.items()},
                    **{f"test_{name}": value for name, value in evaluation.metrics.items()},
                    "test_coco_eval_bbox": evaluation.result.stats,
                    "epoch": epoch,
                    "n_parameters": parameters,
                }
            )
            if stop.made:
                break
    say(f"Training time {timedelta(seconds=int(time.perf_counter() - began))}")
    if output.path:
        say(f"{output.path}: {', '.join(sorted(p.name for p in output.path.iterdir()))}")
    if stop.made:
        say(
            f"stopped; continue with --resume {output.path}/checkpoint.pth"
            if output.path
            else "stopped"
        )
        return 130
    return 0
