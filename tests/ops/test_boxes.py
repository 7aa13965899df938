# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of the box ops: torchvision, DETR's expressions and the reference twins."""

from typing import NamedTuple

import pytest
import torch
import torchvision.ops as vision
from torch.testing import assert_close

from detr_fast import ops, reference

PAIRWISE = ["box_iou", "generalized_box_iou"]
MATCHED = ["generalized_box_iou_loss", "matched_box_losses"]
DTYPES = [torch.float32, torch.float64]
# float32 gradients are sums of up to 300 terms, added in another order than torch does
TOLERANCE = {torch.float32: {"atol": 1e-4, "rtol": 1e-5}, torch.float64: {}}
NAN = float("nan")


def random_boxes(*sizes, device="cpu", dtype=torch.float32, seed=0):
    """Corners, none without area."""
    generator = torch.Generator().manual_seed(seed)
    low, size = torch.rand(2, *sizes, 2, generator=generator, dtype=torch.float64)
    return torch.cat([low, low + 0.01 + size / 2], dim=-1).to(device, dtype)


def original_losses(src, tgt):
    """The box losses of facebookresearch/detr: the diagonal of the matrix of all pairs."""
    corners = (vision.box_convert(b, "cxcywh", "xyxy") for b in (src, tgt))
    giou = torch.diag(vision.generalized_box_iou(*corners))
    return torch.nn.functional.l1_loss(src, tgt, reduction="none").sum(-1), 1 - giou


PEERS = {name: getattr(vision, name) for name in [*PAIRWISE, "generalized_box_iou_loss"]}
PEERS["matched_box_losses"] = original_losses


class Outcome(NamedTuple):
    values: list
    gradients: list


def run(op, *boxes, weigh=None):
    """Values of `op` and the gradients of its arguments under a fixed weighting."""
    boxes = [b.detach().clone().requires_grad_() for b in boxes]
    values = op(*boxes)
    values = list(values) if isinstance(values, tuple) else [values]
    generator = torch.Generator().manual_seed(3)
    weights = [torch.rand(v.shape, generator=generator).to(v) - 0.5 for v in values]
    weights = [weigh(w) for w in weights] if weigh else weights
    gradients = torch.autograd.grad(values, boxes, weights)
    return Outcome([v.detach() for v in values], list(gradients))


def both(name):
    return getattr(ops, name), getattr(reference, name)


