# SPDX-License-Identifier: Apache-2.0
"""The checks that a mutant of the box kernels has to pass: ops on inputs, by name.

They call the registered ops, backward ones too, on what the tests of the ops use: sizes that end
within a warp, a block and a split of the rows, ties, boxes without area, NaN, any strides, no
boxes, and inputs of the most pairs or too many.  The CPU twin says what is right.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

import detr_fast  # noqa: F401 (registers the ops)
from tests.mutations.checks import Check, run
from tests.ops.test_boxes import NAN, PAIRWISE, SPECIAL, random_boxes

DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: {"atol": 2e-5, "rtol": 1e-5}}
WITH_NAN = [[0, 0, 1, 1], [NAN, 0, 1, 1], [0, 0, 2, 1]]
NEGATIVE = [[0, 0, 1e-20, -1e-20]]  # an area whose reciprocal is minus infinity, in float32
SIZES = [(1, 1, 1), (1, 7, 33), (2, 5, 70), (3, 257, 2), (1, 511, 1), (2, 3, 32)]
NO_BOXES = [(0, 4, 4), (1, 0, 5), (2, 5, 0)]
NEEDS = [(True, True), (True, False), (False, True)]  # one for each gradient
MOST = 2**31 - 1  # pairs
ROOT = 46341  # squared: more than that


def gradients(sizes: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Contiguous, expanded as that of a sum, and transposed."""
    generator = torch.Generator().manual_seed(7)
    grad = (torch.rand(sizes, generator=generator, dtype=torch.float64) - 0.5).to(dtype)
    yield grad
    yield torch.full((), 0.5, dtype=dtype).expand(sizes)
    yield grad.mT.contiguous().mT if len(sizes) > 1 else grad.flip(0)


def box_sets(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for problems, n, m in (*SIZES, *NO_BOXES):
        yield (
            random_boxes(problems, n, dtype=dtype, seed=1),
            random_boxes(problems, m, dtype=dtype, seed=2),
        )
    for values in (SPECIAL, WITH_NAN, NEGATIVE):  # each makes sums of its own: one NaN hides all
        special = torch.tensor(values, dtype=dtype)
        yield special, special
    boxes = random_boxes(12, dtype=dtype, seed=3)
    yield boxes.t().contiguous().t(), boxes[::2]
    yield boxes.flatten()[2:-2].reshape(-1, 4), boxes  # does not begin on 16 bytes


def matched_sets(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The sets, without what has no partner, and every pair of special boxes: two blocks."""
    for first, second in box_sets(dtype):
        count = min(first.shape[-2], second.shape[-2])
        yield first[..., :count, :], second.roll(1, dims=-2)[..., :count, :]
    special = torch.tensor(SPECIAL, dtype=dtype)
    yield special.repeat_interleave(len(special), 0), special.repeat(len(special), 1)


def pairwise_checks(dtype: torch.dtype) -> Iterator[Check]:
    for (first, second), op in product(box_sets(dtype), PAIRWISE):
        yield Check(op, (first, second))
        sizes = (*first.shape[:-1], second.shape[-2])
        for grad, needs in zip(gradients(sizes, dtype), NEEDS, strict=True):
            yield Check(f"{op}_backward", (grad, first, second, *needs))


def matched_checks(dtype: torch.dtype) -> Iterator[Check]:
    for first, second in matched_sets(dtype):
        for eps in (1e-7, 0.25):
            yield Check("generalized_box_iou_loss", (first, second, eps))
        yield Check("matched_box_losses", (first, second))
        grads = list(gradients(first.shape[:-1], dtype))
        for grad, other, needs in zip(grads, grads[1:] + grads[:1], NEEDS, strict=True):
            yield Check("generalized_box_iou_loss_backward", (grad, first, second, 0.25, *needs))
            yield Check("matched_box_losses_backward", (grad, other, first, second, *needs))


def placements() -> Iterator[Check]:
    """More columns than a block has threads, in pieces; no copies without need, but those."""
    boxes = random_boxes(257, seed=4)
    grad = next(gradients((257, 257), boxes.dtype))
    yield Check("box_iou_backward", (grad, boxes, boxes, False, True))
    yield Check("box_iou", (boxes[:4], boxes[:4]), copies=False)
    buffer = boxes.flatten()
    for begin in range(2 * 17):  # an address that 17 divides, and not 16, is among them
        yield Check("box_iou", (buffer[begin : begin + 4].view(1, 4), boxes[:1]))


def limits() -> Iterator[Check]:
    """As many pairs as the kernels count, and one more."""
    one, none = torch.zeros(1, 4), torch.zeros(0, 4)
    most, more = one.expand(MOST, 4), one.expand(MOST + 1, 4)
    for op in PAIRWISE:
        yield Check(op, (most, none), right=(torch.empty(MOST, 0),))
        yield Check(op, (none, most), right=(torch.empty(0, MOST),))
        yield Check(op, (more, none), f"expected at most {MOST} pairs, got 1 x {MOST + 1} x 0")
        yield Check(op, (none, more), f"expected at most {MOST} pairs, got 1 x 0 x {MOST + 1}")
    message = f"expected at most {MOST} pairs, got {MOST + 1};"
    yield Check("generalized_box_iou_loss", (more, more, 0.0), message)
    yield Check("matched_box_losses", (more, more), message)


def refusals() -> Iterator[Check]:
    boxes, grad = torch.rand(3, 4), torch.rand(3, 3)
    many = torch.zeros(1, 4).expand(ROOT, 4)
    for op in PAIRWISE:
        yield Check(op, (boxes[:, :3], boxes), "boxes1: expected shape")
        yield Check(op, (boxes, boxes.double()), "boxes2: expected the dtype")
        yield Check(op, (many, many), "expected at most")
        yield Check(f"{op}_backward", (grad[:2], boxes, boxes, True, True), "grad: expected shape")
        huge = torch.zeros(1, 1).expand(ROOT, ROOT)
        yield Check(f"{op}_backward", (huge, many, many, True, True), "expected at most")
    yield Check("generalized_box_iou_loss", (boxes, boxes[:2], 0.0), "boxes2: expected shape")
    wrong = (grad[0, :2], boxes, boxes, 0.0, True, True)
    yield Check("generalized_box_iou_loss_backward", wrong, "grad: expected shape")
    yield Check("matched_box_losses", (boxes, boxes[:2]), "tgt: expected shape")
    for first, second, name in ((2, 3, "grad_l1"), (3, 2, "grad_giou")):
        wrong = (grad[0, :first], grad[0, :second], boxes, boxes, True, True)
        yield Check("matched_box_losses_backward", wrong, f"{name}: expected shape")


def all_checks() -> list[Check]:
    """With the results of the CPU twin, but of empty ones that it would take hours for."""
    checks = [
        *(check for dtype in DTYPES for check in pairwise_checks(dtype)),
        *(check for dtype in DTYPES for check in matched_checks(dtype)),
        *placements(),
        *limits(),
        *refusals(),
    ]
    return [
        check._replace(
            right=check.right if check.right or check.message else run(check),
            tolerance=TOLERANCE,
            # the schedule does not depend on the type
            every_schedule=check.arguments[0].dtype != torch.float64,
        )
        for check in checks
    ]
