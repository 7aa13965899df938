# SPDX-License-Identifier: Apache-2.0
"""The matchers of other code bases against their published definitions, restated."""

import argparse
import inspect
import sys

import pytest
import torch
from torch.testing import assert_close

from detr_fast.matcher import deformable_detr, detrex, dfine, dino, rfdetr, rtdetr, rtdetrv2
from tests.matcher.published import (
    focal_cost,
    focal_logits_cost,
    published_cost,
    published_match,
    random_batch,
    softmax_cost,
    solve,
)

pytest.importorskip("scipy")
DICT = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}
DEFAULT, USUAL = (1, 1, 1), (2, 5, 2)
# matcher, weights and class cost that its definition has
LISTS = {
    "Deformable DETR": (deformable_detr.HungarianMatcher(*USUAL), USUAL, focal_cost()),
    "Deformable DETR, defaults": (deformable_detr.HungarianMatcher(), DEFAULT, focal_cost()),
    "DINO": (dino.HungarianMatcher(*USUAL), USUAL, focal_cost()),
    "DINO, alpha": (dino.HungarianMatcher(*USUAL, focal_alpha=0.6), USUAL, focal_cost(0.6)),
    "detrex": (detrex.HungarianMatcher(*USUAL), USUAL, focal_cost()),
    "detrex, softmax": (
        detrex.HungarianMatcher(*USUAL, cost_class_type="ce_cost"),
        USUAL,
        softmax_cost,
    ),
    "detrex, focal": (
        detrex.HungarianMatcher(1, 2, 3, alpha=0.4, gamma=1.5),
        (1, 2, 3),
        focal_cost(0.4, 1.5),
    ),
    "Group DETR": (detrex.GroupHungarianMatcher(*USUAL), USUAL, focal_cost()),
    "RT-DETR": (rtdetr.HungarianMatcher(DICT), USUAL, softmax_cost),
    "RT-DETR, focal": (
        rtdetr.HungarianMatcher(DICT, use_focal_loss=True, alpha=0.3, gamma=1.0),
        USUAL,
        focal_cost(0.3, 1.0),
    ),
    "RF-DETR": (rfdetr.HungarianMatcher(*USUAL, focal_alpha=0.4), USUAL, focal_logits_cost(0.4)),
}
DICTS = {
    "RT-DETR v2": (rtdetrv2.HungarianMatcher(DICT), USUAL, softmax_cost),
    "RT-DETR v2, focal": (
        rtdetrv2.HungarianMatcher(DICT, use_focal_loss=True),
        USUAL,
        focal_cost(),
    ),
    "D-FINE": (dfine.HungarianMatcher(DICT, use_focal_loss=True), USUAL, focal_cost()),
    "D-FINE, softmax": (dfine.HungarianMatcher(DICT), USUAL, softmax_cost),
}
ALL = {**LISTS, **DICTS}
COUNTS = [([7, 3], 100), ([20, 0, 50, 1], 60), ([0, 0], 5), ([30, 2], 20), ([1], 1)]


def run(name, outputs, targets):
    found = ALL[name][0](outputs, targets)
    if name in DICTS:
        assert list(found) == ["indices"]
        found = found["indices"]
    assert type(found) is list
    for pair in found:
        assert type(pair) is tuple
        for indices in pair:
            assert indices.dtype == torch.int64
            assert indices.device.type == "cpu"
    return found


