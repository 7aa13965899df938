# SPDX-License-Identifier: Apache-2.0
"""The drop-in matcher against the published expression."""

import argparse

import pytest
import torch
from torch.testing import assert_close

from detr_fast.matcher import HungarianMatcher, build_matcher
from tests.matcher.published import published_match, random_batch

pytest.importorskip("scipy")
WEIGHTS = {"cost_class": 1, "cost_bbox": 5, "cost_giou": 2}


def check(outputs, targets, weights=WEIGHTS):
    """Same pairs as published, in the form that callers of DETR rely on."""
    pairs = HungarianMatcher(**weights)(outputs, targets)
    assert_close(pairs, published_match(outputs, targets, **weights), rtol=0, atol=0)
    for (queries, chosen), target in zip(pairs, targets, strict=True):
        assert queries.dtype == chosen.dtype == torch.int64
        assert queries.device.type == chosen.device.type == "cpu"
        assert (queries.diff() > 0).all()
        assert len(queries) == min(len(target["labels"]), outputs["pred_logits"].shape[1])
    return pairs


@pytest.mark.parametrize(
    ("counts", "queries"),
    [
        ([7, 3], 100),
        ([20, 0, 50, 1], 300),
        ([0], 5),
        ([0, 0, 0], 5),
        ([30, 2, 20], 20),  # more targets than queries
        ([1], 1),
        ([4, 4], 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [(1, 5, 2), (1, 1, 1), (2, 0, 0), (0, 1, 0), (0, 0, 3.5)])
def test_equals_published(counts, queries, weights):
    for seed in range(3):
        check(*random_batch(counts, queries, 9, seed), dict(zip(WEIGHTS, weights, strict=True)))


def test_equals_published_in_float64():
    check(*random_batch([7, 0, 12], 10, 9, dtype=torch.float64))


def test_equals_published_when_queries_collapse():
    """As after initialisation: all queries of an image predict the same."""
    outputs, targets = random_batch([5, 12, 20], 12, 9)
    collapsed = {name: value[:, :1].expand_as(value) for name, value in outputs.items()}
    check(collapsed, targets)


def test_equals_published_when_targets_repeat():
    outputs, targets = random_batch([3, 9], 20, 9)
    repeated = [{key: t[key].repeat_interleave(4, 0) for key in t} for t in targets]
    check(outputs, repeated)


def test_equals_published_on_a_grid_of_ties():
    """Few distinct costs: the order in which the L1 terms are added would already show.

    The probabilities, 1 / k or 0, are exact whatever the exponential function is.
    """
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        boxes = torch.randint(1, 5, (2, 30, 4), generator=g) / 10
        logits = 1e4 * torch.randint(2, (2, 30, 4), generator=g).float()
        targets = [
            {
                "labels": torch.randint(3, (n,), generator=g),
                "boxes": torch.randint(1, 5, (n, 4), generator=g) / 10,
            }
            for n in (10, 40)
        ]
        check({"pred_logits": logits, "pred_boxes": boxes}, targets)


def test_equals_published_on_boxes_without_area():
    outputs, targets = random_batch([6, 3], 20, 9)
    outputs["pred_boxes"][0, ::2, 2:] = 0  # points
    outputs["pred_boxes"][0, 1::4, 3] = 0  # lines
    targets[1]["boxes"][:2, 2] = 0
    targets[0]["boxes"][0] = torch.tensor([0.5, 0.5, 1, 1])
    check(outputs, targets)


@pytest.mark.long
def test_equals_published_on_random_problems():
    g = torch.Generator().manual_seed(0)
    for seed in range(2000):
        images, queries, classes = (
            torch.randint(1, n, (1,), generator=g).item() for n in (5, 60, 9)
        )
        counts = torch.randint(80, (images,), generator=g).tolist()
        outputs, targets = random_batch(counts, queries, classes, seed)
        if seed % 2:  # ties: boxes on a coarse grid, exact probabilities
            outputs["pred_logits"] = 1e4 * (outputs["pred_logits"] > 0)
            outputs["pred_boxes"] = (4 * outputs["pred_boxes"]).round() / 4
            outputs["pred_boxes"][..., 2:] += 0.25
        check(outputs, targets)


def test_finds_the_true_pairs():
    outputs, targets = random_batch([6], 20, 9)
    order = torch.tensor([19, 3, 11, 0, 7, 5])
    outputs["pred_boxes"][0, order] = targets[0]["boxes"]
    outputs["pred_logits"][0, order] = 10 * torch.eye(10)[targets[0]["labels"]]
    ((queries, chosen),) = HungarianMatcher(**WEIGHTS)(outputs, targets)
    assert queries.tolist() == sorted(order.tolist())
    assert order[chosen].tolist() == queries.tolist()


def test_images_do_not_touch_each_other():
    outputs, targets = random_batch([7, 12, 3], 20, 9)
    matcher = HungarianMatcher(**WEIGHTS)
    alone = [
        matcher({k: v[i : i + 1] for k, v in outputs.items()}, targets[i : i + 1])[0]
        for i in range(3)
    ]
    assert_close(matcher(outputs, targets), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_computes_half_precision_in_float32(dtype):
    outputs, targets = random_batch([7, 3], 100, 9)
    half = {name: value.to(dtype) for name, value in outputs.items()}
    rounded = {name: value.float() for name, value in half.items()}
    expected = published_match(rounded, targets, **WEIGHTS)
    assert_close(HungarianMatcher(**WEIGHTS)(half, targets), expected)


def test_autocast_changes_nothing():
    outputs, targets = random_batch([30, 3], 100, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(outputs, targets)


@pytest.mark.parametrize("boxes_shape", [(0, 4), (0,)], ids=str)
def test_takes_an_image_without_boxes_in_any_empty_form(boxes_shape):
    outputs, targets = random_batch([0, 3], 20, 9)
    empty = {"labels": torch.tensor([]), "boxes": torch.zeros(boxes_shape)}
    pairs = HungarianMatcher(**WEIGHTS)(outputs, [empty, targets[1]])
    assert_close(pairs, published_match(outputs, targets, **WEIGHTS))


def test_keeps_nothing_for_a_backward_and_leaves_inputs_alone():
    outputs, targets = random_batch([5], 20, 9)
    before = {name: value.clone() for name, value in outputs.items()}
    for value in outputs.values():
        value.requires_grad_()

    def refuse(tensor):
        raise AssertionError(f"{tuple(tensor.shape)} saved for the backward")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        HungarianMatcher(**WEIGHTS)(outputs, targets)
    assert_close({name: value.detach() for name, value in outputs.items()}, before)


def test_padding_is_not_matched_nor_checked():
    """A predicted point at the origin has no GIoU with the zeros that pad a short image."""
    outputs, targets = random_batch([1, 4], 6, 9)
    outputs["pred_boxes"][0, 2] = 0
    check(outputs, targets)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda o, t: o["pred_logits"][1, 3].fill_(torch.nan),
            r"image 1: .* not finite in the term cost_class; pred_logits hold NaN",
        ),
        (
            lambda o, t: o["pred_boxes"][1, 3, 0].fill_(torch.inf),
            r"image 1: .* in the term cost_bbox, cost_giou; pred_boxes hold",
        ),
        (
            lambda o, t: t[2]["boxes"][0, 0].fill_(torch.nan),
            r"image 2: .* in the term cost_bbox, cost_giou; target boxes hold",
        ),
        (
            lambda o, t: t[2]["labels"][1].fill_(10),
            r"image 2: label 10 is outside of the 10 columns of pred_logits",
        ),
        (lambda o, t: t[1]["labels"][4].fill_(-1), r"image 1: label -1 is outside"),
    ],
    ids=["logits", "boxes", "target", "label", "negative"],
)
def test_names_what_is_not_finite(spoil, message):
    outputs, targets = random_batch([0, 7, 3], 20, 9)
    spoil(outputs, targets)
    with pytest.raises(ValueError, match=message):
        HungarianMatcher(**WEIGHTS)(outputs, targets)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"pred_logits": torch.zeros(5, 3), "pred_boxes": torch.zeros(5, 4)}, r"got \(5, 3\) and"),
        (
            {"pred_logits": torch.zeros(1, 5, 3), "pred_boxes": torch.zeros(1, 6, 4)},
            r"got \(1, 5, 3\) and \(1, 6, 4\)",
        ),
        (
            {"pred_logits": torch.zeros(2, 5, 3), "pred_boxes": torch.zeros(2, 5, 4)},
            "1 targets for a batch of 2 images",
        ),
    ],
    ids=["flat", "queries", "batch"],
)
def test_names_shapes_that_do_not_fit(outputs, message):
    _, targets = random_batch([2], 5, 2)
    with pytest.raises(ValueError, match=message):
        HungarianMatcher()(outputs, targets)


def test_refuses_weights_that_are_all_zero():
    with pytest.raises(ValueError, match="all 0"):
        HungarianMatcher(0, 0, 0)


def test_build_matcher_reads_the_flags():
    args = argparse.Namespace(set_cost_class=3, set_cost_bbox=4.5, set_cost_giou=6)
    expected = "HungarianMatcher(cost_class=3, cost_bbox=4.5, cost_giou=6)"
    assert repr(build_matcher(args)) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("always:called a synchronizing CUDA operation")
def test_copies_once_from_the_device():
    outputs, targets = random_batch([7, 0, 12, 3], 100, 9)
    on_gpu = {name: value.cuda() for name, value in outputs.items()}
    targets_on_gpu = [{name: value.cuda() for name, value in t.items()} for t in targets]
    matcher = HungarianMatcher(**WEIGHTS)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as syncs:
            pairs = matcher(on_gpu, targets_on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(syncs) == 1
    assert_close(pairs, matcher(outputs, targets))
