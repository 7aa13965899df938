# SPDX-License-Identifier: Apache-2.0
"""The matcher of the package rfdetr and ours on the same inputs, also within its criterion."""

import argparse

import pytest
import torch
from torch.testing import assert_close

from detr_fast.matcher import patch
from detr_fast.matcher.rfdetr import HungarianMatcher, _mask_cost, build_matcher
from tests.matcher.published import random_batch

pytest.importorskip("scipy")
original = pytest.importorskip("rfdetr.models.matcher")

WEIGHTS = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2, "focal_alpha": 0.25}


def batch(counts, queries, seed=0, masks=None):
    outputs, targets = random_batch(counts, queries, 9, seed)
    g = torch.Generator().manual_seed(seed)
    images = len(counts)
    if masks == "tensor":
        outputs["pred_masks"] = torch.randn(images, queries, 12, 16, generator=g)
    if masks == "factors":
        outputs["pred_masks"] = {
            "spatial_features": torch.randn(images, 4, 12, 16, generator=g),
            "query_features": torch.randn(images, queries, 4, generator=g),
            "bias": torch.tensor(0.1),
        }
    for target, n in zip(targets, counts, strict=True):
        if masks:
            target["masks"] = torch.rand(n, 24, 32, generator=g) < 0.5
    return outputs, targets


def both(outputs, targets, **arguments):
    results = []
    for module in (HungarianMatcher, original.HungarianMatcher):
        torch.manual_seed(0)
        results.append(module(**WEIGHTS)(outputs, targets, **arguments))
    return results


@pytest.mark.parametrize("masks", [None, "tensor", "factors"])
@pytest.mark.parametrize("groups", [1, 13])
@pytest.mark.parametrize("counts", [[7, 3], [20, 0, 50, 1], [0, 0], [4]], ids=str)
def test_equals_the_original(counts, groups, masks):
    for seed in range(3):
        found, expected = both(*batch(counts, 26, seed, masks), group_detr=groups)
        assert_close(found, expected, rtol=0, atol=0)


def test_queries_that_are_not_finite_are_taken_last():
    """The two replace them by different numbers, which is the same for them as for all others."""
    for seed in range(5):
        outputs, targets = batch([7, 18], 20, seed)
        outputs["pred_logits"][0, ::3] = torch.nan
        outputs["pred_boxes"][1, 5] = torch.inf
        found, expected = both(outputs, targets)
        assert_close(found, expected)


@pytest.mark.parametrize("masks", [None, "tensor"])
@pytest.mark.parametrize("counts", [[7, 7], [30, 30, 30], [9]], ids=str)
def test_targets_that_fill_up_take_what_is_left(counts, masks):
    """As targets of a fixed number are, which are made for XLA."""
    for seed in range(3):
        outputs, targets = batch(counts, 26, seed, masks)
        for image, target in enumerate(targets):
            target["valid"] = torch.arange(len(target["labels"])) < 5 * (1 - image % 2)
            target["boxes"][~target["valid"]] = 0.0
            target["labels"][~target["valid"]] = 0
        found, expected = both(outputs, targets, group_detr=2)
        assert_close(found, expected, rtol=0, atol=0)


def test_factors_of_masks_are_multiplied_in_float32_under_autocast():
    outputs, targets = batch([20, 13], 26, masks="factors")
    costs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            costs.append(_mask_cost(HungarianMatcher(**WEIGHTS), outputs["pred_masks"], targets))
    assert_close(costs[1], costs[0], rtol=0, atol=0)


@pytest.mark.parametrize("key", ["pred_logits", "pred_boxes"])
def test_under_the_patch_layers_may_have_different_dtypes(key):
    several = [batch([5, 0, 3], 20, seed)[0] for seed in (1, 2)]
    targets = batch([5, 0, 3], 20)[1]
    matcher = original.HungarianMatcher(**WEIGHTS)
    several[1][key] = several[1][key].bfloat16()
    as_float = [{name: x.float() for name, x in outputs.items()} for outputs in several]
    expected = [matcher(outputs, targets) for outputs in as_float]
    with patch("rfdetr"):
        assert_close(matcher._match_many(several, targets), expected)


def test_keypoints_equal_the_original():
    outputs, targets = batch([5, 2], 20)
    g = torch.Generator().manual_seed(0)
    outputs["pred_keypoints"] = torch.randn(2, 20, 9 * 3, 7, generator=g)
    for target in targets:
        n = len(target["labels"])
        target["keypoints"] = torch.rand(n, 3, 3, generator=g)
        target["keypoints"][..., 2] = 2
    names = ("l1_loss", "findable_loss", "visible_loss", "nll_loss")
    weights = {f"keypoint_{name}_coef": 0.5 + i for i, name in enumerate(names)}
    weights["num_keypoints_per_class"] = [3] * 9
    found, expected = (
        m(**WEIGHTS, **weights)(outputs, targets)
        for m in (HungarianMatcher, original.HungarianMatcher)
    )
    without = HungarianMatcher(**WEIGHTS, num_keypoints_per_class=[3] * 9)(outputs, targets)
    assert_close(found, expected)
    assert not torch.equal(found[0][0], without[0][0])


def test_builds_what_the_original_builds():
    args = argparse.Namespace(set_cost_class=2, set_cost_bbox=5, set_cost_giou=3, focal_alpha=0.3)
    args.segmentation_head, args.mask_point_sample_ratio = True, 8
    args.mask_ce_loss_coef, args.mask_dice_loss_coef = 3, 4
    theirs = vars(original.build_matcher(args))
    found = {name: value for name, value in vars(build_matcher(args)).items() if name[0] != "_"}
    assert found == {name: theirs[name] for name in found}


def criterion(matcher, losses):
    from rfdetr.models.criterion import SetCriterion

    return SetCriterion(
        num_classes=10,
        matcher=matcher,
        weight_dict={},
        focal_alpha=0.25,
        losses=losses,
        group_detr=2,
    ).train()


@pytest.mark.parametrize("way", ["drop-in", "patch"])
def test_its_criterion_has_the_same_losses(way):
    outputs, targets = batch([5, 0, 3], 20)
    layers = [batch([5, 0, 3], 20, seed)[0] for seed in (1, 2, 3)]
    outputs = {**outputs, "aux_outputs": layers[:2], "enc_outputs": layers[2]}
    matcher = original.HungarianMatcher(**WEIGHTS)
    expected = criterion(matcher, ["labels", "boxes"])(outputs, targets)
    if way == "drop-in":
        found = criterion(HungarianMatcher(**WEIGHTS), ["labels", "boxes"])(outputs, targets)
    else:
        with patch("rfdetr") as patched:  # reaches a matcher that exists already
            assert "HungarianMatcher._match_many" in repr(patched)
            found = criterion(matcher, ["labels", "boxes"])(outputs, targets)
    assert set(found) == set(expected)
    assert_close(found, expected, rtol=0, atol=0)
