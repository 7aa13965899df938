# SPDX-License-Identifier: Apache-2.0
"""Predictions and targets for the benchmarks of matching and losses.

Numbers of targets vary from image to image as in COCO: most images have few, some have many.  A
``fresh`` model predicts at random, a ``trained`` one has a query close to each target, and the
queries of a ``collapsed`` one all predict nearly the same.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Missing, optional
from detr_fast import ops
from detr_fast.data import Targets
from detr_fast.reference.matcher import matching_cost, matching_cost_terms

CLASSES = 91
WEIGHTS = ops.CostWeights(cost_class=1, cost_bbox=5, cost_giou=2)


class Batch(NamedTuple):
    """Predictions of L layers for B images, and their targets."""

    logits: Tensor  # (L, B, Q, CLASSES + 1)
    boxes: Tensor  # (L, B, Q, 4)
    targets: Targets

    def outputs(self) -> list[dict[str, Tensor]]:
        """Each layer as a DETR hands it to its matcher."""
        layers = zip(self.logits, self.boxes, strict=True)
        return [{"pred_logits": x, "pred_boxes": b} for x, b in layers]

    def costs(self) -> Tensor:
        """(L * B, Q, T), by the reference twin."""
        labels, boxes = self.targets.labels, self.targets.boxes
        of_layer = [
            matching_cost_terms(x, b, labels, boxes, WEIGHTS)
            for x, b in zip(self.logits, self.boxes, strict=True)
        ]
        return torch.cat([matching_cost(terms, WEIGHTS, None) for terms in of_layer])

    def image_costs(self, image: int) -> Tensor:
        """(L, Q, n) of one image with n targets, by the reference twin."""
        n, layers = self.targets.count_host[image], len(self.logits)
        labels, boxes = self.targets.labels[image, :n], self.targets.boxes[image, :n]
        terms = matching_cost_terms(
            self.logits[:, image],
            self.boxes[:, image],
            labels.expand(layers, n),
            boxes.expand(layers, n, 4),
            WEIGHTS,
        )
        return matching_cost(terms, WEIGHTS, None)

    def counts(self) -> Tensor:
        """(L * B,), targets of each problem."""
        return self.targets.count.repeat(len(self.logits))


def random_batch(
    device: torch.device, layers: int, images: int, queries: int, targets: int, kind: str
) -> Batch:
    """A batch with `targets` targets an image on average."""
    generator = torch.Generator().manual_seed(queries + targets)
    draw = functools.partial(torch.rand, generator=generator)
    spread = -torch.log1p(-draw(images))  # exponential
    counts = (targets * spread / spread.mean()).round().clamp(1, 3 * targets).long().tolist()
    listed = [
        {
            "labels": torch.randint(CLASSES, (n,), generator=generator),
            "boxes": 0.05 + 0.4 * draw(n, 4),
        }
        for n in counts
    ]
    packed = Targets.from_list(listed)
    logits = torch.randn(layers, images, queries, CLASSES + 1, generator=generator)
    boxes = 0.05 + 0.9 * draw(layers, images, queries, 4)
    if kind == "collapsed":
        logits = logits[:, :, :1] + 1e-3 * logits
        boxes = boxes[:, :, :1] + 1e-3 * boxes
    if kind == "trained":
        order = draw(images, queries).argsort(1)
        for image, target in enumerate(listed):
            n = min(queries, counts[image])
            found = order[image, :n]
            noise = 0.01 * torch.randn(layers, n, 4, generator=generator)
            boxes[:, image, found] = (target["boxes"][:n] + noise).clamp(min=0.01)
            logits[:, image, found, target["labels"][:n]] += 8
    return Batch(logits.to(device), boxes.to(device), packed.to(device))


def total_costs(cost: Tensor, query_of_target: Tensor) -> Tensor:
    """(P, Q, T), (P, T) -> (P,): what an assignment costs, added up in float64."""
    picked = cost.double().gather(1, query_of_target.clamp(min=0)[:, None])[:, 0]
    return picked.masked_fill(query_of_target < 0, 0).sum(1)


def scipy_solver() -> Any:
    """``scipy.optimize.linear_sum_assignment``, or why it is missing."""
    scipy = optional("scipy.optimize")
    return scipy if isinstance(scipy, Missing) else scipy.linear_sum_assignment
