# SPDX-License-Identifier: Apache-2.0
"""The assigner of mmdetection 3, and its costs for where mmdetection is not installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import softplus

from detr_fast.ops.matcher import linear_sum_assignment
from detr_fast.reference.boxes import at_least_float32

__all__ = ["AssignResult", "HungarianAssigner", "match_cost"]

MatchCost: TypeAlias = Callable[..., Tensor]


@dataclass
class AssignResult:
    """What an assigner of mmdetection returns; its own class is taken where it is installed.

    Attributes:
        num_gts (int): number of targets.
        gt_inds (Tensor[Q]): int64; 0 = background, else the target of the query, from 1.
        max_overlaps (None): not known.
        labels (Tensor[Q]): int64; label of the target, -1 = background.
    """

    num_gts: int
    gt_inds: Tensor
    max_overlaps: None
    labels: Tensor

    @property
    def num_preds(self) -> int:
        """Number of queries."""
        return len(self.gt_inds)


class HungarianAssigner:
    """The assigner of mmdetection's DETR, Deformable DETR, DINO and others, image by image.

    Source: open-mmlab/mmdetection 3.3.0,
    ``mmdet/models/task_modules/assigners/hungarian_assigner.py``; the algorithm of Co-DETR is the
    same.  Everything stays on the device: nothing waits for it.  Differences: costs are summed in
    float32, and those of masks by `match_cost` computed in it, also under autocast; on a
    device other than the CPU a cost that is not finite makes all queries background (on the CPU
    it raises, as the original does everywhere).

    Args:
        match_costs (Mapping | Callable | Sequence): costs to be added; each a dict with its
            ``"type"`` and arguments, or a callable as those of mmdetection are.

    Raises:
        ValueError: if there is no cost or its type is unknown.
    """

    def __init__(
        self, match_costs: Mapping[str, Any] | MatchCost | Sequence[Mapping[str, Any] | MatchCost]
    ) -> None:
        costs = match_costs if isinstance(match_costs, Sequence) else [match_costs]
        if not costs:
            raise ValueError("match_costs is empty: nothing to match by")
        self.match_costs = [c if callable(c) else match_cost(**c) for c in costs]

    @torch.no_grad()
    def assign(
        self,
        pred_instances: Any,
        gt_instances: Any,
        img_meta: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Give every target of an image a query.

        Args:
            pred_instances (InstanceData): of Q queries, with what the costs need: ``scores``
                (Tensor[Q, C]), ``bboxes`` (Tensor[Q, 4], corners in pixels), ``masks``.
            gt_instances (InstanceData): of n targets, ``labels`` (Tensor[n]) and likewise.
            img_meta (Mapping | None): ``"img_shape"`` (height, width), for ``BBoxL1Cost``.
            **kwargs (Any): ignored.

        Returns:
            AssignResult: of Q queries, on the device of the labels.

        Raises:
            ValueError: on the CPU, if a cost is not finite.
        """
        labels = gt_instances.labels
        queries, targets = len(pred_instances), len(gt_instances)
        gt_inds = labels.new_zeros(queries, dtype=torch.int64)
        of_query = torch.full_like(gt_inds, -1)
        if targets == 0 or queries == 0:
            return _result(targets, gt_inds, of_query)
        costs = [
            cost(pred_instances=pred_instances, gt_instances=gt_instances, img_meta=img_meta)
            for cost in self.match_costs
        ]
        total = torch.stack([at_least_float32(cost) for cost in costs]).sum(0)
        query = linear_sum_assignment(total[None], ties="scipy")[0].to(labels.device)
        # a free target writes to one row too many, which is cut off
        query = query.where(query >= 0, queries)
        gt_inds = gt_inds.new_zeros(queries + 1)
        gt_inds[query] = torch.arange(1, targets + 1, device=labels.device)
        of_query = torch.full_like(gt_inds, -1)
        of_query[query] = labels.to(torch.int64)
        return _result(targets, gt_inds[:queries], of_query[:queries])


def _result(targets: int, gt_inds: Tensor, labels: Tensor) -> Any:
    return _result_class()(targets, gt_inds, max_overlaps=None, labels=labels)


@cache
def _result_class() -> Any:
    try:
        from mmdet.models.task_modules.assigners import AssignResult as Installed
    except (ImportError, AssertionError):  # mmdet asserts the version of mmcv
        return AssignResult
    return Installed


