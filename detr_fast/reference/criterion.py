# SPDX-License-Identifier: Apache-2.0
"""The losses of the DETR family in plain torch, layer by layer."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.reference.boxes import matched_box_losses, matched_iou
from detr_fast.reference.match import Match, MatchStatus, PackedTargets


class ClassLoss(NamedTuple):
    """How logits and classes become a loss, with the probability p of a column.

    Attributes:
        kind (str): ``"cross_entropy"`` of the softmax; the last column is no-object, the class of
            free queries.  The mean over queries, each with the weight of its class (DETR).
            ``"focal"``: ``-alpha (1-p)^gamma log p`` in the column of a query's class and
            ``-(1-alpha) p^gamma log(1-p)`` in all others, summed and divided by ``num_boxes`` (Lin
            et al., ICCV 2017; Deformable DETR).  ``"varifocal"``: with the IoU u of the matched
            pair, of which no gradient is taken, ``-u (u log p + (1-u) log(1-p))`` in the column of
            the class and ``-alpha p^gamma log(1-p)`` in all others, where the gradient takes the
            factor before the logarithm for a constant; summed and divided alike (Zhang et al.,
            CVPR 2021, equation 2; RT-DETR, with alpha 0.75).
        alpha (float): balance; a negative one leaves it out of ``"focal"``.
        gamma (float): focusing exponent.
    """

    kind: Literal["cross_entropy", "focal", "varifocal"] = "cross_entropy"
    alpha: float = 0.25
    gamma: float = 2.0


CROSS_ENTROPY = ClassLoss()


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
    """All losses of matched predictions: see `detr_fast.ops.set_loss`."""
    count = targets.count.clamp(0, targets.labels.shape[1])
    if num_boxes is None:
        num_boxes = count.sum().clamp(min=1)
    target_of_query, status = (
        (match.target_of_query, match.status) if isinstance(match, Match) else (match, None)
    )
    layers = []
    for layer, (of_logits, of_boxes) in enumerate(zip(logits, boxes, strict=True)):
        dtype = torch.promote_types(of_logits.dtype, torch.float32)
        found = target_of_query[layer, :, : of_logits.shape[1]]
        bits = torch.zeros_like(count) if status is None else status[layer]
        failed = (bits & int(MatchStatus.NO_RESULT)).any()
        layers.append(
            _layer_losses(
                of_logits.to(dtype),
                of_boxes.to(dtype),
                targets,
                count,
                found,
                failed,
                class_loss,
                class_weight,
                num_boxes,
            )
        )
    return torch.stack(layers)


def _layer_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    count: Tensor,
    found: Tensor,
    failed: Tensor,
    class_loss: ClassLoss,
    class_weight: Tensor | None,
    num_boxes: float | Tensor,
) -> Tensor:
    """Losses (5,) of one layer; ``found`` (B, Q) is the target of each query."""
    columns, last = logits.shape[-1], logits.shape[-1] - 1
    classes = columns - (class_loss.kind == "cross_entropy")
    # one more target, so that there is one to look at where there are none
    labels = F.pad(targets.labels, (0, 1)).gather(1, found.clamp(0, targets.labels.shape[1]))
    in_image = (found >= 0) & (found < count[:, None])
    matched = in_image & (labels >= 0) & (labels < classes)
    wrong = (found >= 0) & ~matched
    fine = torch.where(wrong.any() | failed, torch.nan, 1.0).to(logits)

    at = found.clamp(0, targets.labels.shape[1])[..., None].expand(-1, -1, 4)
    tgt = F.pad(targets.boxes, (0, 0, 0, 1)).to(logits).gather(1, at)
    tgt = torch.where(matched[..., None], tgt, boxes.detach())
    src = torch.where(matched[..., None], boxes, tgt)  # a free query has no gradient, nor NaN
    l1, giou_loss = matched_box_losses(src, tgt)
    l1, giou_loss = (torch.where(matched, loss, 0).sum() / num_boxes for loss in (l1, giou_loss))

    class_of_query = torch.where(matched, labels, last)
    if class_loss.kind == "cross_entropy":
        weight = None if class_weight is None else class_weight.to(logits)
        classification = F.cross_entropy(logits.flatten(0, 1), class_of_query.flatten(), weight)
    else:
        one_hot = F.one_hot(class_of_query, columns).to(logits) * matched[..., None]
        loss = _sigmoid_loss(logits, one_hot, matched_iou(src, tgt).detach(), class_loss)
        classification = loss.sum() / num_boxes

    best = logits.argmax(-1)
    correct = (matched & (best == labels)).sum()
    class_error = 100 - 100 * correct.to(logits) / matched.sum().clamp(min=1)
    cardinality = ((best != last).sum(1) - count).abs().to(logits.dtype).mean()
    return torch.stack(
        [classification / fine, l1 / fine, giou_loss / fine, cardinality, class_error]
    )


def _sigmoid_loss(logits: Tensor, one_hot: Tensor, iou: Tensor, class_loss: ClassLoss) -> Tensor:
    """Losses (B, Q, C) of every column; ``one_hot`` is 0 for queries that are free."""
    _, alpha, gamma = class_loss
    probability = logits.sigmoid()
    if class_loss.kind == "focal":
        entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        miss = probability * (1 - one_hot) + (1 - probability) * one_hot
        balance = alpha * one_hot + (1 - alpha) * (1 - one_hot) if alpha >= 0 else 1
        return balance * miss**gamma * entropy
    quality = iou[..., None] * one_hot
    weight = alpha * probability.detach() ** gamma * (1 - one_hot) + quality
    return F.binary_cross_entropy_with_logits(logits, quality, weight, reduction="none")
