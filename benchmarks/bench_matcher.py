# SPDX-License-Identifier: Apache-2.0
"""From logits and boxes to matched indices, 16 images unless a name says otherwise.

``HungarianMatcher``: a layer at a time, to lists of pairs on the CPU, as the original DETR's loop
calls its matcher.  ``hungarian_match``: six layers at once to padded indices on the device, against
the best that torch and scipy give: costs of each image alone, one copy to the host, scipy.
"""

import functools

import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Missing, Setup, within
from benchmarks.problems import (
    WEIGHTS,
    original_match,
    random_batch,
    scipy_solver,
    torchvision_giou,
    total_costs,
)
from detr_fast import ops, reference
from detr_fast.matcher import HungarianMatcher

SIZES = [(100, 7), (300, 20), (900, 50)]
LAYERS = 6
SAME, TOTALS = within(), within(rtol=1e-6, atol=1e-5)
# what the issue of this op asks of a CPU, as ratios to the original at Q queries
FLOORS = {100: 10.0, 900: 150.0}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases; with `quick` the smallest of each kind."""
    result = []
    for queries, targets in SIZES[:1] if quick else SIZES:
        layers = LAYERS if queries < 900 else 1  # the original takes most of a second for each
        build = functools.partial(drop_in, device, layers, 16, queries, targets)
        name = f"HungarianMatcher {queries}x{targets}, {layers} layers"
        floors = {"DETR": FLOORS[queries]} if device.type == "cpu" and queries in FLOORS else {}
        result.append(Case(name, build, SAME, floors=floors))
        for kind in ("fresh", "trained"):
            build = functools.partial(fused, device, queries, targets, kind)
            name = f"hungarian_match {queries}x{targets}, {LAYERS} layers, {kind}"
            result.append(Case(name, build, TOTALS))
    for images in (1,) if quick else (1, 4, 64):
        build = functools.partial(drop_in, device, 1, images, 100, 7)
        floors = {"DETR": 1.0} if device.type == "cpu" else {}
        name = f"HungarianMatcher 100x7, 1 layer, {images} images"
        result.append(Case(name, build, SAME, floors=floors))
    return result


def test_matcher(case, bench):
    bench(case)


def drop_in(device: torch.device, layers: int, images: int, queries: int, targets: int) -> Setup:
    """Each layer's pairs, which have to be the very same."""
    batch = random_batch(device, layers, images, queries, targets, "fresh")
    outputs, listed = batch.outputs(), batch.targets.to_list()
    matcher = HungarianMatcher(*WEIGHTS)

    def original() -> list[list[tuple[Tensor, Tensor]]]:
        return [original_match(layer, listed) for layer in outputs]

    missing = [m for m in (torchvision_giou(), scipy_solver()) if isinstance(m, Missing)]
    with_reference = HungarianMatcher(*WEIGHTS)

    def expected() -> list[list[tuple[Tensor, Tensor]]]:
        with ops.use_reference():
            return [with_reference(layer, listed) for layer in outputs]

    return Setup(
        expected=expected,
        contenders={
            "detr_fast": Contender(lambda: [matcher(layer, listed) for layer in outputs]),
            "DETR": missing[0] if missing else Contender(original, waits=True),
        },
    )


def fused(device: torch.device, queries: int, targets: int, kind: str) -> Setup:
    """The total cost of each problem, which has to agree."""
    batch = random_batch(device, LAYERS, 16, queries, targets, kind)
    cost = batch.costs()
    count = batch.counts()

    def drained() -> Tensor:
        return reference.linear_sum_assignment(batch.costs().cpu(), count.cpu())

    def contender(run, **options: bool) -> Contender:
        def checked() -> Tensor:
            found = run()
            if isinstance(found, ops.Match):
                found = found.query_of_target.flatten(0, 1)
            return total_costs(cost, found.to(device))

        return Contender(run, checked, **options)

    match = functools.partial(ops.hungarian_match, *batch, WEIGHTS)
    missing = scipy_solver()
    return Setup(
        expected=lambda: total_costs(cost, drained().to(device)),
        contenders={
            "detr_fast": contender(match),
            "scipy's ties": contender(functools.partial(match, ties="scipy")),
            "cost image by image, scipy": missing
            if isinstance(missing, Missing)
            else contender(drained, waits=True),
        },
    )
