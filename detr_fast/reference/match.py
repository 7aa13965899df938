# SPDX-License-Identifier: Apache-2.0
"""What a matching is asked for and what it returns, for the compiled op and its reference twin."""

from enum import IntFlag
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

Ties: TypeAlias = Literal["any", "scipy"]
NonFinite: TypeAlias = Literal["error", "worst"] | tuple[float, float, float]
# of hungarian_match alone, whose result has a status
MatchNonFinite: TypeAlias = NonFinite | Literal["status"]


class PackedTargets(Protocol):
    """Targets of B images, padded to T: `detr_fast.data.Targets`, or anything like it.

    Attributes:
        labels (Tensor[B, T]): int64 columns of the logits.
        boxes (Tensor[B, T, 4]): ``(cx, cy, w, h)``.
        count (Tensor[B]): int32, how many of the T are real.
        count_host (tuple[int, ...]): the same as Python ints.
    """

    @property
    def labels(self) -> Tensor: ...  # noqa: D102
    @property
    def boxes(self) -> Tensor: ...  # noqa: D102
    @property
    def count(self) -> Tensor: ...  # noqa: D102
    @property
    def count_host(self) -> tuple[int, ...]: ...  # noqa: D102


class CostWeights(NamedTuple):
    """Weights of the terms of the matching cost; a term with weight 0 is not computed."""

    cost_class: float = 1
    cost_bbox: float = 1
    cost_giou: float = 1


class ClassCost(NamedTuple):
    """How a logit becomes a cost, with the probability p of the target's class.

    Attributes:
        kind (str): ``"softmax"``: ``-p`` over all columns, no-object included (DETR);
            ``"focal"``: ``alpha (1-p)^gamma (-log(p+eps)) - (1-alpha) p^gamma (-log(1-p+eps))`` of
            the sigmoid (Deformable DETR); ``"focal_logits"``: the same by log-sigmoid, without eps
            (RF-DETR); ``"iou_aware"``: ``-p IoU^alpha`` of the sigmoid (DEIMv2).
        alpha (float): balance of the focal terms, or exponent of the IoU.
        gamma (float): exponent of the focal terms.
        eps (float): keeps the logarithms of ``"focal"`` finite.
    """

    kind: Literal["softmax", "focal", "focal_logits", "iou_aware"] = "softmax"
    alpha: float = 0.25
    gamma: float = 2.0
    eps: float = 1e-8


SOFTMAX = ClassCost()


class MatchStatus(IntFlag):
    """What was found in the cost of a problem: the terms that are not finite, and so on.

    Such a problem has no result under ``non_finite="error"`` and ``"status"``, nor if it is
    infeasible, and has the bit ``NO_RESULT``, too; else the values were replaced.
    """

    COST_CLASS = 1
    COST_BBOX = 2
    COST_GIOU = 4
    EXTRA_COST = 8
    SUM = 16  # the terms are finite, their weighted sum is not
    LABEL = 32  # outside of the columns of the logits
    INFEASIBLE = 64
    NO_RESULT = 128


class MatchSizes(NamedTuple):
    """What the host knows of a match.

    Attributes:
        counts (tuple[int, ...] | None): targets of each image, not repeated; None within
            ``torch.compile``, whose graphs serve all counts.
        queries (tuple[int, ...]): queries of each layer, all groups together.
        groups (int): groups that the queries of an image are cut into.
        repeat (int): how often each target is matched.
    """

    counts: tuple[int, ...] | None
    queries: tuple[int, ...]
    groups: int
    repeat: int


class Match(NamedTuple):
    """A matching of L layers and B images, on the device of the logits; -1 = free.

    Attributes:
        query_of_target (Tensor[L, B, groups * repeat * T]): int64, the query that each target got
            in each group; a target's slot is ``(group * repeat + r) * T + t``.
        target_of_query (Tensor[L, B, Q]): int64, the target t of each query, below T also where
            targets are repeated.  Q is that of the layer with most queries.
        cost (Tensor[L, B, groups]): cost of the matched pairs, float32 (float64 for float64).
        status (Tensor[L, B, groups]): int32, bits of `MatchStatus`; 0 = fine.
        target_count (Tensor[B]): int32, targets of each image.
        sizes (MatchSizes): what is known without a read from the device.
    """

    query_of_target: Tensor
    target_of_query: Tensor
    cost: Tensor
    status: Tensor
    target_count: Tensor
    sizes: MatchSizes

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        """The matched pairs as DETR hands them around; waits for nothing.

        Returns:
            list[list[tuple[Tensor, Tensor]]]: for each layer and image the matched queries,
            ascending, and the target of each; int64 views on the device.  Repeated targets count
            through: ``r * n + t`` of an image with n targets.  A problem without a result (see
            ``status``) pairs query 0 and target 0.

        Raises:
            RuntimeError: if the match was made within ``torch.compile``.
        """
        counts, queries, groups, repeat = self.sizes
        if counts is None:
            raise RuntimeError(
                "pairs() needs the numbers of targets, which a compiled graph does not know: "
                "match outside of torch.compile, or use query_of_target"
            )
        slots = self.query_of_target
        images, width = slots.shape[1], max(1, slots.shape[2] // (groups * repeat))
        last = torch.iinfo(torch.int64).max
        ascending, slot = slots.masked_fill(slots < 0, last).sort(-1)
        targets = slot % width
        if repeat > 1:
            targets += slot // width % repeat * self.target_count.view(1, images, 1)
        free = ascending == last
        ascending, targets = ascending.masked_fill(free, 0), targets.masked_fill(free, 0)
        return [
            [
                (ascending[layer, image, :n], targets[layer, image, :n])
                for image in range(images)
                for n in (groups * min(of_layer // groups, repeat * counts[image]),)
            ]
            for layer, of_layer in enumerate(queries)
        ]

    def raise_for_status(self) -> None:
        """Read the status, which waits for the device, and raise unless all of it is fine.

        Raises:
            ValueError: names layer, image, group and what was found there, replaced or not.
        """
        if not self.status.any():
            return
        layer, image, group = (int(i) for i in self.status.nonzero()[0])
        found = MatchStatus(int(self.status[layer, image, group]))
        where = f"layer {layer}, image {image}"
        if self.sizes.groups > 1:
            where += f", group {group}"
        raise ValueError(f"{where}: {explain(found)}")


def explain(status: MatchStatus) -> str:
    """What a status says, and the remedy."""
    if MatchStatus.LABEL in status:
        return (
            "a label is outside of the columns of the logits: num_classes shall be the largest "
            "label + 1"
        )
    if MatchStatus.INFEASIBLE in status:
        return "no assignment has a finite cost: infinite costs forbid too many pairs"
    found = status & ~MatchStatus.NO_RESULT
    terms = ", ".join(str(bit.name).lower() for bit in MatchStatus if bit in found)
    return (
        f"matching cost not finite in the term {terms}: the training has diverged, or predictions "
        "or targets hold NaN or infinity"
    )
