# SPDX-License-Identifier: Apache-2.0
"""The assigner of mmdetection against its published definition, restated."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from detr_fast.matcher.mmdet import AssignResult, HungarianAssigner, match_cost
from tests.matcher.published import corners, focal_cost, random_boxes, softmax_cost

pytest.importorskip("scipy")
SHAPE = (480, 640)
META = {"img_shape": SHAPE}
DETR = [
    {"type": "ClassificationCost", "weight": 1.0},
    {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
    {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
]


class Instances(SimpleNamespace):
    """As much of mmengine's InstanceData as an assigner sees."""

    def __len__(self):
        return len(next(iter(vars(self).values())))


def image(targets, queries, seed=0):
    """Predictions and targets of an image of 480 x 640, corners in pixels."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.tensor([SHAPE[1], SHAPE[0]] * 2)
    predicted = Instances(
        scores=2 * torch.randn(queries, 10, generator=g),
        bboxes=corners(random_boxes(queries, generator=g)) * scale,
        masks=torch.randn(queries, 6, 8, generator=g),
    )
    wanted = Instances(
        labels=torch.randint(9, (targets,), generator=g),
        bboxes=corners(random_boxes(targets, generator=g)) * scale,
        masks=(torch.rand(targets, 6, 8, generator=g) < 0.5).long(),
    )
    return predicted, wanted


def pairwise(predicted, wanted, cost):
    """A cost by a loop over all pairs."""
    return torch.stack([torch.stack([cost(p, t) for t in wanted]) for p in predicted])


def l1(box_format):
    def cost(p, t):
        height, width = SHAPE
        p, t = (b / torch.tensor([width, height, width, height]) for b in (p, t))
        if box_format == "xywh":
            p, t = (
                torch.stack([(b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]])
                for b in (p, t)
            )
        return (p - t).abs().sum()

    return cost


def overlap(mode):
    def cost(p, t):
        sides = (torch.min(p[2:], t[2:]) - torch.max(p[:2], t[:2])).clamp(min=0)
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (p, t)]
        union = (areas[0] + areas[1] - sides.prod()).clamp(min=1e-6)
        iou = sides.prod() / union
        hull = (torch.max(p[2:], t[2:]) - torch.min(p[:2], t[:2])).prod().clamp(min=1e-6)
        return -iou if mode == "iou" else -(iou - (hull - union) / hull)

    return cost


def mask_focal(p, t):
    p, t = p.sigmoid().flatten(), t.flatten()
    hit, miss = -(p + 1e-12).log() * 0.3 * (1 - p) ** 1.5, -(1 - p + 1e-12).log() * 0.7 * p**1.5
    return torch.where(t == 1, hit, miss).mean()


def dice(power):
    def cost(p, t):
        p, t = p.sigmoid().flatten(), t.flatten().float()
        return 1 - (2 * (p * t).sum() + 1e-3) / ((p**power).sum() + (t**power).sum() + 1e-3)

    return cost


def entropy(p, t):
    return torch.nn.functional.binary_cross_entropy_with_logits(p, t.float())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"type": "ClassificationCost"}, lambda p, t: softmax_cost(p.scores, t.labels)),
        ({"type": "FocalLossCost"}, lambda p, t: focal_cost(eps=1e-12)(p.scores, t.labels)),
        (
            {"type": "FocalLossCost", "alpha": 0.4, "gamma": 1.5, "eps": 1e-6},
            lambda p, t: focal_cost(0.4, 1.5, 1e-6)(p.scores, t.labels),
        ),
        (
            {"type": "FocalLossCost", "alpha": 0.3, "gamma": 1.5, "binary_input": True},
            lambda p, t: pairwise(p.masks, t.masks, mask_focal),
        ),
        ({"type": "BBoxL1Cost"}, lambda p, t: pairwise(p.bboxes, t.bboxes, l1("xyxy"))),
        (
            {"type": "BBoxL1Cost", "box_format": "xywh"},
            lambda p, t: pairwise(p.bboxes, t.bboxes, l1("xywh")),
        ),
        ({"type": "IoUCost"}, lambda p, t: pairwise(p.bboxes, t.bboxes, overlap("giou"))),
        (
            {"type": "IoUCost", "iou_mode": "iou"},
            lambda p, t: pairwise(p.bboxes, t.bboxes, overlap("iou")),
        ),
        (
            {"type": "DiceCost", "pred_act": True},
            lambda p, t: pairwise(p.masks, t.masks, dice(1)),
        ),
        (
            {"type": "DiceCost", "pred_act": True, "naive_dice": False},
            lambda p, t: pairwise(p.masks, t.masks, dice(2)),
        ),
        ({"type": "CrossEntropyLossCost"}, lambda p, t: pairwise(p.masks, t.masks, entropy)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_costs_equal_their_definitions(options, expected):
    predicted, wanted = image(7, 11)
    found = match_cost(**options, weight=3)(predicted, wanted, META)
    assert_close(found, 3 * expected(predicted, wanted))


@pytest.mark.parametrize(("targets", "queries"), [(7, 100), (1, 1), (30, 12)])
def test_assigns_as_published(targets, queries):
    from scipy.optimize import linear_sum_assignment

    for seed in range(5):
        predicted, wanted = image(targets, queries, seed)
        costs = [match_cost(**options)(predicted, wanted, META) for options in DETR]
        rows, columns = linear_sum_assignment(sum(costs))
        gt_inds, labels = torch.zeros(queries).long(), torch.full((queries,), -1)
        gt_inds[rows] = torch.from_numpy(columns) + 1
        labels[rows] = wanted.labels[columns]
        result = HungarianAssigner(DETR).assign(predicted, wanted, META)
        assert (result.num_gts, result.num_preds) == (targets, queries)
        assert result.max_overlaps is None
        assert_close(result.gt_inds, gt_inds)
        assert_close(result.labels, labels)


@pytest.mark.parametrize(("targets", "queries"), [(0, 5), (0, 0)])
def test_without_targets_all_is_background(targets, queries):
    result = HungarianAssigner(DETR).assign(*image(targets, queries), META)
    assert_close(result.gt_inds, torch.zeros(queries).long())
    assert_close(result.labels, torch.full((queries,), -1))


def test_takes_one_cost_and_callables():
    predicted, wanted = image(4, 20)

    def own_cost(pred_instances, gt_instances, img_meta):
        return torch.cdist(pred_instances.bboxes, gt_instances.bboxes)

    result = HungarianAssigner(own_cost).assign(predicted, wanted)
    assert isinstance(result, AssignResult)
    one = HungarianAssigner(DETR[0]).assign(predicted, wanted)
    assert not torch.equal(one.gt_inds, result.gt_inds)


def test_half_costs_are_summed_in_float32():
    predicted, wanted = image(4, 20)
    total = 40000 + 1000 * torch.rand(20, 4, generator=torch.Generator().manual_seed(0))

    def half_cost(pred_instances, gt_instances, img_meta):
        return total.half()

    result = HungarianAssigner([half_cost] * 2).assign(predicted, wanted)
    expected = HungarianAssigner(lambda **_: total.half().float()).assign(predicted, wanted)
    assert_close(result.gt_inds, expected.gt_inds)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "FocalLossCost", "binary_input": True},
        {"type": "DiceCost", "pred_act": True},
        {"type": "CrossEntropyLossCost"},
    ],
    ids=lambda options: options["type"],
)
def test_masks_are_compared_in_float32_under_autocast(options):
    predicted, wanted = image(7, 11)
    expected = match_cost(**options)(predicted, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(match_cost(**options)(predicted, wanted), expected, rtol=0, atol=0)
    predicted.masks = predicted.masks.half()
    rounded = match_cost(**options)(predicted, wanted)
    predicted.masks = predicted.masks.float()
    assert_close(rounded, match_cost(**options)(predicted, wanted), rtol=0, atol=0)


def test_a_cost_that_is_not_finite_raises_on_the_cpu():
    predicted, wanted = image(4, 20)
    predicted.scores[3] = torch.nan
    with pytest.raises(ValueError, match="problem 0"):
        HungarianAssigner(DETR).assign(predicted, wanted, META)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ([], "match_costs is empty"),
        ([{"type": "L2Cost"}], "BBoxL1Cost, .*, got 'L2Cost'"),
        ([{"type": "BBoxL1Cost", "box_format": "yxyx"}], 'box_format: .* "xywh", got .yxyx'),
        ([{"type": "IoUCost", "iou_mode": "diou"}], "got 'diou'"),
        ([{"type": "CrossEntropyLossCost", "use_sigmoid": False}], "only use_sigmoid=True"),
    ],
    ids=["none", "type", "format", "mode", "softmax"],
)
def test_refuses_what_it_does_not_know(costs, message):
    with pytest.raises(ValueError, match=message):
        HungarianAssigner(costs).assign(*image(2, 5), META)