# equal, nested, touching, aligned, disjoint; points, segments; negative extents
SPECIAL = [
    *([0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 2, 1], [1, 0, 2, 1], [1, 1, 2, 2], [3, 0, 4, 4]),
    *([0.25, 0.25, 0.5, 0.75], [-3, -4, -2, 0.5], [0, 0, 1, 1 + 1e-6]),
    *([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [3, 3, 3, 3], [0, 0, 0, 3], [0, 1, 4, 1]),
    *([2, 2, 1, 1], [4, 0, 3, 4], [1, 3, 2, -1], [2, 2, 1, 1]),
]
# areas that overflow, are huge, denormal, or underflow to 0
EXTREME = [
    *([0, 0, 1e30, 1e30], [0, 0, 1e18, 1e18], [1e17, 1e17, 1e18, 1e18], [-1e18, 0, 1e18, 1]),
    *([0, 0, 1e-20, 1e-20], [0, 0, 2e-20, 1e-20], [0, 0, 1e-30, 1e-30], [0, 0, 1e-40, 1e-40]),
    *([0, 0, 1e-40, 1e18], [1e-30, 1e-30, 1, 1], [0, 0, 1, 1]),
]
SETS = {
    "random": random_boxes(40, seed=1),
    "special": torch.tensor(SPECIAL),
    "extreme": torch.tensor(EXTREME),
}


def as_pairs(name, boxes):
    """Arguments of op `name`: all pairs of boxes, as sets or matched."""
    if name in PAIRWISE:
        return boxes, boxes
    first, second = boxes.repeat_interleave(len(boxes), 0), boxes.repeat(len(boxes), 1)
    if name == "matched_box_losses":
        return ops.box_xyxy_to_cxcywh(first), ops.box_xyxy_to_cxcywh(second)
    return first, second


@pytest.mark.parametrize("boxes", SETS)
@pytest.mark.parametrize("name", PEERS)
def test_values_equal_torchvision_where_finite(device, name, boxes):
    pairs = [b.to(device) for b in as_pairs(name, SETS[boxes])]
    ours, theirs = getattr(ops, name)(*pairs), PEERS[name](*pairs)
    both = [(ours, theirs)] if name != "matched_box_losses" else zip(ours, theirs, strict=True)
    for value, peer in both:
        finite = peer.isfinite()
        assert finite.any()
        assert_close(value[finite], peer[finite], atol=1e-6, rtol=1e-6)


def test_boxes_without_union_or_hull(device):
    """Two equal points, two points apart, a point and a segment through it, a segment twice."""
    first = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 2, 1.0]], device=device)
    second = torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2], [0, 1, 2, 1], [0, 1, 2, 1.0]], device=device)
    giou = torch.tensor([0, -1, 0, 0.0], device=device)
    for i, expected in enumerate(giou):
        pair = first[i : i + 1], second[i : i + 1]
        assert ops.box_iou(*pair) == 0
        assert ops.generalized_box_iou(*pair) == expected
    assert_close(ops.generalized_box_iou_loss(first, second), 1 - giou)
    assert_close(ops.generalized_box_iou_loss(first, second, eps=0), 1 - giou)
    centres = ops.box_xyxy_to_cxcywh(first), ops.box_xyxy_to_cxcywh(second)
    assert_close(ops.matched_box_losses(*centres)[1], 1 - giou)
    points = torch.ones(2, 4, device=device)
    for name in PAIRWISE + MATCHED[:1]:
        for gradient in run(getattr(ops, name), points, points).gradients:
            assert_close(gradient, torch.zeros_like(points))


@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_special_boxes_have_the_gradients_of_the_reference(device, name):
    """Ties split half, sides that touch have none, empty terms are constant."""
    pairs = as_pairs(name, torch.tensor(SPECIAL, dtype=torch.float64, device=device))
    ours, theirs = (run(op, *pairs) for op in both(name))
    assert all(g.isfinite().all() for g in theirs.gradients)
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", PAIRWISE)
def test_nan_stays_in_its_own_pairs(device, name):
    boxes1, boxes2 = random_boxes(5, device=device), random_boxes(37, device=device, seed=1)
    boxes1[1, 0] = boxes2[30, 3] = boxes2[33, 2] = NAN
    expected = torch.zeros(5, 37, dtype=torch.bool, device=device)
    expected[1] = expected[:, 30] = expected[:, 33] = True
    assert_close(getattr(ops, name)(boxes1, boxes2).isnan(), expected)


@pytest.mark.parametrize("name", MATCHED)
def test_nan_stays_in_its_own_pair(device, name):
    boxes1, boxes2 = random_boxes(9, device=device), random_boxes(9, device=device, seed=1)
    boxes1[1, 3] = boxes2[4, 0] = NAN
    expected = torch.zeros(9, dtype=torch.bool, device=device)
    expected[1] = expected[4] = True
    values, gradients = run(getattr(ops, name), boxes1, boxes2)
    for value in values:
        assert_close(value.isnan(), expected)
    for gradient in gradients:
        assert_close(gradient.isnan().any(-1), expected)


