# SPDX-License-Identifier: Apache-2.0
"""The box ops against their reference twins."""

import inspect

import pytest
import torch
from torch.testing import assert_close

import detr_fast
from detr_fast import reference

# float32 gradients are sums of up to 300 terms, added in another order than torch does
TOLERANCE = {torch.float32: {"atol": 1e-4, "rtol": 1e-5}, torch.float64: {}}


def random_boxes(count, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, size = torch.rand(2, count, 2, generator=generator, dtype=torch.float64)
    return torch.cat([low, low + 0.01 + size / 2], dim=1).to(device, dtype)


def run(op, boxes1, boxes2):
    """Values of `op` and the gradients of both arguments under a fixed weighting."""
    boxes1, boxes2 = (b.detach().clone().requires_grad_() for b in (boxes1, boxes2))
    values = op(boxes1, boxes2)
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(3))
    values.backward(weights.to(values) - 0.5)
    return values.detach(), boxes1.grad, boxes2.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 33), (100, 20), (300, 5), (0, 5), (5, 0), (0, 0)])
def test_generalized_box_iou_equals_reference(device, dtype, n, m):
    boxes1 = random_boxes(n, device, dtype, seed=1)
    boxes2 = random_boxes(m, device, dtype, seed=2)
    ours = run(detr_fast.generalized_box_iou, boxes1, boxes2)
    expected = run(reference.generalized_box_iou, boxes1, boxes2)
    assert_close(ours, expected, **TOLERANCE[dtype])
    assert_close(ours[0], expected[0])


def test_generalized_box_iou_splits_gradient_at_ties(device):
    """Equal, nested, touching, aligned and disjoint boxes: every comparison is a tie somewhere."""
    corners = [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 2, 1], [1, 0, 2, 1], [1, 1, 2, 2], [3, 0, 4, 4]]
    boxes = torch.tensor(corners, dtype=torch.float64, device=device)
    ours = run(detr_fast.generalized_box_iou, boxes, boxes)
    assert_close(ours, run(reference.generalized_box_iou, boxes, boxes))


def test_generalized_box_iou_takes_any_strides(device):
    boxes1 = random_boxes(8, device).t().contiguous().t()
    boxes2 = random_boxes(24, device, seed=2)[::2]
    ours = run(detr_fast.generalized_box_iou, boxes1, boxes2)
    expected = run(reference.generalized_box_iou, boxes1, boxes2)
    assert_close(ours, expected, **TOLERANCE[torch.float32])


def test_generalized_box_iou_without_area_is_nan(device):
    point = torch.zeros(1, 4, device=device)
    assert detr_fast.generalized_box_iou(point, point).isnan().all()


def test_generalized_box_iou_passes_gradcheck(device):
    boxes1 = random_boxes(5, device, torch.float64, seed=1).requires_grad_()
    boxes2 = random_boxes(4, device, torch.float64, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(detr_fast.generalized_box_iou, (boxes1, boxes2))


def test_generalized_box_iou_refuses_second_derivatives(device):
    boxes = random_boxes(3, device).requires_grad_()
    total = detr_fast.generalized_box_iou(boxes, boxes).square().sum()
    (grad,) = torch.autograd.grad(total, boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("needs_grad", [(True, True), (True, False), (False, False)])
def test_generalized_box_iou_passes_opcheck(device, needs_grad):
    boxes = [
        random_boxes(n, device).requires_grad_(g) for n, g in zip((5, 3), needs_grad, strict=True)
    ]
    torch.library.opcheck(torch.ops.detr_fast.generalized_box_iou.default, boxes)
    grad = torch.ones(5, 3, device=device)
    plain = [b.detach() for b in boxes]
    torch.library.opcheck(torch.ops.detr_fast.generalized_box_iou_backward.default, (grad, *plain))


def test_generalized_box_iou_compiles_without_graph_break(device):
    compiled = torch.compile(detr_fast.generalized_box_iou, fullgraph=True, backend="aot_eager")
    boxes1, boxes2 = random_boxes(9, device, seed=1), random_boxes(6, device, seed=2)
    assert_close(run(compiled, boxes1, boxes2), run(detr_fast.generalized_box_iou, boxes1, boxes2))


@pytest.mark.parametrize(
    ("boxes1", "boxes2", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(2, 4), r"boxes1: expected shape \(\*, 4\), got \(3, 5\)"),
        (torch.zeros(3, 4), torch.zeros(4), r"boxes2: expected shape \(\*, 4\), got \(4,\)"),
        (torch.zeros(3, 4), torch.zeros(2, 4).double(), "boxes2: expected the dtype of boxes1"),
        (torch.zeros(3, 4).int(), torch.zeros(2, 4).int(), "not implemented for 'Int'"),
    ],
    ids=["width", "dims", "mixed", "integer"],
)
def test_generalized_box_iou_names_bad_input(device, boxes1, boxes2, message):
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        detr_fast.generalized_box_iou(boxes1.to(device), boxes2.to(device))


def test_reference_has_the_same_signature():
    def shape(function):
        parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
        return [(p.name, p.default) for p in parameters]

    names = set(detr_fast.ops.__all__) - {"backend", "use_reference"}
    assert names <= set(reference.__all__)
    for name in names:
        assert shape(getattr(detr_fast.ops, name)) == shape(getattr(reference, name))


def test_use_reference_puts_the_reference_in_place():
    boxes = random_boxes(3, "cpu").requires_grad_()
    compiled = detr_fast.generalized_box_iou(boxes, boxes).grad_fn
    with detr_fast.ops.use_reference():
        assert detr_fast.ops.backend()["cpu"].startswith("reference")
        twin = detr_fast.generalized_box_iou(boxes, boxes).grad_fn
    assert detr_fast.ops.backend()["cpu"].startswith("compiled")
    assert type(compiled) is not type(twin)
