# SPDX-License-Identifier: Apache-2.0
"""Matchers with costs of masks against their published definitions, restated mask by mask."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample
from torch.testing import assert_close

from detr_fast.matcher import mask2former, rtdetrv2
from tests.matcher.published import focal_cost, published_cost, random_batch, softmax_cost, solve

pytest.importorskip("scipy")
POINTS = 112


def batch(counts, queries, classes=9, seed=0):
    outputs, targets = random_batch(counts, queries, classes, seed)
    g = torch.Generator().manual_seed(seed)
    outputs["pred_masks"] = 3 * torch.randn(len(counts), queries, 12, 16, generator=g)
    for target, n in zip(targets, counts, strict=True):
        target["masks"] = torch.rand(n, 24, 32, generator=g) < 0.4
    return outputs, targets


def mask_costs(predicted, masks, points):
    """(Q, H, W), (n, h, w) -> cross-entropy and dice loss (Q, n), pair by pair."""
    grid = 2 * points[:, None] - 1
    at = [grid_sample(m[None, None].float(), grid, align_corners=False).view(-1) for m in predicted]
    of = [grid_sample(m[None, None].float(), grid, align_corners=False).view(-1) for m in masks]
    entropy, dice = torch.zeros(2, len(at), len(of))
    for q, x in enumerate(at):
        for t, y in enumerate(of):
            entropy[q, t] = binary_cross_entropy_with_logits(x, y)
            p = x.sigmoid()
            dice[q, t] = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    return entropy, dice


def published_match(outputs, targets, boxes, class_cost, mask, dice, seed):
    """``boxes``: weights of class, L1 and GIoU; the points of an image are drawn in its turn."""
    cost = published_cost(outputs, targets, *boxes, class_cost)
    torch.manual_seed(seed)
    first = 0
    for image, target in enumerate(targets):
        n = len(target["masks"])
        points = torch.rand(1, POINTS, 2)
        terms = mask_costs(outputs["pred_masks"][image], target["masks"], points)
        cost[image, :, first : first + n] += mask * terms[0] + dice * terms[1]
        first += n
    return solve(cost, targets)


COUNTS = pytest.mark.parametrize("counts", [[3, 1], [12, 5, 30], [0, 4]], ids=str)


@COUNTS
def test_mask2former_equals_published(counts):
    outputs, targets = batch(counts, 20)
    expected = published_match(outputs, targets, (2, 0, 0), softmax_cost, 5, 4, seed=1)
    torch.manual_seed(1)
    assert_close(mask2former.HungarianMatcher(2, 5, 4, POINTS)(outputs, targets), expected)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(mask2former.HungarianMatcher(2, 5, 4, POINTS)(outputs, targets), expected)


@COUNTS
def test_maskdino_equals_published(counts):
    outputs, targets = batch(counts, 20)
    matcher = mask2former.MaskDINOHungarianMatcher(2, 5, 4, POINTS, cost_box=3, cost_giou=2)
    expected = published_match(outputs, targets, (2, 3, 2), focal_cost(), 5, 4, seed=1)
    torch.manual_seed(1)
    assert_close(matcher(outputs, targets), expected)
    without_masks = solve(published_cost(outputs, targets, 2, 3, 2, focal_cost()), targets)
    assert_close(matcher(outputs, targets, ["cls", "box"]), without_masks)
    without_boxes = published_match(outputs, targets, (2, 0, 0), focal_cost(), 5, 4, seed=1)
    torch.manual_seed(1)
    assert_close(matcher(outputs, targets, ["cls", "mask"]), without_boxes)


def test_maskdino_gives_stuff_the_mean_cost_of_the_things_boxes():
    outputs, targets = batch([12, 5, 4], 20, classes=130)
    targets[0]["labels"][:3] = torch.tensor([79, 80, 81])
    targets[1]["labels"] %= 80  # things alone
    targets[2]["labels"] = 80 + targets[2]["labels"] % 40  # stuff alone
    matcher = mask2former.MaskDINOHungarianMatcher(2, 5, 4, POINTS, 3, 2, panoptic_on=True)
    cost = published_cost(outputs, targets, 2, 0, 0, focal_cost())
    boxes = published_cost(outputs, targets, 0, 3, 2)
    first = 0
    for image, target in enumerate(targets):
        block = boxes[image, :, first : first + len(target["labels"])]
        things = target["labels"] < 80
        block[:, ~things] = block[:, things].mean().nan_to_num(0.0)
        first += len(things)
    assert_close(matcher(outputs, targets, ["cls", "box"]), solve(cost + boxes, targets))


@COUNTS
def test_rtdetr_v2_adds_masks_where_there_are_any(counts):
    outputs, targets = batch([n for n in counts if n], 20)
    weights = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2, "cost_mask": 5, "cost_dice": 4}
    matcher = rtdetrv2.HungarianMatcher(weights, use_focal_loss=True, num_sample_points=POINTS)
    expected = published_match(outputs, targets, (2, 5, 2), focal_cost(), 5, 4, seed=1)
    torch.manual_seed(1)
    assert_close(matcher(outputs, targets)["indices"], expected)
    for target in targets:
        del target["masks"]
    boxes = solve(published_cost(outputs, targets, 2, 5, 2, focal_cost()), targets)
    assert_close(matcher(outputs, targets)["indices"], boxes)


def test_refuses_weights_that_are_all_zero():
    with pytest.raises(ValueError, match="cost_class, cost_mask and cost_dice are all 0"):
        mask2former.HungarianMatcher(0, 0, 0)


def test_shows_its_weights():
    found = repr(mask2former.HungarianMatcher(2, 5, 4, POINTS))
    assert found == "HungarianMatcher(cost_class=2, cost_mask=5, cost_dice=4, num_points=112)"
