# SPDX-License-Identifier: Apache-2.0
"""Box expressions in plain torch."""

import pytest
import torch
import torchvision.ops as vision
from torch.testing import assert_close

from detr_fast import reference
from tests.matcher.published import corners, giou_matrix, random_boxes


def test_box_cxcywh_to_xyxy():
    boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.125]], [[10, 20, 4, 6]]])
    expected = torch.tensor([[[0.25, 0.1875, 0.75, 0.3125]], [[8, 17, 12, 23]]])
    assert_close(reference.box_cxcywh_to_xyxy(boxes), expected)


def test_box_xyxy_to_cxcywh():
    boxes = torch.tensor([[[0.25, 0.1875, 0.75, 0.3125]], [[8, 17, 12, 23]]])
    expected = torch.tensor([[[0.5, 0.25, 0.5, 0.125]], [[10, 20, 4, 6]]])
    assert_close(reference.box_xyxy_to_cxcywh(boxes), expected)


def test_box_area_is_signed():
    boxes = torch.tensor([[1, 2, 4, 4.0], [4, 2, 1, 4], [3, 3, 3, 9]])
    assert_close(reference.box_area(boxes), torch.tensor([6, -6, 0.0]))


@pytest.mark.parametrize("name", ["box_iou", "generalized_box_iou", "generalized_box_iou_loss"])
def test_overlap_equals_torchvision(name):
    g = torch.Generator().manual_seed(0)
    boxes = [corners(random_boxes(2, 9, generator=g, dtype=torch.float64)) for _ in range(2)]
    inputs = [[b.clone().requires_grad_() for b in boxes] for _ in range(2)]
    results = [getattr(of, name)(*b) for of, b in zip((reference, vision), inputs, strict=True)]
    assert_close(*results)
    for result in results:
        (result * torch.linspace(-1, 1, 9, dtype=torch.float64)).sum().backward()
    assert_close([b.grad for b in inputs[0]], [b.grad for b in inputs[1]])


@pytest.mark.parametrize("eps", [0, 0.25])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_generalized_box_iou_loss_has_the_options_of_torchvision(reduction, eps):
    g = torch.Generator().manual_seed(0)
    boxes = [corners(random_boxes(9, generator=g)) for _ in range(2)]
    ours, theirs = (
        of.generalized_box_iou_loss(*boxes, reduction=reduction, eps=eps)
        for of in (reference, vision)
    )
    assert_close(ours, theirs)


def test_boxes_without_area_have_finite_values_and_gradients():
    boxes = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0.0]], requires_grad=True)
    assert_close(reference.box_iou(boxes, boxes), torch.zeros(2, 2))
    giou = reference.generalized_box_iou(boxes, boxes)
    assert_close(giou, torch.tensor([[0, -1], [-1, 0.0]]))
    giou.sum().backward()
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_is_computed_in_float32(dtype):
    boxes = corners(random_boxes(5, generator=torch.Generator().manual_seed(0))).to(dtype)
    for name in ("box_iou", "generalized_box_iou", "generalized_box_iou_loss"):
        op = getattr(reference, name)
        assert_close(op(boxes, boxes), op(boxes.float(), boxes.float()), atol=0, rtol=0)


def test_generalized_box_iou_equals_published():
    g = torch.Generator().manual_seed(0)
    boxes1 = corners(random_boxes(40, generator=g, dtype=torch.float64))
    boxes2 = corners(random_boxes(30, generator=g, dtype=torch.float64))
    assert_close(reference.generalized_box_iou(boxes1, boxes2), giou_matrix(boxes1, boxes2))


def test_matched_box_losses_equal_the_diagonal():
    g = torch.Generator().manual_seed(0)
    tgt = random_boxes(50, generator=g, dtype=torch.float64)
    ours = random_boxes(50, generator=g, dtype=torch.float64).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weights = torch.rand(2, 50, generator=g, dtype=torch.float64)

    losses = torch.stack(reference.matched_box_losses(ours, tgt))
    expected = torch.stack(
        [
            torch.nn.functional.l1_loss(theirs, tgt, reduction="none").sum(1),
            1 - giou_matrix(corners(theirs), corners(tgt)).diagonal(),
        ]
    )
    assert_close(losses, expected)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(ours.grad, theirs.grad)


def test_matched_box_losses_of_equal_boxes_are_zero():
    boxes = random_boxes(9, generator=torch.Generator().manual_seed(0))
    for loss in reference.matched_box_losses(boxes, boxes):
        assert_close(loss, torch.zeros(9))


def test_matched_box_losses_of_no_pairs():
    boxes = torch.zeros(0, 4, requires_grad=True)
    l1, giou_loss = reference.matched_box_losses(boxes, boxes.detach())
    assert l1.shape == giou_loss.shape == (0,)
    (l1.sum() + giou_loss.sum()).backward()
    assert boxes.grad.shape == (0, 4)
