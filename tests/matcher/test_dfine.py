# SPDX-License-Identifier: Apache-2.0
"""D-FINE and DEIM: non-finite costs, repeated matching, the IoU-aware cost, the union of layers."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast.matcher.dfine import HungarianMatcher, get_go_indices
from tests.matcher.published import (
    corners,
    focal_cost,
    published_cost,
    random_batch,
    softmax_cost,
    solve,
)

pytest.importorskip("scipy")
DICT = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}


def differ(pairs, others):
    """Whether the queries of any image do."""
    return any(not torch.equal(a, b) for (a, _), (b, _) in zip(pairs, others, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("focal", [False, True])
def test_costs_that_are_not_finite_are_replaced(value, focal):
    """NaN counts 1, cheaper than many; infinity the largest float32 of its sign."""
    changed = 0
    for seed in range(10):
        outputs, targets = random_batch([7, 30], 20, 9, seed)
        before = HungarianMatcher(DICT, focal)(outputs, targets)
        outputs["pred_boxes"][0, ::3, 0] = value
        outputs["pred_logits"][1, 4] = value
        cost = published_cost(
            outputs, targets, *DICT.values(), focal_cost() if focal else softmax_cost
        )
        expected = solve(cost.nan_to_num(nan=1.0), targets)
        found = HungarianMatcher(DICT, focal)(outputs, targets)["indices"]
        assert_close(found, expected)
        changed += differ(found, before["indices"])
    assert changed


@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("power", [1.0, 4.0])
def test_the_iou_aware_cost_starts_at_its_epoch(focal, power):
    def expected(outputs, targets):
        logits = outputs["pred_logits"].flatten(0, 1)
        probability = logits.sigmoid() if focal else logits.softmax(-1)
        labels = torch.cat([t["labels"] for t in targets])
        boxes = corners(outputs["pred_boxes"].flatten(0, 1))[:, None]
        of_targets = corners(torch.cat([t["boxes"] for t in targets]))
        sides = torch.min(boxes[..., 2:], of_targets[:, 2:]) - torch.max(
            boxes[..., :2], of_targets[:, :2]
        )
        shared = sides.clamp(min=0).prod(-1)
        area, area2 = ((b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, of_targets))
        iou = shared / (area + area2 - shared)
        cost = -probability[:, labels] * iou**power
        return solve(cost.view(*outputs["pred_logits"].shape[:2], -1), targets)

    outputs, targets = random_batch([7, 0, 3], 100, 9)
    # near the targets, so that no image is decided by a score of 0
    for image, target in enumerate(targets):
        n = len(target["boxes"])
        noise = torch.linspace(0.9, 1.1, 4 * n * 4).view(-1, 4)
        outputs["pred_boxes"][image, : 4 * n] = target["boxes"].repeat(4, 1) * noise
    matcher = HungarianMatcher(DICT, focal, 0.25, 2.0, True, power, 30)
    early = matcher(outputs, targets, epoch=29)
    assert_close(early, HungarianMatcher(DICT, focal)(outputs, targets))
    late = matcher(outputs, targets, epoch=30)["indices"]
    assert_close(late, expected(outputs, targets))
    assert differ(early["indices"], late)


def test_topk_matches_again_without_the_queries_matched_before():
    outputs, targets = random_batch([4, 0, 7], 24, 9)
    cost = published_cost(outputs, targets, *DICT.values(), focal_cost())
    rounds = []
    for _ in range(3):
        rounds.append(solve(cost, targets))
        for image, (queries, _) in enumerate(rounds[-1]):
            cost[image, queries] = 1e6
    expected = [
        (torch.cat([queries for queries, _ in image]), torch.cat([chosen for _, chosen in image]))
        for image in zip(*rounds, strict=True)
    ]
    found = HungarianMatcher(DICT, use_focal_loss=True)(outputs, targets, return_topk=3)
    assert list(found) == ["indices_o2m"]
    assert_close(found["indices_o2m"], expected)


def united(indices, others):
    """Count the pairs of all layers, in Python; the earlier of equals in (query, target)."""
    result = []
    for image in range(len(indices)):
        count = {}
        for layer in (indices, *others):
            for pair in zip(*(i.tolist() for i in layer[image]), strict=True):
                count[pair] = count.get(pair, 0) + 1
        chosen = {}
        for query, target in sorted(count, key=lambda pair: (-count[pair], pair)):
            chosen.setdefault(query, target)
        pairs = list(chosen), list(chosen.values())
        result.append(tuple(torch.tensor(i, dtype=torch.int64) for i in pairs))
    return result


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("counts", [[7, 0, 3, 12], [0, 0], [1]], ids=str)
def test_the_union_of_layers_keeps_the_most_frequent_target(counts, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    g = torch.Generator().manual_seed(0)
    for layers in (1, 2, 7):
        several = [
            # few queries: many of them meet several targets, some equally often
            [(torch.randperm(14, generator=g)[:n], torch.randperm(n, generator=g)) for n in counts]
            for _ in range(layers)
        ]
        expected = united(several[0], several[1:])
        moved = [[tuple(i.to(device) for i in pair) for pair in layer] for layer in several]
        found = get_go_indices(moved[0], moved[1:])
        assert all(i.device.type == device for pair in found for i in pair)
        assert_close([tuple(i.cpu() for i in pair) for pair in found], expected)


def test_the_union_of_no_images_is_empty():
    assert get_go_indices([], [[], []]) == []
