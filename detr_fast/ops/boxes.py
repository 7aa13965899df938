# SPDX-License-Identifier: Apache-2.0
"""Box ops.

Boxes are corners ``(x0, y0, x1, y1)`` with ``x0 <= x1`` and ``y0 <= y1``, or, where a function says
so, centre and size ``(cx, cy, w, h)``; float32 or float64.  Half and bfloat16 boxes are computed in
float32 and give float32, also under autocast.

Values are those of torchvision where these are finite.  Elsewhere a pair without union has IoU 0
and a pair without hull has its IoU as generalized IoU; such a term is constant, its gradient 0.  A
box with NaN gives NaN in its own pairs.  The gradient of a maximum is split half at a tie; sides
that only touch have none.  Nothing here waits for the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detr_fast import reference
from detr_fast.ops._library import with_reference
from detr_fast.reference.boxes import at_least_float32, reduce

# composites of torch ops: detr_fast/reference/boxes.py says why
box_cxcywh_to_xyxy = reference.box_cxcywh_to_xyxy
box_xyxy_to_cxcywh = reference.box_xyxy_to_cxcywh
box_area = reference.box_area

_ops = torch.ops.detr_fast
Policy = Literal["off", "async", "sync"]
_policy: Policy = "off"


@contextmanager
def check_boxes(policy: Policy) -> Iterator[None]:
    """Within this context the box ops check their boxes, in all threads.

    A box must have ``x0 <= x1`` and ``y0 <= y1`` (``w >= 0`` and ``h >= 0`` where it is centre and
    size); NaN fails.  Outside of any context nothing is checked.

    Args:
        policy (str): ``"off"``; ``"async"``, which has the device check and does not wait for it:
            a bad box stops the program at its next synchronisation (on the CPU at once); or
            ``"sync"``, which waits and names the first bad box.

    Raises:
        ValueError: if the policy is none of these; from an op, with ``"sync"``.
        RuntimeError: from an op on the CPU, with ``"async"``.

    Examples:
        >>> with detr_fast.ops.check_boxes("sync"):  # doctest: +SKIP
        ...     giou = detr_fast.ops.generalized_box_iou(boxes1, boxes2)
    """
    global _policy
    if policy not in ("off", "async", "sync"):
        raise ValueError(f'check_boxes: expected "off", "async" or "sync", got {policy!r}')
    before, _policy = _policy, policy
    try:
        yield
    finally:
        _policy = before


def _require(name: str, boxes: Tensor, fits: Tensor, rule: str) -> None:
    """Apply the policy to ``fits`` (Tensor[..., 2]), the two conditions of each box."""
    if _policy == "async":
        torch._assert_async(fits.all(), f"{name}: expected {rule}")
        return
    bad = (~fits.all(-1)).nonzero()
    if len(bad) > 0:
        at = bad[0].tolist()
        raise ValueError(
            f"{name}{at}: expected {rule}, got {boxes[tuple(at)].tolist()} "
            f"({len(bad)} bad of {fits[..., 0].numel()} boxes)"
        )


def _check_corners(boxes1: Tensor, boxes2: Tensor, *_: Any, **__: Any) -> None:
    if _policy != "off":
        for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
            fits = boxes[..., :2] <= boxes[..., 2:]
            _require(name, boxes, fits, "x0 <= x1 and y0 <= y1")


def _check_sizes(src: Tensor, tgt: Tensor) -> None:
    if _policy != "off":
        for name, boxes in (("src", src), ("tgt", tgt)):
            _require(name, boxes, boxes[..., 2:] >= 0, "w >= 0 and h >= 0")


@with_reference(reference.box_iou, _check_corners)
def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU (Jaccard index) of every pair of boxes.

    Differentiable once in both arguments; equal to ``torchvision.ops.box_iou``, but the pairs are
    computed in one pass and nothing of size ``N x M`` is kept for the backward.

    Args:
        boxes1 (Tensor[..., N, 4]): first set of boxes, corners.
        boxes2 (Tensor[..., M, 4]): second set, of the same leading sizes, dtype and device.

    Returns:
        Tensor[..., N, M]: IoU in [0, 1].

    Raises:
        RuntimeError: if a shape, dtype or device does not fit.
    """
    iou: Tensor = _ops.box_iou.default(at_least_float32(boxes1), at_least_float32(boxes2))
    return iou