def match_cost(type: str, weight: float = 1.0, **options: Any) -> MatchCost:
    """A cost of mmdetection by its name.

    Args:
        type (str): ``"ClassificationCost"``, ``"FocalLossCost"`` (alpha, gamma, eps,
            binary_input), ``"BBoxL1Cost"`` (box_format), ``"IoUCost"`` (iou_mode),
            ``"DiceCost"`` (pred_act, eps, naive_dice) or ``"CrossEntropyLossCost"``
            (use_sigmoid).
        weight (float): factor of the cost.
        **options (Any): the other arguments, with mmdetection's defaults.

    Returns:
        Callable: ``(pred_instances, gt_instances, img_meta) -> Tensor[Q, n]``.

    Raises:
        ValueError: if the type is unknown.
    """
    if type not in _COSTS:
        raise ValueError(f"match_costs: expected one of {', '.join(_COSTS)}, got {type!r}")
    cost = _COSTS[type]

    def weighted(
        pred_instances: Any, gt_instances: Any, img_meta: Mapping[str, Any] | None = None
    ) -> Tensor:
        return weight * cost(pred_instances, gt_instances, img_meta, **options)

    return weighted


def _classification(predicted: Any, targets: Any, _meta: Any) -> Tensor:
    scores: Tensor = predicted.scores
    cost: Tensor = -scores.softmax(-1)[:, targets.labels]
    return cost


def _focal(
    predicted: Any,
    targets: Any,
    _meta: Any,
    alpha: float = 0.25,
    gamma: float = 2,
    eps: float = 1e-12,
    binary_input: bool = False,
) -> Tensor:
    """Focal cost of labels, or with ``binary_input`` of masks."""
    x = predicted.masks.flatten(1) if binary_input else predicted.scores
    p = at_least_float32(x).sigmoid()
    negative = -(1 - p + eps).log() * (1 - alpha) * p**gamma
    positive = -(p + eps).log() * alpha * (1 - p) ** gamma
    if not binary_input:
        difference: Tensor = positive - negative
        return difference[:, targets.labels]
    masks = targets.masks.flatten(1).to(p)
    total = _products(positive, masks) + _products(negative, 1 - masks)
    return total / p.shape[1]


def _bbox_l1(
    predicted: Any, targets: Any, meta: Mapping[str, Any], box_format: str = "xyxy"
) -> Tensor:
    """L1 distance of boxes relative to the image."""
    if box_format not in ("xyxy", "xywh"):
        raise ValueError(f'box_format: expected "xyxy" or "xywh", got {box_format!r}')
    height, width = meta["img_shape"][:2]
    both = []
    for boxes in (predicted.bboxes, targets.bboxes):
        if box_format == "xywh":
            low, high = boxes.chunk(2, -1)
            boxes = torch.cat([(low + high) / 2, high - low], -1)
        both.append(boxes / targets.bboxes.new_tensor([width, height, width, height]))
    return torch.cdist(both[0], both[1], p=1)


def _iou(
    predicted: Any, targets: Any, _meta: Any, iou_mode: str = "giou", eps: float = 1e-6
) -> Tensor:
    """Minus the IoU or GIoU; union and hull are at least ``eps`` square pixels."""
    if iou_mode not in ("iou", "giou"):
        raise ValueError(f'iou_mode: expected "iou" or "giou", got {iou_mode!r}')
    a, b = predicted.bboxes.float()[:, None], targets.bboxes.float()
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).relu()
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).relu()
    intersection, hull_area = shared.prod(-1), hull.prod(-1).clamp(min=eps)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    union = (areas[0] + areas[1] - intersection).clamp(min=eps)
    iou = intersection / union
    overlap = iou if iou_mode == "iou" else iou - (hull_area - union) / hull_area
    cost: Tensor = -overlap.to(predicted.bboxes.dtype)
    return cost


def _dice(
    predicted: Any,
    targets: Any,
    _meta: Any,
    pred_act: bool = False,
    eps: float = 1e-3,
    naive_dice: bool = True,
) -> Tensor:
    """Dice loss of masks; the sums of squares are compared unless ``naive_dice``."""
    p = at_least_float32(predicted.masks.flatten(1))
    p = p.sigmoid() if pred_act else p
    masks = targets.masks.flatten(1).to(p)
    total = p.sum(-1, keepdim=True) + masks.sum(-1)
    if not naive_dice:
        total = p.square().sum(-1, keepdim=True) + masks.square().sum(-1)
    loss: Tensor = 1 - (2 * _products(p, masks) + eps) / (total + eps)
    return loss


def _cross_entropy(predicted: Any, targets: Any, _meta: Any, use_sigmoid: bool = True) -> Tensor:
    """Mean binary cross-entropy of masks."""
    if not use_sigmoid:
        raise ValueError("CrossEntropyLossCost: only use_sigmoid=True is defined")
    x = predicted.masks.flatten(1).float()
    masks = targets.masks.flatten(1).float()
    cost: Tensor = (softplus(x).sum(-1, keepdim=True) - _products(x, masks)) / x.shape[1]
    return cost


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(Q, P) and (n, P) -> (Q, n), in their own dtype also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


_COSTS: dict[str, Callable[..., Tensor]] = {
    "BBoxL1Cost": _bbox_l1,
    "ClassificationCost": _classification,
    "CrossEntropyLossCost": _cross_entropy,
    "DiceCost": _dice,
    "FocalLossCost": _focal,
    "IoUCost": _iou,
}
