# SPDX-License-Identifier: Apache-2.0
"""Losses of 16 images and, unless a name says otherwise, six decoder layers, forward and backward.

``step``: matching, losses and weighted sum, all that a training step computes between the model and
its backward: :class:`SetCriterion`, and the two ops alone, against the original DETR's expressions
and transformers.  ``set_loss``: the losses alone where the match is known, against the reference
twin, eager and compiled.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.harness import (
    Case,
    Contender,
    Missing,
    Setup,
    compiled,
    on_cpu,
    optional,
    within_norm,
)
from benchmarks.original import missing_for_original, original_losses, original_total
from benchmarks.problems import CLASSES, WEIGHTS, Batch, random_batch
from detr_fast import ops, reference
from detr_fast.criterion import SetCriterion, loss_weights, weighted_losses
from detr_fast.matcher import HungarianMatcher
from detr_fast.ops.criterion import ClassLoss

SIZES = [(100, 7), (300, 20), (900, 50)]
LAYERS, IMAGES, NO_OBJECT = 6, 16, 0.1
LOSSES = ["labels", "boxes", "cardinality"]
KINDS = {
    "cross_entropy": ClassLoss(),
    "focal": ClassLoss("focal"),
    "varifocal": ClassLoss("varifocal", 0.75),
}
# what a CPU has to reach, as ratios to the peers
STEP_FLOORS = {100: {"DETR": 5.0}, 300: {"DETR": 14.0}, 900: {"DETR": 70.0}}
LOSS_FLOORS = {"reference": 1.2}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases; with `quick` the smallest of each kind."""
    result = []
    for queries, targets in SIZES[:1] if quick else SIZES:
        layers = LAYERS if queries < 900 else 1  # the original takes a second for each
        build = functools.partial(step, device, layers, queries, targets)
        name = f"step {queries}x{targets}" + (", 1 layer" if layers == 1 else "")
        floors, moved = on_cpu(device, STEP_FLOORS[queries]), size(layers, queries)
        result.append(Case(name, build, agree, moved, floors=floors, count_ops=True))
    shapes = [(size, LAYERS, "cross_entropy") for size in SIZES]
    shapes += [(SIZES[1], LAYERS, kind) for kind in KINDS if kind != "cross_entropy"]
    shapes += [(SIZES[0], 1, "cross_entropy")]
    for (queries, targets), layers, kind in shapes[:1] if quick else shapes:
        build = functools.partial(losses, device, layers, queries, targets, kind)
        name = f"set_loss {queries}x{targets}, {kind}" + (", 1 layer" if layers == 1 else "")
        floors, moved = on_cpu(device, LOSS_FLOORS), size(layers, queries)
        result.append(Case(name, build, agree, moved, floors=floors, count_ops=True))
    return result


def size(layers: int, queries: int) -> int:
    """Bytes of logits and boxes, and of their gradients."""
    return 2 * 4 * layers * IMAGES * queries * (CLASSES + 1 + 4)


def agree(actual: Any, expected: Any) -> None:
    """Losses one by one, gradients as tensors."""
    (losses, gradients), (of_losses, of_gradients) = actual, expected
    # compiled sums of cross-entropy are off by 3e-5
    assert_close(losses, {name: of_losses[name] for name in losses}, rtol=1e-4, atol=1e-5)
    within_norm(1e-4)(gradients, of_gradients)


def test_criterion(case, bench):
    bench(case)