@with_reference(reference.generalized_box_iou, _check_corners)
def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of every pair of boxes (Rezatofighi et al., CVPR 2019, algorithm 1).

    Differentiable once in both arguments; equal to ``torchvision.ops.generalized_box_iou``, but the
    pairs are computed in one pass and nothing of size ``N x M`` is kept for the backward.

    Args:
        boxes1 (Tensor[..., N, 4]): first set of boxes, corners.
        boxes2 (Tensor[..., M, 4]): second set, of the same leading sizes, dtype and device.

    Returns:
        Tensor[..., N, M]: GIoU in [-1, 1].

    Raises:
        RuntimeError: if a shape, dtype or device does not fit.
    """
    giou: Tensor = _ops.generalized_box_iou.default(
        at_least_float32(boxes1), at_least_float32(boxes2)
    )
    return giou


@with_reference(reference.generalized_box_iou_loss, _check_corners)
def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """``1 - GIoU`` of matched pairs (Rezatofighi et al., CVPR 2019, algorithm 2).

    Differentiable once in both boxes; equal to ``torchvision.ops.generalized_box_iou_loss``.

    Args:
        boxes1 (Tensor[..., 4]): first box of each pair, corners.
        boxes2 (Tensor[..., 4]): second box, of the same shape, dtype and device.
        reduction (str): ``"none"``, ``"mean"`` (0 of no pairs) or ``"sum"``.
        eps (float): added to the areas of union and hull before they divide.

    Returns:
        Tensor[...]: losses in [0, 2], or their mean or sum.

    Raises:
        RuntimeError: if a shape, dtype or device does not fit.
        ValueError: if the reduction is unknown.
    """
    loss: Tensor = _ops.generalized_box_iou_loss.default(
        at_least_float32(boxes1), at_least_float32(boxes2), eps
    )
    return reduce(loss, reduction)


@with_reference(reference.matched_box_losses, _check_sizes)
def matched_box_losses(src: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and ``1 - GIoU`` of matched pairs, boxes as centre and size.

    The two box losses of DETR (Carion et al., ECCV 2020, equation 4) in one pass, and their
    gradients in another; differentiable once in both arguments.

    Args:
        src (Tensor[..., 4]): predicted boxes, ``(cx, cy, w, h)``.
        tgt (Tensor[..., 4]): the box that each of them shall become; same shape, dtype, device.

    Returns:
        tuple[Tensor[...], Tensor[...]]: L1 summed over the four coordinates, and the GIoU loss.

    Raises:
        RuntimeError: if a shape, dtype or device does not fit.
    """
    losses: tuple[Tensor, Tensor] = _ops.matched_box_losses.default(
        at_least_float32(src), at_least_float32(tgt)
    )
    return losses


def _sides_fake(
    boxes1: Tensor, boxes2: Tensor, needs1: bool, needs2: bool
) -> tuple[Tensor, Tensor]:
    """The result of every backward op: gradients of both sides, (0,) where not needed."""
    sides = ((boxes1, needs1), (boxes2, needs2))
    grad1, grad2 = (b.new_empty(b.shape if needed else 0) for b, needed in sides)
    return grad1, grad2


def _register_pairwise(name: str) -> None:
    backward_op = getattr(_ops, f"{name}_backward").default

    def fake(boxes1: Tensor, boxes2: Tensor) -> Tensor:
        return boxes1.new_empty(*boxes1.shape[:-1], boxes2.shape[-2])

    def backward_fake(
        grad: Tensor, boxes1: Tensor, boxes2: Tensor, needs1: bool, needs2: bool
    ) -> tuple[Tensor, Tensor]:
        return _sides_fake(boxes1, boxes2, needs1, needs2)

    def setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        needs1, needs2 = ctx.needs_input_grad
        grad1, grad2 = backward_op(grad, *ctx.saved_tensors, needs1, needs2)
        return grad1 if needs1 else None, grad2 if needs2 else None

    torch.library.register_fake(f"detr_fast::{name}", fake)
    torch.library.register_fake(f"detr_fast::{name}_backward", backward_fake)
    torch.library.register_autograd(f"detr_fast::{name}", backward, setup_context=setup)


_register_pairwise("box_iou")
_register_pairwise("generalized_box_iou")


@torch.library.register_fake("detr_fast::generalized_box_iou_loss")
def _generalized_box_iou_loss_fake(boxes1: Tensor, boxes2: Tensor, eps: float) -> Tensor:
    return boxes1.new_empty(boxes1.shape[:-1])


@torch.library.register_fake("detr_fast::generalized_box_iou_loss_backward")
def _generalized_box_iou_loss_backward_fake(
    grad: Tensor, boxes1: Tensor, boxes2: Tensor, eps: float, needs1: bool, needs2: bool
) -> tuple[Tensor, Tensor]:
    return _sides_fake(boxes1, boxes2, needs1, needs2)


def _generalized_box_iou_loss_setup(
    ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor
) -> None:
    boxes1, boxes2, ctx.eps = inputs
    ctx.save_for_backward(boxes1, boxes2)


@once_differentiable
def _generalized_box_iou_loss_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    needs1, needs2, _ = ctx.needs_input_grad
    grad1, grad2 = _ops.generalized_box_iou_loss_backward.default(
        grad, *ctx.saved_tensors, ctx.eps, needs1, needs2
    )
    return grad1 if needs1 else None, grad2 if needs2 else None, None


torch.library.register_autograd(
    "detr_fast::generalized_box_iou_loss",
    _generalized_box_iou_loss_backward,
    setup_context=_generalized_box_iou_loss_setup,
)


@torch.library.register_fake("detr_fast::matched_box_losses")
def _matched_box_losses_fake(src: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:
    return src.new_empty(src.shape[:-1]), src.new_empty(src.shape[:-1])


@torch.library.register_fake("detr_fast::matched_box_losses_backward")
def _matched_box_losses_backward_fake(
    grad_l1: Tensor, grad_giou: Tensor, src: Tensor, tgt: Tensor, needs_src: bool, needs_tgt: bool
) -> tuple[Tensor, Tensor]:
    return _sides_fake(src, tgt, needs_src, needs_tgt)


def _matched_box_losses_setup(
    ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs)


@once_differentiable
def _matched_box_losses_backward(
    ctx: Any, grad_l1: Tensor, grad_giou: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    needs_src, needs_tgt = ctx.needs_input_grad
    grad_src, grad_tgt = _ops.matched_box_losses_backward.default(
        grad_l1, grad_giou, *ctx.saved_tensors, needs_src, needs_tgt
    )
    return grad_src if needs_src else None, grad_tgt if needs_tgt else None


torch.library.register_autograd(
    "detr_fast::matched_box_losses",
    _matched_box_losses_backward,
    setup_context=_matched_box_losses_setup,
)
