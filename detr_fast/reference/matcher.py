# SPDX-License-Identifier: Apache-2.0
"""Matching in plain torch and scipy: the cost of the DETR family and the exact assignment."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from detr_fast.reference.boxes import (
    at_least_float32,
    box_cxcywh_to_xyxy,
    box_iou,
    generalized_box_iou,
)
from detr_fast.reference.match import (
    SOFTMAX,
    ClassCost,
    CostWeights,
    Match,
    MatchNonFinite,
    MatchSizes,
    MatchStatus,
    NonFinite,
    PackedTargets,
    Ties,
)


def linear_sum_assignment(
    cost: Tensor,
    count: Tensor | None = None,
    *,
    ties: Ties = "any",
    algorithm: Literal["auto", "shortest_path", "auction"] = "auto",
    non_finite: NonFinite = "error",
) -> Tensor:
    """Solve P rectangular assignment problems: see `detr_fast.ops.linear_sum_assignment`.

    Always by scipy, in float64 and in scipy's order of ties.
    """
    query_of_target = torch.full((cost.shape[0], cost.shape[2]), -1)
    host_cost = at_least_float32(cost).detach().cpu()
    counts = [cost.shape[2]] * len(cost) if count is None else _counts(count, cost.shape[2])
    for p, n in enumerate(counts):
        problem = replace_non_finite(host_cost[p, :, :n], non_finite)
        try:
            queries, targets = _solve(problem)
        except ValueError as error:
            raise ValueError(f"problem {p} of {len(cost)}: {error}") from error
        query_of_target[p, targets] = queries
    return query_of_target.to(cost.device)


class CostTerms(NamedTuple):
    """The unweighted terms of the matching cost, each (P, Q, T); None where not asked for."""

    cost_class: Tensor | None
    cost_bbox: Tensor | None
    cost_giou: Tensor | None


def matching_cost_terms(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    weights: CostWeights,
    class_cost: ClassCost = SOFTMAX,
) -> CostTerms:
    """Class cost, L1 distance and minus the GIoU of every query and target.

    Computed in float32 at least, whatever the inputs are, and image by image: there is no block
    for the queries of one image and the targets of another.

    Args:
        logits (Tensor[P, Q, C]): class scores before softmax or sigmoid, all columns.
        boxes (Tensor[P, Q, 4]): predicted boxes, ``(cx, cy, w, h)``.
        labels (Tensor[P, T]): int64 columns of ``logits``; others make ``cost_class`` NaN.
        target_boxes (Tensor[P, T, 4]): boxes of the targets, ``(cx, cy, w, h)``.
        weights (CostWeights): a term with weight 0 is not computed.
        class_cost (ClassCost): the formula of the class term.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    boxes, target_boxes = boxes.to(dtype), target_boxes.to(dtype)
    corners, target_corners = box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes)
    class_term = bbox_term = giou_term = None
    if weights.cost_class:
        class_term = _class_cost(logits.to(dtype), labels, class_cost)
        if class_cost.kind == "iou_aware":
            class_term = class_term * box_iou(corners, target_corners) ** class_cost.alpha
    if weights.cost_bbox:
        # added from left to right as torch.cdist(p=1) does, so that ties stay ties
        x, y, w, h = (boxes[:, :, None] - target_boxes[:, None]).abs().unbind(-1)
        bbox_term = x + y + w + h
    if weights.cost_giou:
        giou_term = -generalized_box_iou(corners, target_corners)
    return CostTerms(class_term, bbox_term, giou_term)


def _class_cost(logits: Tensor, labels: Tensor, class_cost: ClassCost) -> Tensor:
    """(P, Q, C), (P, T) -> (P, Q, T); the IoU of the IoU-aware cost is not in it."""
    columns = logits.shape[-1]
    kind, alpha, gamma, eps = class_cost
    outside = ((labels < 0) | (labels >= columns))[:, None]
    column = labels.clamp(0, columns - 1)[:, None].expand(-1, logits.shape[1], -1)
    if kind == "softmax":
        cost = -logits.softmax(-1).gather(2, column)
    else:
        x = logits.gather(2, column)
        p = x.sigmoid()
        if kind == "iou_aware":
            cost = -p
        else:
            if kind == "focal":
                miss, hit = -(1 - p + eps).log(), -(p + eps).log()
            else:
                miss, hit = -logsigmoid(-x), -logsigmoid(x)
            negative = (1 - alpha) * p**gamma * miss
            cost = alpha * (1 - p) ** gamma * hit - negative
    return cost.masked_fill(outside, torch.nan)


def matching_cost(terms: CostTerms, weights: CostWeights, extra_cost: Tensor | None) -> Tensor:
    """Weighted sum of the terms, (P, Q, T), in the published order of addition, plus the extra.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1.
    """
    weighted = [
        weight * term
        for weight, term in (
            (weights.cost_bbox, terms.cost_bbox),
            (weights.cost_class, terms.cost_class),
            (weights.cost_giou, terms.cost_giou),
        )
        if term is not None
    ]
    if extra_cost is not None:
        weighted.append(extra_cost)
    if not weighted:
        raise ValueError("all weights are 0 and there is no extra cost: nothing to match by")
    total = weighted[0]
    for term in weighted[1:]:
        total = total + term
    return total


