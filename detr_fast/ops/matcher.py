# SPDX-License-Identifier: Apache-2.0
"""Matching ops: the exact assignment, and the cost and assignment of all layers in one launch.

Costs are computed in float32 whatever the dtype of the inputs is, also under autocast (float64 for
float64), and are never part of a graph.  Nothing here waits for a GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from detr_fast import reference
from detr_fast.ops._library import with_reference
from detr_fast.reference.boxes import at_least_float32
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
    explain,
)

__all__ = [
    "ClassCost",
    "CostWeights",
    "Match",
    "MatchStatus",
    "PackedTargets",
    "hungarian_match",
    "linear_sum_assignment",
]

_ops = torch.ops.detr_fast
# the enumerations of csrc/matcher/options.h
_ALGORITHMS = {"auto": 0, "shortest_path": 1, "auction": 2}
_CLASS_COSTS = {"softmax": 0, "focal": 1, "focal_logits": 2, "iou_aware": 3}
_NON_FINITE = {"error": 0, "worst": 1}
_MATCH_NON_FINITE = _NON_FINITE | {"status": 0}
_REPLACE = 2
_TIES = {"any": False, "scipy": True}


@with_reference(reference.linear_sum_assignment)
def linear_sum_assignment(
    cost: Tensor,
    count: Tensor | None = None,
    *,
    ties: Ties = "any",
    algorithm: Literal["auto", "shortest_path", "auction"] = "auto",
    non_finite: NonFinite = "error",
) -> Tensor:
    """Solve P rectangular assignment problems exactly.

    By shortest augmenting paths (Crouse, IEEE TAES 2016; Jonker and Volgenant, Computing 1987)
    with float64 duals, or by the auction algorithm (Bertsekas, Annals of OR 1988; Bertsekas and
    Castanon, COAP 1992).

    Args:
        cost (Tensor[P, Q, T]): cost of giving query q to target t, in any layout; float32 or
            float64, half and bfloat16 are read as float32.  Columns from ``count[p]`` on are
            padding and not read.  ``+inf`` forbids a pair.
        count (Tensor[P]): number of targets of each problem, an integer dtype; by default T.
        ties (str): ``"any"`` optimum, or the one that ``scipy.optimize.linear_sum_assignment``
            finds where there are several.
        algorithm (str): ``"shortest_path"``; ``"auction"``, whose result may cost more than the
            optimum by 1e-7 times the range of the costs for each pair, and which is not for
            ``ties="scipy"``; or ``"auto"``: the exact one that is faster at this size, which has
            been the shortest path at all that were measured.
        non_finite (str | tuple[float, float, float]): ``"error"``; ``"worst"``: NaN and infinity
            cost more than anything finite; or what replaces NaN, ``+inf`` and ``-inf``.  Numbers
            such as 3e38 take the digits of all other costs where a problem cannot do without such
            pairs, as they do in scipy.

    Returns:
        Tensor[P, T]: int64, the query of each target; -1 where a target stays free (padding, more
        targets than queries, or a problem without a result where nobody has read its status: on a
        GPU and within ``torch.compile``).

    Raises:
        ValueError: on the CPU, if a problem holds NaN or ``-inf`` or has no finite assignment
            (names the problem); or if an option is unknown or does not go with another.
        RuntimeError: if a shape, dtype or device does not fit.
    """
    if algorithm == "auction" and ties == "scipy":
        raise ValueError('algorithm="auction" does not know scipy\'s ties: use "shortest_path"')
    if count is not None and count.dtype != torch.int32:
        count = count.to(torch.int32)
    query_of_target, status = _ops.linear_sum_assignment.default(
        at_least_float32(cost),
        count,
        _option("algorithm", algorithm, _ALGORITHMS),
        _option("ties", ties, _TIES),
        *_non_finite(non_finite, _NON_FINITE),
    )
    if status.is_cpu and not torch.compiler.is_compiling():
        statuses = status.tolist()
        if any(statuses):
            problem, found = next((p, s) for p, s in enumerate(statuses) if s)
            raise ValueError(f"problem {problem} of {len(cost)}: {explain(MatchStatus(found))}")
    result: Tensor = query_of_target
    return result


@with_reference(reference.hungarian_match)
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
    """Match the queries and targets of all decoder layers and images, in one launch.

    The cost of a query and a target is ``cost_bbox`` times the L1 distance of their boxes, plus
    ``cost_class`` times the class cost, less ``cost_giou`` times their GIoU (Carion et al., ECCV
    2020, section 3.1), plus the extra cost; added in this order.  The assignment is exact.

    Args:
        logits (Tensor[L, B, Q, C] | Sequence[Tensor[B, Q, C]]): class scores of each layer before
            softmax or sigmoid, no-object included; layers in a list may have different Q.
        boxes (Tensor[L, B, Q, 4] | Sequence[Tensor[B, Q, 4]]): ``(cx, cy, w, h)``.
        targets (PackedTargets): labels (B, T), boxes (B, T, 4) and counts (B,), on the device of
            the logits: a `detr_fast.data.Targets`.
        weights (CostWeights): of class cost, L1 and GIoU.
        class_cost (ClassCost): the formula of the class cost.
        groups (int): cut the queries of each image into equal groups, in their order, and match
            each of them on its own (Group DETR).
        repeat (int): match every target to this many queries of its group (H-DETR).
        extra_cost (Tensor[L, B, Q, T] | Sequence[Tensor[B, Q, T]] | None): added to the cost, for
            instance of masks.
        ties (str): ``"any"`` optimum, or the one that scipy finds where there are several.
        non_finite (str | tuple[float, float, float]): what NaN and infinity in the cost do.
            ``"status"``: such a problem has no result (-1) and says so in its status; ``"error"``:
            the same, and on the CPU it is raised at once; ``"worst"``: they cost more than
            anything finite; or what replaces NaN, ``+inf`` and ``-inf``.

    Returns:
        Match: padded indices in both directions, cost and status, on the device of the logits.

    Raises:
        ValueError: on the CPU, if a cost is not finite (names layer, image and term); or if an
            option is unknown.
        RuntimeError: if a shape, dtype or device does not fit.
    """
    layers = logits.unbind() if isinstance(logits, Tensor) else list(logits)
    layer_boxes = boxes.unbind() if isinstance(boxes, Tensor) else list(boxes)
    extra = extra_cost.unbind() if isinstance(extra_cost, Tensor) else list(extra_cost or ())
    if isinstance(class_cost, str):
        raise ValueError(f"class_cost: expected ClassCost({class_cost!r}), got {class_cost!r}")
    kind, *options = class_cost
    query_of_target, target_of_query, cost, status = _ops.hungarian_match.default(
        layers,
        layer_boxes,
        targets.labels,
        targets.boxes,
        targets.count,
        extra,
        weights,
        _option("class_cost", kind, _CLASS_COSTS),
        options,
        groups,
        repeat,
        _option("ties", ties, _TIES),
        *_non_finite(non_finite, _MATCH_NON_FINITE),
    )
    queries = tuple(layer.shape[1] for layer in layers)
    # a graph that had seen the counts would be compiled anew for each of them
    counts = None if torch.compiler.is_compiling() else targets.count_host
    sizes = MatchSizes(counts, queries, groups, repeat)
    match = Match(query_of_target, target_of_query, cost, status, targets.count, sizes)
    if non_finite == "error" and status.is_cpu and not torch.compiler.is_compiling():
        match.raise_for_status()
    return match


def _option(name: str, value: str, known: Mapping[str, int]) -> int:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    return known[value]


def _non_finite(policy: MatchNonFinite, known: Mapping[str, int]) -> tuple[int, tuple[float, ...]]:
    """Policy and replacements of NaN, +inf and -inf, as the ops take them."""
    if isinstance(policy, str):
        return _option("non_finite", policy, known), ()
    return _REPLACE, policy


@torch.library.register_fake("detr_fast::linear_sum_assignment")
def _linear_sum_assignment_fake(
    cost: Tensor,
    count: Tensor | None,
    algorithm: int,
    scipy_ties: bool,
    non_finite: int,
    replacement: Sequence[float],
) -> tuple[Tensor, Tensor]:
    problems, _, targets = cost.shape
    found = cost.new_empty(problems, targets, dtype=torch.int64)
    return found, cost.new_empty(problems, dtype=torch.int32)


@torch.library.register_fake("detr_fast::hungarian_match")
def _hungarian_match_fake(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Tensor,
    target_boxes: Tensor,
    count: Tensor,
    extra_cost: Sequence[Tensor],
    weights: Sequence[float],
    class_cost: int,
    class_options: Sequence[float],
    groups: int,
    repeat: int,
    scipy_ties: bool,
    non_finite: int,
    replacement: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers, (images, targets) = len(logits), labels.shape
    queries = max(layer.shape[1] for layer in logits)
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    return (
        labels.new_empty(layers, images, groups * repeat * targets, dtype=torch.int64),
        labels.new_empty(layers, images, queries, dtype=torch.int64),
        labels.new_empty(layers, images, groups, dtype=dtype),
        labels.new_empty(layers, images, groups, dtype=torch.int32),
    )
