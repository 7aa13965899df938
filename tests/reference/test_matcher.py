# SPDX-License-Identifier: Apache-2.0
"""Assignment and matching cost in plain torch and scipy."""

import itertools
import sys

import pytest
import torch
from torch.testing import assert_close

from detr_fast.reference.match import ClassCost, CostWeights
from detr_fast.reference.matcher import (
    CostTerms,
    hungarian_match,
    linear_sum_assignment,
    matching_cost,
    matching_cost_terms,
    replace_non_finite,
)
from tests.matcher.published import corners, giou_matrix, random_batch
from tests.ops.match_cases import random_case

pytest.importorskip("scipy")


def least_total(cost):
    """Try every assignment of a (Q, T) problem."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.t()
    targets = torch.arange(cost.shape[1])
    rows = itertools.permutations(range(cost.shape[0]), cost.shape[1])
    return min(float(cost[torch.tensor(r, dtype=torch.int64), targets].sum()) for r in rows)


@pytest.mark.parametrize(("queries", "targets"), [(6, 3), (5, 5), (3, 6), (1, 4), (4, 1), (3, 0)])
def test_linear_sum_assignment_is_optimal(queries, targets):
    g = torch.Generator().manual_seed(0)
    cost = torch.randn(8, queries, targets, generator=g)
    cost[4:] = cost[4:].round()  # ties
    result = linear_sum_assignment(cost, torch.full((8,), targets))
    assert result.shape == (8, targets)
    assert result.dtype == torch.int64
    for problem, query_of_target in zip(cost, result, strict=True):
        chosen = (query_of_target >= 0).nonzero().squeeze(1)
        used = query_of_target[chosen]
        assert len(chosen) == len(used.unique()) == min(queries, targets)
        assert problem[used, chosen].sum().item() == pytest.approx(least_total(problem), abs=1e-5)


def test_linear_sum_assignment_does_not_read_padding():
    cost = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    counts = [5, 2, 0]
    for problem, n in zip(cost, counts, strict=True):
        problem[:, n:] = torch.nan
    result = linear_sum_assignment(cost, torch.tensor(counts, dtype=torch.int32))
    for problem, row, n in zip(cost, result, counts, strict=True):
        assert row[n:].eq(-1).all()
        assert_close(row[:n], linear_sum_assignment(problem[None, :, :n], torch.tensor([n]))[0])


def test_linear_sum_assignment_takes_bfloat16_and_gradients():
    cost = torch.tensor([[[0.0, 3.0], [1.0, 0.5], [2.0, 0.0]]], requires_grad=True)
    result = linear_sum_assignment(cost.bfloat16(), torch.tensor([2]))
    assert result.tolist() == [[0, 2]]


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_linear_sum_assignment_names_the_problem(value):
    cost = torch.zeros(4, 3, 2)
    cost[2, 0, 1] = value
    with pytest.raises(ValueError, match="problem 2 of 4"):
        linear_sum_assignment(cost, torch.tensor([2, 2, 2, 2]))


def test_linear_sum_assignment_says_how_to_get_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r'pip install "detr-fast\[train\]"'):
        linear_sum_assignment(torch.zeros(1, 2, 2), torch.tensor([2]))


def published_terms(logits, boxes, labels, target_boxes):
    """Class, L1 and GIoU costs of one image, as DETR writes them."""
    return CostTerms(
        -logits.softmax(-1)[:, labels],
        torch.cdist(boxes, target_boxes, p=1),
        -giou_matrix(corners(boxes), corners(target_boxes)),
    )


def stacked_batch():
    outputs, targets = random_batch([5, 5], 30, 7)
    labels, boxes = (torch.stack([t[key] for t in targets]) for key in ("labels", "boxes"))
    return outputs["pred_logits"], outputs["pred_boxes"], labels, boxes


def test_matching_cost_equals_published_image_by_image():
    inputs, weights = stacked_batch(), CostWeights(1, 5, 2)
    cost = matching_cost(matching_cost_terms(*inputs, weights), weights, None)
    for image in range(2):
        terms = published_terms(*(t[image] for t in inputs))
        expected = 5 * terms.cost_bbox + 1 * terms.cost_class + 2 * terms.cost_giou
        # to the last bit: a tie of the published cost is a tie here
        assert_close(cost[image], expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matching_cost_of_half_precision_is_float32(dtype):
    logits, boxes, labels, target_boxes = stacked_batch()
    halves = logits.to(dtype), boxes.to(dtype), labels, target_boxes
    rounded = halves[0].float(), halves[1].float(), labels, target_boxes
    expected = matching_cost_terms(*rounded, CostWeights(1, 5, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = matching_cost_terms(*halves, CostWeights(1, 5, 2))
    assert_close(terms, expected, rtol=0, atol=0)


def test_terms_without_weight_are_not_computed():
    inputs = stacked_batch()
    terms = matching_cost_terms(*inputs, CostWeights(0, 1, 0))
    assert terms.cost_class is None
    assert terms.cost_giou is None
    extra = torch.rand_like(terms.cost_bbox)
    assert_close(matching_cost(terms, CostWeights(0, 1, 0), extra), terms.cost_bbox + extra)
    with pytest.raises(ValueError, match="nothing to match by"):
        matching_cost(CostTerms(None, None, None), CostWeights(0, 0, 0), None)


def class_costs(x, class_cost):
    """The class term of single logits x, all of column 0, and boxes that are equal."""
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]], dtype=x.dtype)
    inputs = x.view(1, -1, 1), box.expand(1, len(x), 4), torch.zeros(1, 1, dtype=torch.int64), box
    return matching_cost_terms(*inputs, CostWeights(1, 0, 0), class_cost).cost_class.flatten()


def test_class_costs_are_the_published_formulas():
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    p = 1 / (1 + torch.exp(-x))
    for alpha, gamma in [(0.25, 2.0), (0.4, 1.5)]:
        hit, miss = alpha * (1 - p) ** gamma, (1 - alpha) * p**gamma
        eps = 1e-3
        expected = hit * -torch.log(p + eps) - miss * -torch.log(1 - p + eps)
        assert_close(class_costs(x, ClassCost("focal", alpha, gamma, eps)), expected)
        expected = hit * -torch.log(p) - miss * -torch.log(1 - p)
        assert_close(class_costs(x, ClassCost("focal_logits", alpha, gamma)), expected)
    assert_close(class_costs(x, ClassCost("iou_aware", 4.0)), -p)  # IoU 1


def test_iou_aware_cost_counts_the_overlap():
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.6, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]]])
    terms = matching_cost_terms(
        torch.zeros(1, 3, 1),
        boxes,
        torch.zeros(1, 1, dtype=torch.int64),
        boxes[:, :1],
        CostWeights(1, 0, 0),
        ClassCost("iou_aware", 2.0),
    )
    assert_close(terms.cost_class.flatten(), torch.tensor([-0.5, -0.5 * 0.6**2, 0]))


def test_label_outside_of_the_logits_is_not_a_number():
    logits, boxes, labels, target_boxes = stacked_batch()
    labels[0, 1], labels[1, 2] = 8, -1
    cost = matching_cost_terms(logits, boxes, labels, target_boxes, CostWeights()).cost_class
    expected = torch.zeros(2, 5, dtype=torch.bool)
    expected[0, 1] = expected[1, 2] = True
    assert_close(cost.isnan(), expected[:, None].expand(2, 30, 5))


NON_FINITE = torch.tensor([[1.0, torch.nan], [torch.inf, -3.0], [-torch.inf, 2.0]])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("error", NON_FINITE),
        ("worst", [[1, 6], [6, -3], [6, 2]]),  # 2 + 3 + 1
        ((0.5, 7.0, -9.0), [[1, 0.5], [7, -3], [-9, 2]]),
    ],
    ids=str,
)
def test_non_finite_costs_are_replaced(policy, expected):
    replaced = replace_non_finite(NON_FINITE, policy)
    assert_close(replaced, torch.as_tensor(expected, dtype=torch.float32), equal_nan=True)


def test_groups_and_repeats_are_problems_of_their_own():
    """By brute force: every target twice, in each half of the queries."""
    logits, boxes, targets = random_case([2], 8, layers=1)
    match = hungarian_match(logits, boxes, targets, CostWeights(1, 5, 2), groups=2, repeat=2)
    weights = CostWeights(1, 5, 2)
    terms = matching_cost_terms(
        logits[0], boxes[0], targets.labels[:, :2], targets.boxes[:, :2], weights
    )
    (cost,) = matching_cost(terms, weights, None)
    slots = match.query_of_target.view(2, 2, 8)
    for group in range(2):
        part = cost[group * 4 : group * 4 + 4]
        expected = least_total(part.repeat(1, 2))
        assert match.cost[0, 0, group].item() == pytest.approx(expected, abs=1e-5)
        chosen = slots[group, :, :2]
        assert chosen.flatten().sort()[0].tolist() == list(range(group * 4, group * 4 + 4))
        assert cost[chosen, torch.arange(2)].sum().item() == pytest.approx(expected, abs=1e-5)
        for query, target in enumerate(match.target_of_query[0, 0].tolist()):
            assert query in slots[query // 4, :, target]
