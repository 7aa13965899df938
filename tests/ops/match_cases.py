# SPDX-License-Identifier: Apache-2.0
"""Inputs of ``hungarian_match`` and what has to be equal of two matches."""

import torch
from torch.testing import assert_close

from detr_fast.data import Targets
from detr_fast.ops.matcher import ClassCost, CostWeights

DETR = CostWeights(1, 5, 2)
CLASS_COSTS = {
    "softmax": ClassCost(),
    "focal": ClassCost("focal"),
    "focal of other options": ClassCost("focal", 0.3, 1.5, 1e-6),
    "focal_logits": ClassCost("focal_logits"),
    "focal_logits of other options": ClassCost("focal_logits", 0.4, 0.5),
    "iou_aware": ClassCost("iou_aware", 4.0),
}


def random_boxes(*sizes, generator):
    """Centre and size, none without area."""
    draw = torch.rand(*sizes, 4, generator=generator, dtype=torch.float64)
    return torch.cat([draw[..., :2], 0.02 + draw[..., 2:] / 2], -1).float()


def random_case(counts, queries, layers=2, columns=11, seed=0, device="cpu", classes=None):
    """Logits (L, B, Q, C), boxes (L, B, Q, 4) and targets; their padding holds garbage.

    By default the last column is no class.
    """
    classes = columns - 1 if classes is None else classes
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, len(counts), queries, columns, generator=g)
    boxes = random_boxes(layers, len(counts), queries, generator=g)
    targets = Targets.from_list(
        [
            {
                "labels": torch.randint(classes, (n,), generator=g),
                "boxes": random_boxes(n, generator=g),
            }
            for n in counts
        ]
    )
    for image, n in enumerate(counts):
        targets.labels[image, n:] = -7
        targets.boxes[image, n:] = torch.nan
    return logits.to(device), boxes.to(device), targets.to(device)


def assert_same_match(ours, theirs):
    """Equal indices and statuses; costs up to the rounding of their terms and of the sum."""
    for name in ("query_of_target", "target_of_query", "status"):
        assert_close(getattr(ours, name), getattr(theirs, name))
    assert ours.cost.dtype == theirs.cost.dtype
    assert_close(ours.cost, theirs.cost, rtol=1e-5, atol=1e-5)
    assert ours.sizes == theirs.sizes
