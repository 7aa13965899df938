# SPDX-License-Identifier: Apache-2.0
"""Matching in plain torch and scipy: the cost of DETR and the exact assignment."""

from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.reference.boxes import box_cxcywh_to_xyxy, broadcast_giou


def linear_sum_assignment(cost: Tensor, count: Tensor) -> Tensor:
    """Solve P rectangular assignment problems exactly, in float64 and in scipy's order of ties.

    Args:
        cost (Tensor[P, Q, T]): cost of giving query q to target t; columns from ``count[p]`` on
            are padding and not read.
        count (Tensor[P]): number of targets of each problem, an integer dtype.

    Returns:
        Tensor[P, T]: int64, the query of each target on the device of ``cost``; -1 where a target
        stays free (padding, or more targets than queries).

    Raises:
        ValueError: if a problem holds NaN or -inf or has no finite assignment; names the problem.
        ImportError: without scipy.
    """
    try:
        from scipy.optimize import linear_sum_assignment as solve
    except ImportError as error:
        raise ImportError('matching needs scipy: pip install "detr-fast[train]"') from error
    query_of_target = torch.full((cost.shape[0], cost.shape[2]), -1)
    host_cost = cost.detach().to("cpu", torch.float64).numpy()
    for p, n in enumerate(count.tolist()):
        try:
            queries, targets = solve(host_cost[p, :, :n])
        except ValueError as error:
            raise ValueError(f"problem {p} of {len(host_cost)}: {error}") from error
        query_of_target[p, torch.from_numpy(targets)] = torch.from_numpy(queries)
    return query_of_target.to(cost.device)


class CostTerms(NamedTuple):
    """The unweighted terms of the matching cost, each (P, Q, T)."""

    cost_class: Tensor
    cost_bbox: Tensor
    cost_giou: Tensor


def matching_cost_terms(
    logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor
) -> CostTerms:
    """L1 distance, minus the class probability and minus the GIoU of every query and target.

    Computed in float32 at least, whatever the inputs are, and image by image: there is no block
    for the queries of one image and the targets of another.

    Args:
        logits (Tensor[P, Q, C]): class scores before softmax, no-object included.
        boxes (Tensor[P, Q, 4]): predicted boxes, ``(cx, cy, w, h)``.
        labels (Tensor[P, T]): int64 columns of ``logits``; others make ``cost_class`` NaN.
        target_boxes (Tensor[P, T, 4]): boxes of the targets, ``(cx, cy, w, h)``.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    boxes, target_boxes = boxes.to(dtype), target_boxes.to(dtype)

    # added from left to right as torch.cdist(p=1) does, so that ties stay ties
    x, y, w, h = (boxes[:, :, None] - target_boxes[:, None]).abs().unbind(-1)
    cost_bbox = x + y + w + h

    classes = logits.shape[-1]
    column = labels.clamp(0, classes - 1)[:, None].expand(-1, logits.shape[1], -1)
    cost_class = -logits.to(dtype).softmax(-1).gather(2, column)
    cost_class = cost_class.masked_fill(((labels < 0) | (labels >= classes))[:, None], torch.nan)

    corners, target_corners = box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes)
    cost_giou = -broadcast_giou(corners[:, :, None], target_corners[:, None])
    return CostTerms(cost_class, cost_bbox, cost_giou)


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
) -> Tensor:
    """Weighted sum of :func:`matching_cost_terms`, (P, Q, T), in the published order of addition.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1.
    """
    terms = matching_cost_terms(logits, boxes, labels, target_boxes)
    return cost_bbox * terms.cost_bbox + cost_class * terms.cost_class + cost_giou * terms.cost_giou
