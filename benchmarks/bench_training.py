# SPDX-License-Identifier: Apache-2.0
"""A whole training step of the small model: forward, losses, backward, clipping and update.

The contenders differ in what follows the model alone: :class:`SetCriterion`, or the original DETR's
matching and losses.  ``default run`` has the sizes of ``tools/train.py`` without flags.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.harness import Case, Contender, Setup, on_cpu
from benchmarks.original import missing_for_original, original_losses, original_total
from benchmarks.problems import WEIGHTS
from detr_fast import HungarianMatcher, SetCriterion, Targets, detr_tiny, ops
from detr_fast.criterion import loss_weights, weighted_losses

NO_OBJECT, CLASSES, LAYERS = 0.1, 4, 2
LOSSES = ["labels", "boxes", "cardinality"]
# name, images, their side in pixels, queries, targets of an image, floor of the ratio on a CPU
STEPS = [
    ("default run", 32, 128, 16, 3, None),
    ("300 queries", 16, 128, 300, 20, {"DETR's criterion": 1.3}),
]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases; with `quick` the first."""
    return [
        Case(
            f"step, {name}: {images} images, {queries}x{targets}",
            functools.partial(step, device, images, side, queries, targets),
            agree,
            floors=on_cpu(device, floors),
            count_ops=True,
        )
        for name, images, side, queries, targets, floors in (STEPS[:1] if quick else STEPS)
    ]


def agree(actual: Any, expected: Any) -> None:
    """Losses one by one, and the norm of the gradient."""
    (losses, norm), (of_losses, of_norm) = actual, expected
    assert_close(losses, {name: of_losses[name] for name in losses}, rtol=1e-4, atol=1e-5)
    assert_close(norm, of_norm, rtol=1e-3, atol=0)


def test_training(case, bench):
    bench(case)


def step(device: torch.device, images: int, side: int, queries: int, targets: int) -> Setup:
    """The losses of a step and the norm of its gradient."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = detr_tiny(num_queries=queries).to(device).train()
    # the update costs what it costs, and every step starts from the same weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    batch = torch.randn(images, 3, side, side, generator=generator).to(device)
    listed = [
        {
            "labels": torch.randint(CLASSES, (targets,), generator=generator),
            "boxes": 0.2 + 0.6 * torch.rand(targets, 4, generator=generator),
        }
        for _ in range(images)
    ]
    packed = Targets.from_list(listed).to(device)
    listed = [{name: value.to(device) for name, value in t.items()} for t in listed]
    weights = loss_weights(LAYERS)
    criterion = SetCriterion(CLASSES, HungarianMatcher(*WEIGHTS), weights, NO_OBJECT, LOSSES)
    criterion.to(device)

    def train(losses_of: Any) -> tuple[dict[str, Tensor], Tensor]:
        losses, total = losses_of(model(batch))
        optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return {name: value.detach() for name, value in losses.items()}, norm

    def ours(outputs: Any) -> Any:
        losses = criterion(outputs, packed)
        return losses, weighted_losses(losses, weights)[0]

    def original(outputs: Any) -> Any:
        layers = [*outputs["aux_outputs"], outputs]
        losses = original_losses(layers, listed, criterion.empty_weight)
        return losses, original_total(losses, weights)

    def expected() -> Any:
        with ops.use_reference():
            return train(ours)

    return Setup(
        expected,
        {
            "detr_fast": Contender(lambda: train(ours)),
            "DETR's criterion": missing_for_original()
            or Contender(lambda: train(original), waits=True),
        },
    )
