# SPDX-License-Identifier: Apache-2.0
"""The training loop of DETR."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
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
from detr_fast.engine.evaluate import Evaluation, evaluate, to_device, weighted_losses
from detr_fast.engine.log import JsonLog, MetricLogger, SmoothedValue
from detr_fast.engine.optim import build_optimizer, build_schedule
from detr_fast.models.checkpoint import write_checkpoint


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
    """Whether the checkpoint of this epoch is kept: before a drop of the learning rate, every 100."""
    return (epoch + 1) % lr_drop == 0 or (epoch + 1) % 100 == 0


def fit(config: Config, checkpoint: dict[str, Any] | None, say) -> int:
    """Train as the flags say, evaluate after each epoch, and leave everything in the output folder.

    Args:
        config (Config): the flags.
        checkpoint (dict, optional): that of ``--resume``.

    Returns:
        int: exit code; 130 after Ctrl-C.
    """
    device = build_device(config)
    train_set, val_set = (build_dataset(name, config) for name in ("train", "val"))
    model, architecture = build_model(
        config, checkpoint, train_set.class_names, train_set.num_classes
    )