@pytest.mark.parametrize(("counts", "queries"), COUNTS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_equals_published(name, counts, queries):
    _, weights, class_cost = ALL[name]
    for seed in range(3):
        outputs, targets = random_batch(counts, queries, 9, seed)
        expected = published_match(outputs, targets, *weights, class_cost)
        assert_close(run(name, outputs, targets), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_equals_published_when_targets_repeat(name):
    """As in H-DETR, whose criterion repeats the targets itself: scipy's choice among equals."""
    _, weights, class_cost = ALL[name]
    outputs, targets = random_batch([3, 9], 60, 9)
    repeated = [{key: t[key].repeat(4, *[1] * (t[key].dim() - 1)) for key in t} for t in targets]
    expected = published_match(outputs, repeated, *weights, class_cost)
    assert_close(run(name, outputs, repeated), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_computes_half_precision_in_float32(name, dtype):
    _, weights, class_cost = ALL[name]
    outputs, targets = random_batch([7, 3], 100, 9)
    half = {key: value.to(dtype) for key, value in outputs.items()}
    rounded = {key: value.float() for key, value in half.items()}
    expected = published_match(rounded, targets, *weights, class_cost)
    assert_close(run(name, half, targets), expected)


@pytest.mark.parametrize("name", ALL)
def test_takes_a_batch_without_images(name):
    outputs, targets = random_batch([], 5, 9)
    assert run(name, outputs, targets) == []


@pytest.mark.parametrize("groups", [1, 3, 13])
@pytest.mark.parametrize("counts", [[4, 0, 9], [50, 3]], ids=str)
@pytest.mark.parametrize("name", ["Group DETR", "RF-DETR"])
def test_groups_are_matched_on_their_own(name, counts, groups):
    matcher, weights, class_cost = LISTS[name]
    outputs, targets = random_batch(counts, 13 * 6, 9)
    cost = published_cost(outputs, targets, *weights, class_cost)
    assert_close(matcher(outputs, targets, groups), solve(cost, targets, groups), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Group DETR", "RF-DETR"])
def test_refuses_groups_that_are_not_equal(name):
    outputs, targets = random_batch([3], 20, 9)
    with pytest.raises(ValueError, match="20 queries cannot be cut into 3 equal groups"):
        LISTS[name][0](outputs, targets, 3)


@pytest.mark.parametrize("counts", [[7, 0, 3], [30, 2]], ids=str)
def test_minsum_takes_the_cheapest_query(counts):
    outputs, targets = random_batch(counts, 20, 9)
    cost = published_cost(outputs, targets, *USUAL, focal_cost(0.4))
    blocks = cost.split(counts, -1)
    expected = [
        (block[image].argmin(0), torch.arange(n))
        for image, (block, n) in enumerate(zip(blocks, counts, strict=True))
    ]
    assert_close(dino.SimpleMinsumMatcher(*USUAL, 0.4)(outputs, targets), expected)


@pytest.mark.parametrize(
    ("module", "matcher_type"),
    [(deformable_detr, None), (dino, "HungarianMatcher"), (dino, "SimpleMinsumMatcher")],
    ids=["Deformable DETR", "DINO", "DINO, minsum"],
)
def test_build_matcher_reads_the_flags(module, matcher_type):
    args = argparse.Namespace(set_cost_class=3, set_cost_bbox=4.5, set_cost_giou=6)
    args.matcher_type, args.focal_alpha = matcher_type, 0.3
    matcher = module.build_matcher(args)
    assert (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou) == (3, 4.5, 6)
    assert type(matcher).__name__ == (matcher_type or "HungarianMatcher")
    assert getattr(matcher, "focal_alpha", 0.3) == 0.3


def test_rfdetr_builds_its_matcher_by_the_arguments():
    args = argparse.Namespace(set_cost_class=2, set_cost_bbox=5, set_cost_giou=2, focal_alpha=0.3)
    args.segmentation_head, args.keypoint_l1_loss_coef = False, 0.5
    matcher = rfdetr.build_matcher(args)
    assert (matcher.focal_alpha, matcher.keypoint_l1_loss_coef) == (0.3, 0.5)
    args.segmentation_head, args.mask_point_sample_ratio = True, 8
    args.mask_ce_loss_coef, args.mask_dice_loss_coef = 3, 4
    matcher = rfdetr.build_matcher(args)
    assert (matcher.cost_mask_ce, matcher.cost_mask_dice) == (3, 4)
    assert matcher.mask_point_sample_ratio == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rtdetr.HungarianMatcher(dict.fromkeys(DICT, 0)), "weight_dict: all weights are 0"),
        (lambda: detrex.HungarianMatcher(cost_class_type="bce"), "got 'bce'"),
        (
            lambda: dino.build_matcher(argparse.Namespace(matcher_type="Greedy")),
            "HungarianMatcher, SimpleMinsumMatcher, got 'Greedy'",
        ),
    ],
    ids=["weights", "class cost", "type"],
)
def test_refuses_what_it_does_not_know(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("module", [rtdetr, rtdetrv2, dfine])
def test_can_be_built_from_a_configuration_file(module):
    """Arguments are read by position, and shared ones have to have a default."""
    cls = module.HungarianMatcher
    arguments = inspect.getfullargspec(cls.__init__)
    optional = arguments.args[-len(arguments.defaults) :]
    assert arguments.args[:2] == ["self", "weight_dict"]
    assert set(cls.__share__) <= set(optional)
    assert getattr(sys.modules[cls.__module__], cls.__name__) is cls


@pytest.mark.parametrize("name", [n for n in ALL if "D-FINE" not in n and "RF-DETR" not in n])
def test_names_what_is_not_finite(name):
    outputs, targets = random_batch([2, 3], 20, 9)
    outputs["pred_boxes"][1, 4] = torch.nan
    with pytest.raises(ValueError, match=r"image 1: .* cost_bbox, cost_giou; pred_boxes hold"):
        ALL[name][0](outputs, targets)


@pytest.mark.parametrize("name", ALL)
def test_names_a_label_outside_of_the_columns(name):
    """Also where costs that are not finite are replaced: it is no cost."""
    outputs, targets = random_batch([2, 3], 20, 9)
    targets[1]["labels"][2] = 10
    with pytest.raises(ValueError, match="image 1: label 10 is outside of the 10 columns of pred"):
        ALL[name][0](outputs, targets)


@pytest.mark.parametrize("label", [10, -1])
def test_minsum_names_a_label_outside_of_the_columns(label):
    outputs, targets = random_batch([0, 3], 20, 9)
    targets[1]["labels"][2] = label
    with pytest.raises(ValueError, match=f"image 1: label {label} is outside of the 10 columns"):
        dino.SimpleMinsumMatcher(*USUAL, 0.4)(outputs, targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ALL)
def test_names_a_label_outside_of_the_columns_on_a_gpu(name):
    outputs, targets = random_batch([2, 3], 20, 9)
    targets[1]["labels"][2] = 10
    outputs = {key: value.cuda() for key, value in outputs.items()}
    targets = [{key: value.cuda() for key, value in target.items()} for target in targets]
    with pytest.raises(ValueError, match="image 1: label 10 is outside of the 10 columns of pred"):
        ALL[name][0](outputs, targets)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ALL)
def test_equals_published_on_a_gpu(name):
    _, weights, class_cost = ALL[name]
    outputs, targets = random_batch([20, 0, 50, 1], 60, 9)
    expected = published_match(outputs, targets, *weights, class_cost)
    outputs = {key: value.cuda() for key, value in outputs.items()}
    targets = [{key: value.cuda() for key, value in target.items()} for target in targets]
    assert_close(run(name, outputs, targets), expected)
