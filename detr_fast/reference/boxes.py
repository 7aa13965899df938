# SPDX-License-Identifier: Apache-2.0
"""Box ops in plain torch.

Boxes are corners ``(x0, y0, x1, y1)`` unless a function says centre and size ``(cx, cy, w, h)``.
Half and bfloat16 boxes are computed in float32 and give float32.
"""

import torch
from torch import Tensor

# The conversions and the area are also the ops of these names.  A kernel of their own would earn
# little: forward and backward of 100 boxes take 0.1 ms on one CPU thread either way, because a
# compiled op pays for autograd's Python side (of 8,400 boxes 0.3 against 0.15 ms); on a GPU one
# launch in place of four costs the host as much for the same reason, and torch.compile fuses the
# four.  Where it counts, in matched_box_losses, the conversion is part of the op.


def at_least_float32(boxes: Tensor) -> Tensor:
    """Half and bfloat16 boxes as float32, others as they are."""
    return boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turn centre and size into corners.

    Args:
        boxes (Tensor[..., 4]): ``(cx, cy, w, h)``, in any unit.

    Returns:
        Tensor[..., 4]: ``(x0, y0, x1, y1)`` in the same unit; float32 for half and bfloat16.
    """
    boxes = at_least_float32(boxes)
    centre, size = boxes.chunk(2, -1)
    half = 0.5 * size
    return torch.cat([centre - half, centre + half], -1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Turn corners into centre and size.

    Args:
        boxes (Tensor[..., 4]): ``(x0, y0, x1, y1)``, in any unit.

    Returns:
        Tensor[..., 4]: ``(cx, cy, w, h)`` in the same unit; float32 for half and bfloat16.
    """
    boxes = at_least_float32(boxes)
    low, high = boxes.chunk(2, -1)
    return torch.cat([0.5 * (low + high), high - low], -1)


def box_area(boxes: Tensor) -> Tensor:
    """Areas of boxes, the product of the signed sides.

    Args:
        boxes (Tensor[..., 4]): corners ``(x0, y0, x1, y1)``.

    Returns:
        Tensor[...]: areas in the square of the boxes' unit; float32 for half and bfloat16.
    """
    boxes = at_least_float32(boxes)
    low, high = boxes.chunk(2, -1)
    width, height = (high - low).unbind(-1)
    return width * height


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of every pair of boxes: (..., N, 4), (..., M, 4) -> (..., N, M)."""
    intersection, union, _ = _areas(*_pairs(boxes1, boxes2))
    return _ratio(intersection, union)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of every pair of boxes: (..., N, 4), (..., M, 4) -> (..., N, M)."""
    return _giou(*_areas(*_pairs(boxes1, boxes2)))


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7
) -> Tensor:
    """``1 - GIoU`` of matched pairs: (..., 4), (..., 4) -> (...), or a scalar where reduced.

    As in torchvision, the sides of the hull are not clamped: it differs for boxes of negative
    extent only.
    """
    boxes1, boxes2 = at_least_float32(boxes1), at_least_float32(boxes2)
    intersection, union, _ = _areas(boxes1, boxes2)
    width, height = _hull_sides(boxes1, boxes2)
    return reduce(1 - _giou(intersection, union, width * height, eps), reduction)


def matched_box_losses(src: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and ``1 - GIoU`` of matched pairs, boxes as centre and size.

    Args:
        src (Tensor[..., 4]): predicted boxes, ``(cx, cy, w, h)``.
        tgt (Tensor[..., 4]): the box that each of them shall become.

    Returns:
        tuple[Tensor[...], Tensor[...]]: L1 summed over the four coordinates, and the GIoU loss.
    """
    src, tgt = at_least_float32(src), at_least_float32(tgt)
    areas = _areas(box_cxcywh_to_xyxy(src), box_cxcywh_to_xyxy(tgt))
    return (src - tgt).abs().sum(-1), 1 - _giou(*areas)


def matched_iou(src: Tensor, tgt: Tensor) -> Tensor:
    """IoU of matched pairs, boxes as centre and size: (..., 4), (..., 4) -> (...)."""
    intersection, union, _ = _areas(box_cxcywh_to_xyxy(src), box_cxcywh_to_xyxy(tgt))
    return _ratio(intersection, union)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """A loss as it is ("none"), its mean (0 of no elements), or its sum.

    Raises:
        ValueError: if ``reduction`` is none of these.
    """
    if reduction == "none":
        return loss
    if reduction in ("mean", "sum"):
        return loss.sum() / max(1, loss.numel()) if reduction == "mean" else loss.sum()
    raise ValueError(f'reduction: expected "none", "mean" or "sum", got {reduction!r}')


def _pairs(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Views that broadcast to all pairs, (..., N, 1, 4) and (..., 1, M, 4)."""
    return at_least_float32(boxes1)[..., None, :], at_least_float32(boxes2)[..., None, :, :]


def _hull_sides(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the smallest box round each pair."""
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    width, height = (torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - low).unbind(-1)
    return width, height


def _areas(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of intersection, union and hull of boxes whose leading dimensions broadcast.

    ``relu`` and not ``clamp``: the gradient of clamp at the bound is 1 in torch 2.10, 0 in 2.14.
    """
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    width, height = (torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - low).relu().unbind(-1)
    intersection = width * height
    union = box_area(boxes1) + box_area(boxes2) - intersection
    hull_width, hull_height = _hull_sides(boxes1, boxes2)
    return intersection, union, hull_width.relu() * hull_height.relu()


def _giou(intersection: Tensor, union: Tensor, hull: Tensor, eps: float = 0) -> Tensor:
    return _ratio(intersection, union + eps) - _ratio(hull - union, hull + eps)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0, with gradient 0, where the denominator is 0."""
    empty = denominator == 0
    return torch.where(empty, 0, numerator / torch.where(empty, 1, denominator))
