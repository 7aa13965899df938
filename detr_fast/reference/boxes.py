# SPDX-License-Identifier: Apache-2.0
"""Box ops in plain torch.  Boxes are corners ``(x0, y0, x1, y1)``."""

import torch
from torch import Tensor


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalized IoU of every pair of boxes: (N, 4), (M, 4) -> (N, M).

    ``relu`` and not ``clamp``: the gradient of clamp at the bound is 1 in torch 2.10, 0 in 2.14.
    """
    area1, area2 = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes1, boxes2))
    low, high = boxes1[:, None, :2], boxes1[:, None, 2:]
    shared = (torch.minimum(high, boxes2[:, 2:]) - torch.maximum(low, boxes2[:, :2])).relu()
    spanned = (torch.maximum(high, boxes2[:, 2:]) - torch.minimum(low, boxes2[:, :2])).relu()
    intersection, hull = shared[..., 0] * shared[..., 1], spanned[..., 0] * spanned[..., 1]
    union = area1[:, None] + area2 - intersection
    return intersection / union - (hull - union) / hull
