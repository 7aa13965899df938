# SPDX-License-Identifier: Apache-2.0
"""From logits and boxes to matched indices, 16 images unless a name says otherwise.

``HungarianMatcher``: a layer at a time, to lists of pairs on the CPU, as the original DETR's loop
calls its matcher.  ``hungarian_match``: six layers at once to padded indices on the device, against
the best that torch and scipy give: costs of each image alone, one copy to the host, scipy.
"""

import functools

import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Missing, Setup, on_cpu, optional, within
from benchmarks.original import missing_for_original, original_match
from benchmarks.problems import WEIGHTS, random_batch, scipy_solver, total_costs
from detr_fast import ops, reference
from detr_fast.matcher import HungarianMatcher
from detr_fast.matcher.rfdetr import HungarianMatcher as RFDetrMatcher

SIZES = [(100, 7), (300, 20), (900, 50)]
CROWDED = (300, 100)  # many small objects in every image
KINDS = ["fresh", "trained", "collapsed"]
LAYERS = 6
DRAINED = "cost image by image, scipy"
SAME, TOTALS = within(), within(rtol=1e-6, atol=1e-5)
# what a CPU has to reach, as ratios to the original DETR's matcher and to the drained costs
DROP_IN_FLOORS = {100: {"DETR": 10.0}, 900: {"DETR": 150.0}}
FUSED_FLOORS = {300: {DRAINED: 1.5}, 900: {DRAINED: 1.5}}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases; with `quick` the smallest of each kind."""
    result = []
    for queries, targets in SIZES[:1] if quick else SIZES:
        layers = LAYERS if queries < 900 else 1  # the original takes most of a second for each
        build = functools.partial(drop_in, device, layers, 16, queries, targets)
        name = f"HungarianMatcher {queries}x{targets}, {layers} layers"
        floors = on_cpu(device, DROP_IN_FLOORS.get(queries))
        result.append(Case(name, build, SAME, floors=floors))
    for images in (1,) if quick else (1, 4, 64):
        build = functools.partial(drop_in, device, 1, images, 100, 7)
        name = f"HungarianMatcher 100x7, 1 layer, {images} images"
        result.append(Case(name, build, SAME, floors=on_cpu(device, {"DETR": 1.0})))
    shapes = [(size, kind) for size in SIZES for kind in KINDS] + [(CROWDED, "fresh")]
    for (queries, targets), kind in shapes[:1] if quick else shapes:
        build = functools.partial(fused, device, queries, targets, kind)
        name = f"hungarian_match {queries}x{targets}, {LAYERS} layers, {kind}"
        floors = on_cpu(device, FUSED_FLOORS.get(queries))
        result.append(Case(name, build, TOTALS, floors=floors))
    if not quick:
        build = functools.partial(rf_detr, device, 300, 7, 13)
        result.append(Case("RF-DETR's matcher 3900x7, 13 groups, 1 layer", build, SAME))
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

    with_reference = HungarianMatcher(*WEIGHTS)

    def expected() -> list[list[tuple[Tensor, Tensor]]]:
        with ops.use_reference():
            return [with_reference(layer, listed) for layer in outputs]

    return Setup(
        expected=expected,
        contenders={
            "detr_fast": Contender(lambda: [matcher(layer, listed) for layer in outputs]),
            "DETR": missing_for_original() or Contender(original, waits=True),
        },
    )


def fused(device: torch.device, queries: int, targets: int, kind: str) -> Setup:
    """The total cost of each problem, which has to agree."""
    batch = random_batch(device, LAYERS, 16, queries, targets, kind)
    cost, count = batch.costs(), batch.counts()
    scipy = scipy_solver()

    def drained() -> Tensor:  # nothing is computed for padding or for another image's targets
        parts = [batch.image_costs(image) for image in range(len(batch.targets))]
        host = torch.cat([part.flatten() for part in parts]).cpu().split([p.numel() for p in parts])
        found = torch.full((LAYERS, len(parts), batch.targets.labels.shape[1]), -1)
        for image, (values, part) in enumerate(zip(host, parts, strict=True)):
            for layer, problem in enumerate(values.view(part.shape).numpy()):
                queries, targets = scipy(problem)
                found[layer, image, torch.from_numpy(targets)] = torch.from_numpy(queries)
        return found.flatten(0, 1).to(device)

    def contender(run, **options: bool) -> Contender:
        def checked() -> Tensor:
            found = run()
            if isinstance(found, ops.Match):
                found = found.query_of_target.flatten(0, 1)
            return total_costs(cost, found)

        return Contender(run, checked, **options)

    match = functools.partial(ops.hungarian_match, *batch, WEIGHTS)
    return Setup(
        expected=lambda: total_costs(cost, reference.linear_sum_assignment(cost, count)),
        contenders={
            "detr_fast": contender(match),
            "scipy's ties": contender(functools.partial(match, ties="scipy")),
            DRAINED: scipy if isinstance(scipy, Missing) else contender(drained, waits=True),
        },
    )


def rf_detr(device: torch.device, queries: int, targets: int, groups: int) -> Setup:
    """RF-DETR's focal matcher over its query groups of one layer."""
    batch = random_batch(device, 1, 16, queries * groups, targets, "fresh")
    outputs, listed = batch.outputs()[0], batch.targets.to_list()
    options = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2, "focal_alpha": 0.25}
    ours = RFDetrMatcher(**options)
    module = optional("rfdetr.models.matcher")
    if isinstance(module, Missing):
        peer: Contender | Missing = module
    else:
        original = module.HungarianMatcher(**options)
        peer = Contender(lambda: original(outputs, listed, group_detr=groups), waits=True)

    def expected() -> list[tuple[Tensor, Tensor]]:
        with ops.use_reference():
            return ours(outputs, listed, group_detr=groups)

    def run() -> list[tuple[Tensor, Tensor]]:
        return ours(outputs, listed, group_detr=groups)

    return Setup(expected, {"detr_fast": Contender(run), "rfdetr": peer})
