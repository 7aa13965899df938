# SPDX-License-Identifier: Apache-2.0
"""Box ops in plain torch.

Boxes are corners ``(x0, y0, x1, y1)`` unless a function says centre and size ``(cx, cy, w, h)``.
"""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners: (..., 4) -> (..., 4)."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], dim=-1)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of every pair of boxes: (N, 4), (M, 4) -> (N, M)."""
    return broadcast_giou(boxes1[:, None], boxes2)


def matched_box_losses(src: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and ``1 - GIoU`` of N matched pairs, boxes as centre and size.

    Args:
        src (Tensor[N, 4]): predicted boxes, ``(cx, cy, w, h)``.
        tgt (Tensor[N, 4]): the box that each of them shall become.

    Returns:
        tuple[Tensor[N], Tensor[N]]: L1 summed over the four coordinates, and the GIoU loss.
    """
    giou = broadcast_giou(box_cxcywh_to_xyxy(src), box_cxcywh_to_xyxy(tgt))
    return (src - tgt).abs().sum(-1), 1 - giou


def broadcast_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of boxes whose leading dimensions broadcast: (..., 4), (..., 4) -> (...).

    ``relu`` and not ``clamp``: the gradient of clamp at the bound is 1 in torch 2.10, 0 in 2.14.
    """
    area1, area2 = ((b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes1, boxes2))
    low1, high1, low2, high2 = boxes1[..., :2], boxes1[..., 2:], boxes2[..., :2], boxes2[..., 2:]
    shared = (torch.minimum(high1, high2) - torch.maximum(low1, low2)).relu()
    spanned = (torch.maximum(high1, high2) - torch.minimum(low1, low2)).relu()
    intersection, hull = shared[..., 0] * shared[..., 1], spanned[..., 0] * spanned[..., 1]
    union = area1 + area2 - intersection
    return intersection / union - (hull - union) / hull