@torch.no_grad()
def hungarian_match(
    logits: Tensor | Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    targets: PackedTargets,
    weights: CostWeights,
    class_cost: ClassCost = SOFTMAX,
    *,
    groups: int = 1,
    repeat: int = 1,
    extra_cost: Tensor | Sequence[Tensor] | None = None,
    ties: Ties = "any",
    non_finite: MatchNonFinite = "error",
) -> Match:
    """Match all layers and images: see `detr_fast.ops.hungarian_match`.

    Always by scipy, in float64 and in scipy's order of ties.

    Raises:
        ValueError: on the CPU, if a cost is not finite and ``non_finite`` is ``"error"``; if the
            queries of a layer cannot be cut into the groups, or there is nothing to match by.
    """
    weights, class_cost = CostWeights(*weights), ClassCost(*class_cost)
    extras = [None] * len(logits) if extra_cost is None else list(extra_cost)
    labels, target_boxes = targets.labels, targets.boxes
    counts = _counts(targets.count, labels.shape[1])
    width, queries = labels.shape[1], tuple(layer.shape[1] for layer in logits)
    if groups < 1 or any(q % groups for q in queries):
        raise ValueError(f"{queries} queries cannot be cut into {groups} equal groups")
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    shape = len(queries), len(counts), groups
    query_of_target = torch.full((*shape, repeat * width), -1)
    target_of_query = torch.full((*shape[:2], max(queries)), -1)
    total, status = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.int32)

    for layer, (x, b, extra) in enumerate(zip(logits, boxes, extras, strict=True)):
        terms = matching_cost_terms(x, b, labels, target_boxes, weights, class_cost)
        extra = None if extra is None else extra.to(dtype)
        cost = matching_cost(terms, weights, extra).cpu()
        named = {MatchStatus[name.upper()]: term for name, term in terms._asdict().items()}
        named[MatchStatus.EXTRA_COST] = extra
        outside = (labels < 0) | (labels >= x.shape[-1])
        size = queries[layer] // groups
        for (image, n), group in itertools.product(enumerate(counts), range(groups)):
            part = slice(group * size, (group + 1) * size)
            problem = cost[image, part, :n]
            found = MatchStatus(0)
            for bit, term in named.items():
                if term is not None and not term[image, part, :n].isfinite().all():
                    found |= bit
            if weights.cost_class and outside[image, :n].any():
                found |= MatchStatus.LABEL
            if not found and not problem.isfinite().all():
                found = MatchStatus.SUM
            status[layer, image, group] = found
            if found and non_finite in ("error", "status"):
                status[layer, image, group] = found | MatchStatus.NO_RESULT
                continue
            problem = replace_non_finite(problem, non_finite)
            infeasible = MatchStatus.INFEASIBLE | MatchStatus.NO_RESULT
            try:
                query, slot = _solve(problem.repeat(1, repeat))
            except ValueError:  # what replaces a cost may be infinite
                status[layer, image, group] = found | infeasible
                continue
            repetition, target = slot // max(1, n), slot % max(1, n)
            query_of_target[layer, image, group, repetition * width + target] = part.start + query
            target_of_query[layer, image, part.start + query] = target
            total[layer, image, group] = problem[query, target].sum()
    device, sizes = labels.device, MatchSizes(tuple(counts), queries, groups, repeat)
    match = Match(
        query_of_target.flatten(2).to(device),
        target_of_query.to(device),
        total.to(device),
        status.to(device),
        targets.count,
        sizes,
    )
    if non_finite == "error" and device.type == "cpu":
        match.raise_for_status()
    return match


def _solve(cost: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, T) on the host -> queries, ascending, and their targets.

    Raises:
        ValueError: from scipy, if a cost is NaN or -inf or +inf forbids too many pairs.
        ImportError: without scipy.
    """
    try:
        from scipy.optimize import linear_sum_assignment as solve
    except ImportError as error:
        raise ImportError('matching needs scipy: pip install "detr-fast[train]"') from error
    queries, targets = solve(cost.double().numpy())
    return torch.from_numpy(queries), torch.from_numpy(targets)


def _counts(count: Tensor, most: int) -> list[int]:
    """Counts as the ops read them: below 0 as 0, above T as T."""
    return [min(max(n, 0), most) for n in count.tolist()]


def replace_non_finite(cost: Tensor, non_finite: MatchNonFinite) -> Tensor:
    """Apply the policy to the cost (Q, T) of one problem; ``"error"`` leaves it as it is."""
    if cost.isfinite().all() or non_finite in ("error", "status"):
        return cost
    if not isinstance(non_finite, str):
        nan, positive, negative = non_finite
        return cost.nan_to_num(nan=nan, posinf=positive, neginf=negative)
    finite = cost.where(cost.isfinite(), 0)
    worst = finite.max() + finite.abs().max() + 1
    return cost.where(cost.isfinite(), worst)
