# SPDX-License-Identifier: Apache-2.0
"""What ``--backend`` chooses, and with the fast one precision, compilation and CUDA graphs.

``reference`` stands for the original loop, in benchmarks and in comparisons of AP. Besides what is
chosen here its model is built with ``folded=False`` (frozen batch norm behind its convolution,
``nn.MultiheadAttention`` with default arguments, NCHW), and its flags are those of
`detr_fast.config.REFERENCE_FLAGS` (float32, official padding, nothing compiled, no graphs).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from detr_fast.config import Config
from detr_fast.criterion import SetCriterion
from detr_fast.engine.compiled import Forward, compiler_of
from detr_fast.engine.graphs import Recorder, recorder_of
from detr_fast.engine.host_memory import keep_freed_memory
from detr_fast.engine.log import say
from detr_fast.engine.optim import Learner
from detr_fast.engine.precision import Precision
from detr_fast.engine.reference import ReferenceLearner, ReferenceStep
from detr_fast.engine.step import InferenceStep, TrainingStep
from detr_fast.ops import use_reference


def chosen_ops(config: Config) -> AbstractContextManager[None]:
    """Within this context the ops are those of ``--backend``."""
    return use_reference() if config.backend == "reference" else nullcontext()


@dataclass(frozen=True)
class Execution:
    """How a device trains and evaluates, as the flags say.

    Attributes:
        config (Config): the flags.
        device (torch.device): where the model is.
        training, evaluation (Precision): of the forward pass.
        compiler (Callable): makes the callable form of a model.
        recorder (Recorder | None): of CUDA graphs.
    """

    config: Config
    device: torch.device
    training: Precision
    evaluation: Precision
    compiler: Callable[[nn.Module], Forward]
    recorder: Recorder | None

    @classmethod
    def of(cls, config: Config, device: torch.device) -> "Execution":
        """What the flags ask for, and say in which precision that is.

        Raises:
            UsageError: if the device cannot do what is asked for by name.
        """
        training, evaluation = (Precision.of(config, device, training=t) for t in (True, False))
        say(f"precision: {evaluation if config.eval else f'{training}; evaluation: {evaluation}'}")
        if device.type == "cpu" and config.backend == "fast":
            keep_freed_memory()
        compiler, recorder = compiler_of(config, device), recorder_of(config, device)
        return cls(config, device, training, evaluation, compiler, recorder)

    def training_step(
        self, model: nn.Module, criterion: SetCriterion
    ) -> TrainingStep | ReferenceStep:
        """The step of ``--backend``, with a learner of its kind.

        Args:
            model (nn.Module): what learns, on its device and with its weights.
            criterion (SetCriterion): the losses.
        """
        if self.config.backend == "reference":
            return ReferenceStep(ReferenceLearner(model, self.config), criterion)
        learner = Learner(
            model,
            self.config,
            scaled=self.training.scales_loss,
            static_gradients=self.recorder is not None,
        )
        forward = self.compiler(model)
        return TrainingStep(
            learner, criterion, self.training, forward=forward, recorder=self.recorder
        )

    def inference(
        self, model: nn.Module, step: TrainingStep | ReferenceStep | None = None
    ) -> InferenceStep:
        """What evaluates a model.

        Args:
            model (nn.Module): on its device.
            step (TrainingStep, optional): if it trains this very model, what it compiled serves
                both.
        """
        shared = isinstance(step, TrainingStep) and step.learner.model is model
        forward = step.forward if shared else self.compiler(model)
        return InferenceStep(forward, self.evaluation, recorder=self.recorder)
