# SPDX-License-Identifier: Apache-2.0
"""Box expressions in plain torch."""

import torch
from torch.testing import assert_close

from detr_fast import reference
from tests.matcher.published import corners, giou_matrix, random_boxes


def test_box_cxcywh_to_xyxy():
    boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.125]], [[10, 20, 4, 6]]])
    expected = torch.tensor([[[0.25, 0.1875, 0.75, 0.3125]], [[8, 17, 12, 23]]])
    assert_close(reference.box_cxcywh_to_xyxy(boxes), expected)


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
