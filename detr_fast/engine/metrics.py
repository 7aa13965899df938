# SPDX-License-Identifier: Apache-2.0
"""Metrics of the training loop, read late, and what they tell of losses that are not finite."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.engine.log import MetricLogger, say

UNSCALED = "_unscaled"


class TrainingDivergedError(RuntimeError):
    """Losses or predictions are not finite."""


def not_finite(values: Mapping[str, float]) -> dict[str, float]:
    """The loss terms that are not finite, without their weights.

    Args:
        values (Mapping[str, float]): ``"loss"`` and all terms as `weighted_losses` names them.

    Returns:
        dict[str, float]: by their names in the criterion: ``loss_ce_3`` is of decoder layer 3,
        ``loss_ce`` of the last. Where only their sum overflows, ``loss``; empty if all is finite.
    """
    terms = {n.removesuffix(UNSCALED): v for n, v in values.items() if n.endswith(UNSCALED)}
    for choice in (terms, {"loss": values["loss"]}):
        if found := {name: value for name, value in choice.items() if not math.isfinite(value)}:
            return found
    return {}


def listed(values: Mapping[str, float]) -> str:
    """Names and values in a line."""
    return ", ".join(f"{name} = {value}" for name, value in values.items())


class DivergenceWatch:
    """Says which updates were skipped, and ends a run that does not recover.

    Args:
        limit (int): skipped updates in a row that end the run (``--max_skipped_steps``).

    Attributes:
        in_a_row (int): updates skipped since the last good one, whatever the epoch.
    """

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self.in_a_row = 0

    def good(self) -> None:
        """An update was made."""
        self.in_a_row = 0

    def skipped(self, where: str, terms: Mapping[str, float], images: Sequence[int]) -> None:
        """An update was left out.

        Args:
            where (str): epoch and step.
            terms (Mapping[str, float]): what was not finite.
            images (Sequence[int]): ids of the images of the batch.

        Raises:
            TrainingDivergedError: if it is the last one in a row that is borne.
        """
        self.in_a_row += 1
        found = f"{listed(terms)}; images {list(images)}"
        if self.in_a_row >= self.limit:
            raise TrainingDivergedError(
                f"loss or gradient not finite in {self.in_a_row} updates in a row, the last in "
                f"{where} ({found}); the weights are those before them: lower --lr, or look at "
                "the boxes of these images"
            )
        say(f"warning: {where}: update skipped, not finite: {found}")

    def overflowed(self, where: str, scale: float) -> None:
        """An update was left out because float16 does not hold its gradient times the loss scale.

        This is how a scale is found. It says nothing of the training, and is not counted, unless
        the scale is down at 1.

        Args:
            where (str): epoch and step.
            scale (float): the loss scale.
        """
        say(f"{where}: update skipped, its gradient overflows at a loss scale of {scale:g}")


class _Step(NamedTuple):
    batch: int
    images: Sequence[int]
    names: tuple[str, ...]
    values: Tensor  # one for each name, on the device


class _Period(NamedTuple):
    steps: list[_Step]
    values: Tensor  # of all steps, on the host once `arrived`
    arrived: torch.cuda.Event | None


class StepMetrics:
    """The metrics of an epoch: they stay on the device, and the host is late to read them.

    A step leaves one vector on the device. With each line of the log (`turn`) the vectors since the
    line before start on their way to the host, and those that started `lateness` lines ago are
    read. So the host waits for work that was submitted long ago, if at all, and runs ahead of the
    device by `lateness` + 1 periods at most; a line shows metrics that are `lateness` periods old,
    but for an epoch's first line, which waits. `finish` reads all.

    Args:
        log (MetricLogger): gets the metrics of every step whose loss was finite; not those of a
            step that ends in an update that was left out.
        watch (DivergenceWatch): told of every update and of what was not finite.
        epoch (int): its number, for messages.
        lateness (int): 0 reads with each line what there is; see `lateness_on`.
        skipped (int): updates skipped in the first part of this epoch, before `--resume`.
        tell (Callable, optional): called with the number of each batch and its finite metrics.

    Attributes:
        skipped (int): updates of this epoch that were skipped, as far as they are read; for any
            reason.
    """

    def __init__(
        self,
        log: MetricLogger,
        watch: DivergenceWatch | None = None,
        *,
        epoch: int = 0,
        lateness: int = 0,
        skipped: int = 0,
        tell: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self._tell = tell
        self.log, self.watch, self.epoch = log, watch or DivergenceWatch(), epoch
        self.lateness, self.skipped = lateness, skipped
        self._steps: list[_Step] = []
        self._on_the_way: deque[_Period] = deque()
        self._begun = False
        self._window: list[tuple[_Step, dict[str, float]]] = []

    def add(self, batch: int, images: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Keep the metrics of a step.

        Args:
            batch (int): its number.
            images (Sequence[int]): ids of its images.
            values (Mapping[str, Tensor]): numbers on the device, ``"loss"`` and the terms of
                `weighted_losses` among them. A step that ends in an update adds ``"skipped"`` (not
                0 if it was left out) and ``"gradient_norm"``, one of a scaled loss
                ``"loss_scale"``, too; these are not logged.
        """
        vector = torch.stack(list(values.values()))
        self._steps.append(_Step(batch, images, tuple(values), vector))

    def turn(self) -> None:
        """Send the metrics since the last turn to the host, and read those that are due.

        Raises:
            TrainingDivergedError: see `DivergenceWatch`.
        """
        self._read_all_but(self.lateness if self._begun else 0)

    def finish(self) -> None:
        """Read all metrics; waits for the device.

        Raises:
            TrainingDivergedError: see `DivergenceWatch`.
        """
        self._read_all_but(0)

    def _read_all_but(self, periods: int) -> None:
        if self._steps:
            self._on_the_way.append(_sent(self._steps))
            self._steps = []
        while len(self._on_the_way) > periods:
            self._begun = True
            steps, values, arrived = self._on_the_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            numbers = iter(values.tolist())
            for step in steps:
                self._take(step, {name: next(numbers) for name in step.names})

    def _take(self, step: _Step, values: dict[str, float]) -> None:
        skipped, norm = values.pop("skipped", None), values.pop("gradient_norm", math.nan)
        scale = values.pop("loss_scale", 1.0)
        self._window.append((step, {} if math.isfinite(values["loss"]) else not_finite(values)))
        if not skipped and math.isfinite(values["loss"]):
            self.log.update(**values)
            if self._tell is not None:
                self._tell(step.batch, values)
        if skipped is None:  # its gradient waits for a later batch (--accumulate_steps)
            return
        # of several batches those that spoilt the update, or all where none did alone
        spoilt = [(s, terms) for s, terms in self._window if terms]
        window, self._window = spoilt or self._window, []
        if not skipped:
            self.watch.good()
            return
        self.skipped += 1
        where = f"epoch {self.epoch}, step {step.batch}"
        if scale > 1 and not spoilt:
            self.watch.overflowed(where, scale)
            return
        self.watch.skipped(
            where,
            {name: value for _, terms in window for name, value in terms.items()}
            or {"norm of the gradient": norm},
            [image for s, _ in window for image in s.images],
        )


def lateness_on(device: torch.device) -> int:
    """Periods by which the metrics are late: 1 where the host runs ahead of the device."""
    return int(device.type == "cuda")


def _sent(steps: list[_Step]) -> _Period:
    """Start the copy of all their values; an event tells when it is done."""
    values = torch.cat([step.values for step in steps])
    if not values.is_cuda:
        return _Period(steps, values.cpu(), None)
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    return _Period(steps, on_host, torch.cuda.current_stream(values.device).record_event())
