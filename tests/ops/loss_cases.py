# SPDX-License-Identifier: Apache-2.0
"""Inputs of ``set_loss``, and losses and gradients of a call."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.data import Targets
from detr_fast.ops.criterion import ClassLoss
from tests.ops.match_cases import random_case

CLASS_LOSSES = {
    "cross_entropy": ClassLoss(),
    "focal": ClassLoss("focal"),
    "focal of other options": ClassLoss("focal", 0.6, 1.5),
    "focal without balance": ClassLoss("focal", -1.0, 2.0),
    "focal without focus": ClassLoss("focal", 0.5, 0.0),
    "varifocal": ClassLoss("varifocal", 0.75),
    "varifocal of other options": ClassLoss("varifocal", 0.3, 1.2),
}
CROSS_ENTROPY, FOCAL, VARIFOCAL = (
    CLASS_LOSSES[name] for name in ("cross_entropy", "focal", "varifocal")
)
KINDS = pytest.mark.parametrize(
    "class_loss", [CROSS_ENTROPY, FOCAL, VARIFOCAL], ids=lambda loss: loss.kind
)


class LossCase(NamedTuple):
    """Arguments of ``set_loss``; layers are a list or stacked."""

    logits: Any
    boxes: Any
    targets: Targets
    match: Any
    options: dict

    def to(self, dtype):
        """All numbers in another type."""

        def convert(value):
            if isinstance(value, list):
                return [convert(v) for v in value]
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        return self._replace(
            logits=convert(self.logits),
            boxes=convert(self.boxes),
            targets=replace(self.targets, boxes=convert(self.targets.boxes)),
            options={name: convert(value) for name, value in self.options.items()},
        )


def random_match(targets, layers, queries, seed=0):
    """``target_of_query`` (L, B, Q): all targets, or as many as there are queries, at random."""
    g = torch.Generator().manual_seed(seed)
    found = torch.full((layers, len(targets), queries), -1)
    for layer in found:
        for row, n in zip(layer, targets.count_host, strict=True):
            pairs = min(n, queries)
            row[torch.randperm(queries, generator=g)[:pairs]] = torch.randperm(n, generator=g)[
                :pairs
            ]
    return found.to(targets.labels.device)


def loss_case(
    counts,
    queries,
    columns=11,
    class_loss=CROSS_ENTROPY,
    *,
    layers=2,
    seed=0,
    device="cpu",
    **options,
):
    """A case of stacked layers; queries are matched at random."""
    classes = max(1, columns - (class_loss.kind == "cross_entropy"))
    case = random_case(counts, queries, layers, columns, seed, device, classes)
    match = random_match(case[2], layers, queries, seed)
    return LossCase(*case, match, {"class_loss": class_loss, **options})


class Outcome(NamedTuple):
    """Losses (L, 5), and the gradients of the logits and of the boxes of each layer."""

    losses: torch.Tensor
    logits: list
    boxes: list


def loss_weights(losses):
    """(L, 5), no two alike."""
    weights = torch.linspace(0.3, 1.7, losses.numel(), dtype=torch.float64)
    return weights.view(losses.shape).to(losses)


def run(op, case, weigh=None):
    """Losses, and the gradients of their sum, in which each of them has a weight of its own."""
    leaves = []

    def leaf(value):
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    logits, boxes = (
        leaf(layers) if isinstance(layers, torch.Tensor) else [leaf(layer) for layer in layers]
        for layers in case[:2]
    )
    losses = op(logits, boxes, case.targets, case.match, **case.options)
    weights = loss_weights(losses)
    grads = torch.autograd.grad(losses, leaves, weigh(weights) if weigh else weights)
    of_logits, of_boxes = grads[: len(grads) // 2], grads[len(grads) // 2 :]
    if isinstance(case.logits, torch.Tensor):
        of_logits, of_boxes = of_logits[0].unbind(), of_boxes[0].unbind()
    return Outcome(losses.detach(), list(of_logits), list(of_boxes))


def assert_near(ours, theirs, rtol=1e-6):
    """Each loss relative to itself, each gradient relative to the largest one of its layer.

    Gradients of logits are also compared one by one, to ten times that: what is small is not lost
    (but for p - 1).  Those of boxes are sums of terms of opposite signs.
    """
    options = {"check_dtype": False, "equal_nan": True}
    assert_close(ours.losses, theirs.losses, rtol=rtol, atol=0, **options)
    for side in ("logits", "boxes"):
        for mine, their in zip(getattr(ours, side), getattr(theirs, side), strict=True):
            finite = their[their.isfinite()].abs()
            largest = finite.amax().item() if finite.numel() else 0
            assert_close(mine, their, rtol=0, atol=rtol * largest, **options)
            if side == "logits":
                assert_close(mine, their, rtol=10 * rtol, atol=rtol / 4 * largest, **options)


def expected(case):
    """By the reference twin, in float64 of the very same numbers."""
    return run(reference.set_loss, case.to(torch.float64))


def assert_equals_reference(case, rtol=1e-6):
    ours = run(ops.set_loss, case)
    assert_near(ours, expected(case), rtol)
    return ours
