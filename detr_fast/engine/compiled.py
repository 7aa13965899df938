# SPDX-License-Identifier: Apache-2.0
"""``torch.compile`` of the model: one graph without a break, few compilations, no silent fallback.

Height and width are symbols in the graphs that torch traces, so that buckets share them: one is due
for training and for evaluation, each with and without padding. Inductor may make a number of a
width when it lowers the backward pass of convolutions; the budget bounds what that comes to.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import TorchDynamoException

from detr_fast.config import Config, UsageError
from detr_fast.data.batch import ImageBatch
from detr_fast.engine.log import say

Forward: TypeAlias = Callable[[ImageBatch], dict[str, Any]]

VARIANTS = 4  # training and evaluation, each with and without padding
# of a variant: full batches, the last one of a data set, and grids that torch treats apart: with as
# many cells as there are queries, or of a single row or column
GRAPHS_OF_A_VARIANT = 4
LEAST_CAPABILITY = (7, 0)  # of Triton
# the model is channels_last; unless Inductor may lay it out so, its backward pass of
# convolutions makes numbers of sizes (another place still makes one of a stride)
INDUCTOR = {"force_layout_optimization": True}


class CompiledModel:
    """A model, compiled when it is called; takes and returns what the model does.

    The model itself stays as it is: its state dict, copies and calls know nothing of this. Weights
    may be changed in place. Dropout draws other random numbers than uncompiled, from the same
    generator.

    Args:
        model (nn.Module): takes an ImageBatch.
        backend (str): of ``torch.compile``.
        budget (int): most graphs; an input that needs another then runs uncompiled, with a warning.
        required (bool): whether a failed compilation is an error; else the model runs uncompiled,
            with a warning.

    Attributes:
        compilations (int): graphs compiled so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backend: str = "inductor",
        budget: int = VARIANTS * GRAPHS_OF_A_VARIANT,
        required: bool = True,
    ) -> None:
        self.model, self.budget, self.required = model, budget, required
        self.compilations = 0
        self._backend = backend
        self._call: Forward = torch.compile(model, backend=self._compile, fullgraph=True)
        self._ran_compiled = self._warned = False

    def __call__(self, images: ImageBatch) -> dict[str, Any]:
        """Run the model."""
        if self._call is self.model:
            return self.model(images)
        for dim in (2, 3):
            torch._dynamo.maybe_mark_dynamic(images.tensors, dim)
        full = self.compilations >= self.budget
        self._ran_compiled = False
        try:
            with self._no_more() if full else self._without_limit():
                outputs = self._call(images)
        except TorchDynamoException as error:
            if self.required:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(f"warning: torch.compile failed, the model runs uncompiled: {reason}")
            self._call = self.model
            return self.model(images)
        if not (self._ran_compiled or self._warned):
            self._warned = True
            say(
                f"warning: --compile: all {self.budget} graphs of the model are made, and images "
                f"of shape {tuple(images.tensors.shape)} need another one: from here on such run "
                "uncompiled. Fewer shapes help (a larger --bucket), or --compile off"
            )
        return outputs

    def report(self) -> str:
        """The number of compilations, in a line; empty without any."""
        count = self.compilations
        return f"torch.compile: {count} graphs of the model so far" if count else ""

    @staticmethod
    def _no_more() -> AbstractContextManager[Any]:
        return torch.compiler.set_stance("eager_on_recompile")

    @staticmethod
    def _without_limit() -> AbstractContextManager[Any]:
        # torch's own limit is per class, for all models of the process, and 8
        return torch._dynamo.config.patch(recompile_limit=1 << 16)

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.compilations += 1
        options = {"config_patches": INDUCTOR} if self._backend == "inductor" else {}
        compiled = lookup_backend(self._backend)(graph, inputs, **options)

        def run(*args: Any) -> Any:
            self._ran_compiled = True
            return compiled(*args)

        return run


def why_not_compiled(device: torch.device) -> str:
    """Why torch.compile has no means to work on a device; nothing where it has."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "triton is not installed"
        found = torch.cuda.get_device_capability(device)
        if found < LEAST_CAPABILITY:
            least, found = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, found))
            return f"compute capability {found}, Triton needs {least}"
        compilers = [os.environ.get("CC"), "cc", "gcc", "clang"]
    elif device.type == "cpu":
        compilers = [os.environ.get("CXX") or "g++"]
    else:
        return f"not used on {device.type}"
    if not any(map(shutil.which, filter(None, compilers))):
        return f"no C compiler: {' or '.join(filter(None, compilers))} is not on the PATH"
    return ""


def compiler_of(config: Config, device: torch.device) -> Callable[[nn.Module], Forward]:
    """What makes the callable form of a model: compiled where ``--compile`` asks for it.

    Raises:
        UsageError: if it is asked for by name and cannot be had.
    """
    # an evaluation alone is over before a compilation pays
    auto = config.compile == "auto" and device.type == "cuda" and not config.eval
    if config.backend == "reference" or not (auto or config.compile == "on"):
        return lambda model: model
    if reason := why_not_compiled(device):
        if not auto:
            raise UsageError(f"--compile on: {reason}; leave the flag out")
        say(f"the model runs uncompiled: {reason}")
        return lambda model: model
    return lambda model: CompiledModel(model, required=not auto)
