# SPDX-License-Identifier: Apache-2.0
"""Assignment and matching cost in plain torch and scipy."""

import itertools
import sys

import pytest
import torch
from torch.testing import assert_close

from detr_fast.reference.matcher import linear_sum_assignment, matching_cost
from tests.matcher.published import corners, giou_matrix, random_batch

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


def test_matching_cost_equals_published_image_by_image():
    outputs, targets = random_batch([5, 5], 30, 7)
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    labels = torch.stack([t["labels"] for t in targets])
    target_boxes = torch.stack([t["boxes"] for t in targets])
    cost = matching_cost(logits, boxes, labels, target_boxes, 1, 5, 2)
    for image in range(2):
        expected = (
            5 * torch.cdist(boxes[image], target_boxes[image], p=1)
            + 1 * -logits[image].softmax(-1)[:, labels[image]]
            + 2 * -giou_matrix(corners(boxes[image]), corners(target_boxes[image]))
        )
        # to the last bit: a tie of the published cost is a tie here
        assert_close(cost[image], expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matching_cost_of_half_precision_is_float32(dtype):
    outputs, (target,) = random_batch([5], 30, 7)
    inputs = outputs["pred_logits"], outputs["pred_boxes"], target["labels"][None]
    halves = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    rounded = [x.float() if x.is_floating_point() else x for x in halves]
    expected = matching_cost(*rounded, target["boxes"][None], 1, 5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = matching_cost(*halves, target["boxes"][None], 1, 5, 2)
    assert_close(cost, expected, rtol=0, atol=0)
