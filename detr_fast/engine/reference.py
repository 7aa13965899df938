# SPDX-License-Identifier: Apache-2.0
"""The original's training step: ``--backend reference``.

It restates ``engine.py`` of facebookresearch/detr, waits for the device included: what a step of
this package is compared with. See `detr_fast.engine.backend` for the rest of that back end.
"""

import math

import torch
from torch import Tensor, nn

from detr_fast.criterion import SetCriterion
from detr_fast.engine.batch import Batch, model_input
from detr_fast.engine.metrics import UNSCALED, TrainingDivergedError, listed, not_finite
from detr_fast.engine.optim import Learner


class ReferenceLearner(Learner):
    """Updates as the original makes them: every one, with the optimizer that torch chooses.

    Args: as those of `Learner`.
    """

    fused = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a batch's loss."""
        (loss if self._share == 1 else loss * self._share).backward()

    def _clip(self) -> None:
        if self.config.clip_max_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_max_norm)

    def _settle(self) -> None:
        pass


class ReferenceStep:
    """Turns batches into updates as the original does; in the place of `TrainingStep`.

    The total is added up term by term, every term travels to the host by itself in every step, and
    a loss that is not finite ends the run.

    Args:
        learner (ReferenceLearner): holds model and optimizer.
        criterion (SetCriterion): the losses.
    """

    def __init__(self, learner: ReferenceLearner, criterion: SetCriterion) -> None:
        self.learner, self.criterion = learner, criterion

    def __call__(self, batch: Batch, number: int, batches: int) -> dict[str, Tensor]:
        """Learn from a batch.

        Args:
            batch (Batch): on the device.
            number (int): of the batch in its epoch.
            batches (int): of the epoch.

        Returns:
            dict[str, Tensor]: numbers for the log, 0-dim on the CPU.

        Raises:
            TrainingDivergedError: if the loss is not finite; the weights are those before the step.
        """
        outputs = self.learner.model(model_input(batch.images, torch.float32))
        losses = self.criterion(outputs, batch.targets)
        weights = self.criterion.weight_dict
        total = sum(losses[name] * weights[name] for name in losses if name in weights)

        unscaled = {f"{name}{UNSCALED}": value.detach() for name, value in losses.items()}
        scaled = {n: losses[n].detach() * weights[n] for n in losses if n in weights}
        values = {"class_error": losses["class_error"].item(), "loss": sum(scaled.values()).item()}
        values |= {name: value.item() for name, value in (scaled | unscaled).items()}
        if not math.isfinite(values["loss"]):
            raise TrainingDivergedError(
                f"the loss of step {number} is not finite ({listed(not_finite(values))}; images "
                f"{batch.image_ids}); --backend reference stops as the original does: lower --lr"
            )
        self.learner.begin(number, batches)
        self.learner.backward(total)
        self.learner.finish()
        if self.learner.updated:
            values["skipped"] = 0.0
        return dict(zip(values, torch.tensor([*values.values()]).unbind(), strict=True))
