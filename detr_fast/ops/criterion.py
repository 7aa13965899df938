# SPDX-License-Identifier: Apache-2.0
"""The losses of all decoder layers, forward and backward, in one op each.

Sums are float64, all else is float32 whatever the dtype of the inputs is, also under autocast
(float64 for float64).  Results do not depend on the number of threads.  Nothing here waits for a
GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detr_fast import reference
from detr_fast.ops._library import with_reference
from detr_fast.ops.layers import unbind_layers
from detr_fast.reference.criterion import CROSS_ENTROPY, ClassLoss
from detr_fast.reference.match import Match, PackedTargets

__all__ = ["LOSS_COLUMNS", "ClassLoss", "set_loss"]

_ops = torch.ops.detr_fast
# the enumerations of csrc/criterion/class_loss.h and set_sums.h
_CLASS_LOSSES = {"cross_entropy": 0, "focal": 1, "varifocal": 2}
LOSS_COLUMNS = ("class_loss", "l1", "giou_loss", "cardinality_error", "class_error")
_DIVISORS = 2


def _check_class_loss(
    *_: Any,
    class_loss: ClassLoss = CROSS_ENTROPY,
    class_weight: Tensor | None = None,
    **__: Any,
) -> None:
    if isinstance(class_loss, str):
        raise ValueError(f"class_loss: expected ClassLoss({class_loss!r}), got {class_loss!r}")
    if class_loss.kind not in _CLASS_LOSSES:
        known = ", ".join(map(repr, _CLASS_LOSSES))
        raise ValueError(f"class_loss: expected one of {known}, got {class_loss.kind!r}")
    if class_weight is not None and class_loss.kind != "cross_entropy":
        raise ValueError("class_weight: only cross-entropy has weights of classes")


@with_reference(reference.set_loss, check=_check_class_loss)
def set_loss(
    logits: Tensor | Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    targets: PackedTargets,
    match: Match | Tensor,
    *,
    class_loss: ClassLoss = CROSS_ENTROPY,
    class_weight: Tensor | None = None,
    num_boxes: float | Tensor | None = None,
) -> Tensor:
    """Compute the losses of all decoder layers, given which query has which target.

    The set prediction loss of DETR (Carion et al., ECCV 2020, section 3.1) and its relatives.
    Forward and backward each read a logit once; there are no copies of matched queries and no
    matrix of pairs.  Differentiable once in logits and boxes.

    Args:
        logits (Tensor[L, B, Q, C] | Sequence[Tensor[B, Q, C]]): class scores of each layer before
            softmax or sigmoid; layers in a list may have different Q and C.
        boxes (Tensor[L, B, Q, 4] | Sequence[Tensor[B, Q, 4]]): ``(cx, cy, w, h)``.
        targets (PackedTargets): labels (B, T), boxes (B, T, 4) and counts (B,), on the device of
            the logits: a `detr_fast.data.Targets`.
        match (Match | Tensor[L, B, Q]): of `hungarian_match`, or int64 the target of each
            query, negative where it is free.
        class_loss (ClassLoss): the formula of the class loss.
        class_weight (Tensor[C] | None): weight of each column, with cross-entropy; by default 1.
        num_boxes (float | Tensor[()] | None): what the sums over matched pairs are divided by; by
            default the number of targets, at least 1.

    Returns:
        Tensor[L, 5]: for each layer the class loss, the L1 and the GIoU loss, each summed over
        matched pairs and divided by ``num_boxes``; then, without a gradient, the cardinality error
        (mean over images of how far the number of queries whose largest logit is not the last one
        is from the number of targets) and the class error (100 less the accuracy on the matched
        queries, in percent; 100 where there are none).  float32, float64 for float64.  The losses
        of a layer are NaN, as are the gradients of its logits, if the status of its match has
        ``NO_RESULT`` or a query has a target or a label that there is not.

    Raises:
        ValueError: if the class loss is unknown or has no weights of classes.
        RuntimeError: if a shape, dtype or device does not fit.
    """
    layers = unbind_layers(logits) if isinstance(logits, Tensor) else list(logits)
    layer_boxes = unbind_layers(boxes) if isinstance(boxes, Tensor) else list(boxes)
    kind, alpha, gamma = class_loss
    dtype = torch.promote_types(layers[0].dtype if layers else torch.float32, torch.float32)
    if class_weight is not None:
        class_weight = class_weight.to(dtype)
    if isinstance(num_boxes, Tensor):
        num_boxes = num_boxes.to(dtype)
    elif num_boxes is not None:
        num_boxes = targets.labels.new_full((), num_boxes, dtype=dtype)
    target_of_query, status = (
        (match.target_of_query, match.status) if isinstance(match, Match) else (match, None)
    )
    losses: Tensor = _ops.set_loss.default(
        layers,
        layer_boxes,
        targets.labels,
        targets.boxes,
        targets.count,
        target_of_query,
        status,
        class_weight,
        num_boxes,
        _CLASS_LOSSES[kind],
        alpha,
        gamma,
    )[0]
    return losses


@torch.library.register_fake("detr_fast::set_loss")
def _set_loss_fake(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    target_of_query: Tensor,
    status: Tensor | None,
    class_weight: Tensor | None,
    num_boxes: Tensor | None,
    class_loss: int,
    alpha: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layers, images, queries = target_of_query.shape
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    rows = queries if class_loss == _CLASS_LOSSES["cross_entropy"] else 0
    return (
        labels.new_empty(layers, len(LOSS_COLUMNS), dtype=dtype),
        labels.new_empty(layers, images, rows, 2, dtype=dtype),
        labels.new_empty(layers, _DIVISORS, dtype=dtype),
    )


@torch.library.register_fake("detr_fast::set_loss_backward")
def _set_loss_backward_fake(
    grad: Tensor,
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    target_of_query: Tensor,
    class_weight: Tensor | None,
    softmax: Tensor,
    divisor: Tensor,
    class_loss: int,
    alpha: float,
    gamma: float,
    needs_logits: bool,
    needs_boxes: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    sides = ((logits, needs_logits), (boxes, needs_boxes))
    grad_logits, grad_boxes = (_gradients_of(layers) if needed else [] for layers, needed in sides)
    return grad_logits, grad_boxes


def _gradients_of(layers: Sequence[Tensor]) -> list[Tensor]:
    """One block of memory where all layers are of one shape, as LayerGradients of set_loss.h."""
    first = layers[0]
    if all(layer.shape == first.shape for layer in layers):
        return [first.new_empty(len(layers), *first.shape)]
    return [layer.new_empty(layer.shape) for layer in layers]


def _set_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, boxes, *rest = inputs
    *tensors, _, class_weight, _, class_loss, alpha, gamma = rest
    _, softmax, divisor = output
    ctx.options = class_loss, alpha, gamma
    ctx.layers = len(logits)
    ctx.save_for_backward(*logits, *boxes, *tensors, class_weight, softmax, divisor)
    ctx.mark_non_differentiable(softmax, divisor)
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of the logits and of the boxes of all layers, in a row as once_differentiable wants them."""
    layers = ctx.layers
    needs_logits, needs_boxes = ctx.needs_input_grad[:2]
    saved = ctx.saved_tensors
    logits, boxes, tensors = saved[:layers], saved[layers : 2 * layers], saved[2 * layers :]
    grads = _ops.set_loss_backward.default(
        grad, logits, boxes, *tensors, *ctx.options, any(needs_logits), any(needs_boxes)
    )
    return tuple(
        g if needed else None
        for of_side, needs in zip(grads, (needs_logits, needs_boxes), strict=True)
        for g, needed in zip(_layers_of(of_side, layers), needs, strict=True)
    )


def _layers_of(grads: Sequence[Tensor], layers: int) -> Sequence[Tensor | None]:
    """Of each layer, of what set_loss_backward returns: (L, B, Q, ...), L x (B, Q, ...) or none."""
    if not grads:
        return [None] * layers
    block = grads[0].dim() == 4
    return grads[0].unbind() if block else grads


def _set_loss_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    layers = ctx.layers
    grads = [None] * (2 * layers) if grad is None else _gradients(ctx, grad)
    return list(grads[:layers]), list(grads[layers:]), *[None] * 10


torch.library.register_autograd(
    "detr_fast::set_loss", _set_loss_backward, setup_context=_set_loss_setup
)