# ends within a warp, a block and a split of the rows; more rows than columns and fewer; no boxes
SIZES = [(1, 1), (7, 33), (100, 20), (300, 5), (3, 270), (0, 5), (5, 0), (0, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_equals_reference(device, name, n, m, dtype):
    boxes = random_boxes(n, device=device, dtype=dtype), random_boxes(m, seed=2).to(device, dtype)
    ours, theirs = (run(op, *boxes) for op in both(name))
    assert_close(ours.values, theirs.values)
    assert_close(ours.gradients, theirs.gradients, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(), (1,), (300,), (2, 3, 50), (0,), (4, 0)], ids=str)
@pytest.mark.parametrize("name", MATCHED)
def test_matched_equals_reference(device, name, sizes, dtype):
    boxes = [random_boxes(*sizes, device=device, dtype=dtype, seed=seed) for seed in (1, 2)]
    ours, theirs = (run(op, *boxes) for op in both(name))
    assert_close(ours.values, theirs.values)
    assert_close(ours.gradients, theirs.gradients, **TOLERANCE[dtype])


@pytest.mark.parametrize("leading", [(1,), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_takes_batches(device, name, leading):
    boxes1 = random_boxes(*leading, 9, device=device, dtype=torch.float64)
    boxes2 = random_boxes(*leading, 35, device=device, dtype=torch.float64, seed=1)
    ours = run(getattr(ops, name), boxes1, boxes2)
    assert ours.values[0].shape == (*leading, 9, 35)
    assert_close(ours, run(getattr(reference, name), boxes1, boxes2))


LAYOUTS = {
    "expanded": lambda g: g.sum().expand(g.shape),
    "transposed": lambda g: g.mT.contiguous().mT,
    "permuted": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_gradients_come_in_any_layout(device, name, layout):
    sizes = (3, 2, 10) if name in PAIRWISE else (3, 2)
    boxes = [random_boxes(*sizes, device=device, dtype=torch.float64, seed=s) for s in (1, 2)]
    ours, theirs = (run(op, *boxes, weigh=LAYOUTS[layout]) for op in both(name))
    assert_close(ours.gradients, theirs.gradients)


@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_boxes_come_in_any_layout(device, name):
    """Transposed, sliced, and a view that begins between two 16-byte borders."""
    boxes = random_boxes(8, device=device)
    buffer = torch.cat([boxes.new_zeros(1), boxes.flatten()])
    for other in (boxes.t().contiguous().t(), boxes.repeat(1, 2)[:, :4], buffer[1:].view(8, 4)):
        plain = getattr(ops, name)(boxes, boxes.flip(0).contiguous())
        assert_close(getattr(ops, name)(other, boxes.flip(0)), plain, atol=0, rtol=0)


@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_one_side_alone_has_the_same_gradient(device, name):
    sizes = 12, 12 if name in MATCHED else 40
    boxes = [random_boxes(n, device=device, seed=n) for n in sizes]
    _, expected = run(getattr(ops, name), *boxes)
    for side in (0, 1):

        def one_side(box, side=side):
            arguments = [*boxes]
            arguments[side] = box
            return getattr(ops, name)(*arguments)

        gradient = run(one_side, boxes[side]).gradients[0]
        assert_close(gradient, expected[side], atol=0, rtol=0)


@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_passes_gradcheck(device, name):
    boxes = [
        random_boxes(4, device=device, dtype=torch.float64, seed=seed).requires_grad_()
        for seed in (1, 2)
    ]
    assert torch.autograd.gradcheck(getattr(ops, name), boxes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_half_is_computed_in_float32(device, name, dtype):
    boxes = [random_boxes(6, device=device, dtype=dtype, seed=seed) for seed in (1, 2)]
    values, gradients = run(getattr(ops, name), *boxes)
    expected = run(getattr(ops, name), *(b.float() for b in boxes))
    assert_close(values, expected.values, atol=0, rtol=0)
    assert_close(gradients, [g.to(dtype) for g in expected.gradients], atol=0, rtol=0)


def test_conversions_and_area_equal_torchvision():
    boxes = random_boxes(2, 3, seed=5)
    centres = vision.box_convert(boxes, "xyxy", "cxcywh")
    assert_close(ops.box_xyxy_to_cxcywh(boxes), centres)
    assert_close(ops.box_cxcywh_to_xyxy(centres), boxes)
    assert_close(ops.box_area(boxes), vision.box_area(boxes))
    for convert in (ops.box_xyxy_to_cxcywh, ops.box_cxcywh_to_xyxy, ops.box_area):
        assert torch.autograd.gradcheck(convert, boxes.double().requires_grad_())
        assert_close(convert(boxes.half()), convert(boxes.half().float()), atol=0, rtol=0)
