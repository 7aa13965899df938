# SPDX-License-Identifier: Apache-2.0
"""One training step: forward, match, loss, backward and update; and one of inference."""

from typing import Any

import torch
from torch import Tensor

from detr_fast.criterion import SetCriterion, weighted_losses
from detr_fast.data.batch import ImageBatch
from detr_fast.engine.batch import Batch, model_input
from detr_fast.engine.compiled import CompiledModel, Forward
from detr_fast.engine.graphs import InferenceGraphs, Recorder, ShapeGraphs, StepGraphs
from detr_fast.engine.optim import Learner
from detr_fast.engine.precision import Precision
from detr_fast.matcher.packing import Targets


class TrainingStep:
    """Turns batches into updates.

    Nothing in here waits for the device: the host submits the work of a step and goes on.

    Args:
        learner (Learner): holds model and optimizer.
        criterion (SetCriterion): the losses.
        precision (Precision): of the forward pass.
        forward (Callable, optional): the learner's model in another form, for instance compiled.
        recorder (Recorder, optional): records the work of the device where shapes return; the
            learner has ``static_gradients`` then.
    """

    def __init__(
        self,
        learner: Learner,
        criterion: SetCriterion,
        precision: Precision,
        *,
        forward: Forward | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.learner, self.criterion, self.precision = learner, criterion, precision
        self.forward = forward or learner.model
        self.recorded = StepGraphs(self.forward_backward, recorder) if recorder else None

    def __call__(self, batch: Batch, number: int, batches: int) -> dict[str, Tensor]:
        """Learn from a batch.

        Args:
            batch (Batch): on the device.
            number (int): of the batch in its epoch.
            batches (int): of the epoch.

        Returns:
            dict[str, Tensor]: numbers for the log, 0-dim on the device; see `StepMetrics.add`.
        """
        learner = self.learner
        learner.begin(number, batches)
        values = (self.recorded or self.forward_backward)(batch.images, batch.targets)
        learner.finish()
        if learner.updated:
            values |= learner.outcome()
        return values

    def forward_backward(self, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        """The part of a step that is work of the device alone: all but the update.

        Args:
            images (ImageBatch): uint8, or normalised floats; on the device.
            targets (Targets): on the device.

        Returns:
            dict[str, Tensor]: losses and their terms, 0-dim.
        """
        images = model_input(images, self.precision.images)
        with self.precision.autocast():
            outputs = self.forward(images)
        losses = self.criterion(outputs, targets)
        total, terms = weighted_losses(losses, self.criterion.weight_dict)
        self.learner.backward(total)
        return {"class_error": losses["class_error"], "loss": total.detach(), **terms}


class InferenceStep:
    """Turns images into outputs of the model, without gradients.

    Args:
        forward (Callable): the model, or another form of it.
        precision (Precision): of the forward pass.
        recorder (Recorder, optional): records it where shapes return.
    """

    def __init__(
        self, forward: Forward, precision: Precision, *, recorder: Recorder | None = None
    ) -> None:
        self.forward, self.precision = forward, precision
        self.recorded = InferenceGraphs(self.outputs, recorder) if recorder else None

    def __call__(self, images: ImageBatch) -> dict[str, Any]:
        """Detect.

        Args:
            images (ImageBatch): uint8, or normalised floats; on the device.
        """
        return (self.recorded or self.outputs)(images)

    @torch.no_grad()
    def outputs(self, images: ImageBatch) -> dict[str, Any]:
        """The work of the device, unrecorded; see `__call__`."""
        with self.precision.autocast():
            return self.forward(model_input(images, self.precision.images))


def reports(*steps: Any) -> list[str]:
    """What compilations and graphs came to, a line for each; the reference step has none."""
    sources = [
        source
        for step in steps
        if isinstance(step, TrainingStep | InferenceStep)
        for source in (step.forward, step.recorded and step.recorded.graphs)
        if isinstance(source, CompiledModel | ShapeGraphs)
    ]
    return [line for source in dict.fromkeys(sources) if (line := source.report())]