def leaves_of(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and boxes of each layer, which collect gradients."""
    logits, boxes = ([x.requires_grad_() for x in side.unbind()] for side in batch[:2])
    return logits, boxes


def step(device: torch.device, layers: int, queries: int, targets: int) -> Setup:
    """All losses, and the gradients of their weighted sum."""
    batch = random_batch(device, layers, IMAGES, queries, targets, "fresh")
    logits, boxes = leaves_of(batch)
    listed = batch.targets.to_list()
    weights = loss_weights(layers)
    criterion = SetCriterion(CLASSES, HungarianMatcher(*WEIGHTS), weights, NO_OBJECT, LOSSES)
    criterion.to(device)
    of_layers = [{"pred_logits": x, "pred_boxes": b} for x, b in zip(logits, boxes, strict=True)]
    outputs = of_layers[-1] | {"aux_outputs": of_layers[:-1]}

    def gradients(total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, [*logits, *boxes]))

    def ours(of_images: Any) -> Any:
        found = criterion(outputs, of_images)
        return found, gradients(weighted_losses(found, weights)[0])

    factors = torch.tensor([WEIGHTS.cost_class, WEIGHTS.cost_bbox, WEIGHTS.cost_giou, 0, 0])
    factors = factors.to(device, torch.float32)

    def by_ops() -> Any:
        match = ops.hungarian_match(logits, boxes, batch.targets, WEIGHTS)
        table = ops.set_loss(
            logits, boxes, batch.targets, match, class_weight=criterion.empty_weight
        )
        names = dict(zip(("loss_ce", "loss_bbox", "loss_giou"), table[-1].detach(), strict=False))
        return names, gradients((table * factors).sum())

    def original() -> Any:
        found = original_losses(of_layers, listed, criterion.empty_weight)
        return found, gradients(original_total(found, weights))

    def expected() -> Any:
        with ops.use_reference():
            return ours(batch.targets)

    return Setup(
        expected,
        {
            "SetCriterion": Contender(lambda: ours(batch.targets)),
            "with a list of targets": Contender(lambda: ours(listed)),
            "ops alone": Contender(by_ops),
            "DETR": missing_for_original() or Contender(original, waits=True),
            "transformers": transformers_loss(logits, boxes, listed, gradients),
        },
    )


def transformers_loss(
    logits: list[Tensor], boxes: list[Tensor], targets: list[dict[str, Tensor]], gradients: Any
) -> Contender | Missing:
    """``ForObjectDetectionLoss``, as a DETR of transformers calls it."""
    module = optional("transformers.loss.loss_for_object_detection")
    if isinstance(module, Missing):
        return module
    if logits[0].shape[1] > 300:
        return Missing("left out: takes as long as DETR")
    config = SimpleNamespace(
        class_cost=WEIGHTS.cost_class,
        bbox_cost=WEIGHTS.cost_bbox,
        giou_cost=WEIGHTS.cost_giou,
        num_labels=CLASSES,
        eos_coefficient=NO_OBJECT,
        auxiliary_loss=True,
        decoder_layers=len(logits),
        bbox_loss_coefficient=WEIGHTS.cost_bbox,
        giou_loss_coefficient=WEIGHTS.cost_giou,
    )
    renamed = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    device = logits[0].device

    def run() -> Any:
        total, found, _ = module.ForObjectDetectionLoss(
            *(logits[-1], renamed, device, boxes[-1], config),
            outputs_class=logits,
            outputs_coord=boxes,
        )
        return found, gradients(total)

    return Contender(run, waits=True)


def losses(device: torch.device, layers: int, queries: int, targets: int, kind: str) -> Setup:
    """The table of losses, and the gradients of a weighted sum of it."""
    batch = random_batch(device, layers, IMAGES, queries, targets, "trained")
    logits, boxes = leaves_of(batch)
    match = ops.hungarian_match(*batch, WEIGHTS).target_of_query
    weight = torch.ones(CLASSES + 1, device=device)
    weight[-1] = NO_OBJECT
    options = {"class_loss": KINDS[kind]}
    if kind == "cross_entropy":
        options["class_weight"] = weight
    factors = torch.tensor([1.0, 5, 2, 0, 0], device=device)

    def contender(compute: Any) -> Any:
        table = compute(logits, boxes, batch.targets, match, **options)
        gradients = torch.autograd.grad((table * factors).sum(), [*logits, *boxes])
        return {"table": table.detach()}, list(gradients)

    twin: Contender | Missing = Missing("left out: takes a minute to compile six layers")
    if layers == 1:
        run = functools.partial(contender, compiled(reference.set_loss))
        twin = Contender(run, slow_start=True)
    return Setup(
        functools.partial(contender, reference.set_loss),
        {
            "detr_fast": Contender(functools.partial(contender, ops.set_loss)),
            "reference": Contender(functools.partial(contender, reference.set_loss)),
            "torch.compile": twin,
        },
    )
