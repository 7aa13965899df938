# SPDX-License-Identifier: Apache-2.0
"""Box ops.  Boxes are corners ``(x0, y0, x1, y1)`` with ``x0 <= x1`` and ``y0 <= y1``."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detr_fast import reference
from detr_fast.ops._library import with_reference


@with_reference(reference.generalized_box_iou)
def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of every pair of boxes (Rezatofighi et al., CVPR 2019).

    Differentiable in both arguments; equal to ``torchvision.ops.generalized_box_iou``, but the
    pairs are computed in one pass and nothing of size ``N x M`` is kept for the backward.

    Args:
        boxes1 (Tensor[N, 4]): first set of boxes, float32 or float64.
        boxes2 (Tensor[M, 4]): second set of boxes, of the same dtype and device.

    Returns:
        Tensor[N, M]: GIoU in [-1, 1]; NaN for a pair of boxes without area.

    Raises:
        RuntimeError: if a shape, dtype or device does not fit.
    """
    giou: Tensor = torch.ops.detr_fast.generalized_box_iou.default(boxes1, boxes2)
    return giou


@torch.library.register_fake("detr_fast::generalized_box_iou")
def _generalized_box_iou_fake(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes2.shape[0])


@torch.library.register_fake("detr_fast::generalized_box_iou_backward")
def _generalized_box_iou_backward_fake(grad: Tensor, boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return torch.empty_like(boxes1, memory_format=torch.contiguous_format)


def _generalized_box_iou_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@once_differentiable
def _generalized_box_iou_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    backward = torch.ops.detr_fast.generalized_box_iou_backward.default
    boxes1, boxes2 = ctx.saved_tensors
    needs1, needs2 = ctx.needs_input_grad
    return (
        backward(grad, boxes1, boxes2) if needs1 else None,
        backward(grad.t(), boxes2, boxes1) if needs2 else None,
    )


torch.library.register_autograd(
    "detr_fast::generalized_box_iou",
    _generalized_box_iou_backward,
    setup_context=_generalized_box_iou_setup,
)
