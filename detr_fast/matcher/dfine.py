# SPDX-License-Identifier: Apache-2.0
"""The matcher of D-FINE, DEIM and DEIMv2, and the union of the matches of all layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detr_fast.matcher import rtdetr
from detr_fast.matcher.base import (
    FLOAT32_MAX,
    ImageTargets,
    Outputs,
    Pairs,
    focal_or_softmax,
    match_layers,
)
from detr_fast.ops.matcher import ClassCost, CostWeights

__all__ = ["HungarianMatcher", "get_go_indices"]

_NON_FINITE = (1.0, FLOAT32_MAX, -FLOAT32_MAX)
_TAKEN = 1e6


class HungarianMatcher(rtdetr.HungarianMatcher):
    """The matcher of RT-DETR with a dict as its result, and DEIMv2's IoU-aware cost.

    Source: Peterande/D-FINE at 4a1f73a, ``src/zoo/dfine/matcher.py``, Intellindust-AI-Lab/DEIM at
    a9aa4ad and DEIMv2 at 0fff8d4, ``engine/deim/matcher.py``.  A NaN of the cost counts 1,
    infinity the largest float32 of its sign, as there.  Differences: as of
    `detr_fast.matcher.HungarianMatcher`, and those of ``return_topk``.

    Args:
        weight_dict (Mapping[str, float]): ``cost_class``, ``cost_bbox`` and ``cost_giou``.
        use_focal_loss (bool): take the focal class cost of the sigmoid, and not the softmax.
        alpha (float): balance of the focal class cost.
        gamma (float): exponent of the focal class cost.
        change_matcher (bool): from ``matcher_change_epoch`` on the cost is minus the probability
            of the target's class times the IoU to the power of ``iou_order_alpha``.
        iou_order_alpha (float): exponent of the IoU.
        matcher_change_epoch (int): first epoch of that cost.

    Raises:
        ValueError: if all weights are 0.
    """

    def __init__(
        self,
        weight_dict: Mapping[str, float],
        use_focal_loss: bool = False,
        alpha: float = 0.25,
        gamma: float = 2.0,
        change_matcher: bool = False,
        iou_order_alpha: float = 1.0,
        matcher_change_epoch: int = 10000,
    ) -> None:
        super().__init__(weight_dict, use_focal_loss, alpha, gamma)
        self.change_matcher = change_matcher
        self.iou_order_alpha = iou_order_alpha
        self.matcher_change_epoch = matcher_change_epoch

    @torch.no_grad()
    def forward(  # type: ignore[override]  # a dict where RT-DETR has a list
        self, outputs: Outputs, targets: ImageTargets, return_topk: int = False, epoch: int = 0
    ) -> dict[str, Pairs]:
        """Match every image of a batch.

        Args:
            outputs (Mapping): as of `detr_fast.matcher.HungarianMatcher.forward`.
            targets (Sequence[Mapping]): likewise.
            return_topk (int): if not 0, match this often, each time without the queries matched
                before.  The original, in which nothing calls this, by an error also leaves out
                the queries whose number is that of a matched target.
            epoch (int): the current one, for ``matcher_change_epoch``.

        Returns:
            dict[str, list]: ``"indices"``, for each image the matched queries, ascending, and the
            target of each: int64 on the CPU.  With ``return_topk`` it is ``"indices_o2m"``, and
            the matches of an image follow one another.
        """
        weights = CostWeights(self.cost_class, self.cost_bbox, self.cost_giou)
        class_cost = focal_or_softmax(self.use_focal_loss, self.alpha, self.gamma)
        if self.change_matcher and epoch >= self.matcher_change_epoch:
            weights, class_cost = CostWeights(1, 0, 0), ClassCost("iou_aware", self.iou_order_alpha)
            if not self.use_focal_loss:  # the sigmoid of this is the softmax
                probability = outputs["pred_logits"].float().softmax(-1)
                outputs = {**outputs, "pred_logits": probability.logit()}
        pairs = match_layers([outputs], targets, weights, class_cost, non_finite=_NON_FINITE)[0]
        if not return_topk:
            return {"indices": pairs}
        rounds = [pairs]
        logits = outputs["pred_logits"]
        taken = [logits.new_zeros(logits.shape[1], len(target["labels"])) for target in targets]
        for _ in range(return_topk - 1):
            for cost, (queries, _targets) in zip(taken, rounds[-1], strict=True):
                cost[queries] = _TAKEN
            rounds += match_layers(
                [outputs],
                targets,
                weights,
                class_cost,
                extra_cost=[taken],
                non_finite=_NON_FINITE,
            )
        return {
            "indices_o2m": [
                (torch.cat([q for q, _ in image]), torch.cat([t for _, t in image]))
                for image in zip(*rounds, strict=True)
            ]
        }


@torch.no_grad()
def get_go_indices(
    indices: Sequence[tuple[Tensor, Tensor]],
    indices_aux_list: Sequence[Sequence[tuple[Tensor, Tensor]]],
) -> Pairs:
    """Unite the matches of all layers: every query keeps the target it had in most layers.

    The "GO" indices of D-FINE (Peng et al., ICLR 2025), for its criterion:
    ``DFINECriterion._get_go_indices = staticmethod(get_go_indices)``.  Of targets met equally
    often the lowest is kept, and equal counts are ordered by query; the original leaves both to a
    sort that is not stable.  A few reads from the device, where the original has two a pair.

    Args:
        indices (Sequence[tuple[Tensor, Tensor]]): for each image matched queries and their
            targets, of the last layer.
        indices_aux_list (Sequence): the same of each other layer.

    Returns:
        list[tuple[Tensor, Tensor]]: for each image queries and their targets, int64 on the device
        of the indices; pairs of most layers first, then by query.
    """
    layers = [indices, *indices_aux_list]
    images = len(indices)
    if images == 0:
        return []
    sizes = [queries.shape[0] for layer in layers for queries, _ in layer]
    query = torch.cat([queries for layer in layers for queries, _ in layer])
    target = torch.cat([targets for layer in layers for _, targets in layer])
    if query.shape[0] == 0:
        return [(query, target) for _ in range(images)]
    image_of_part = torch.arange(images).repeat(len(layers))
    image = image_of_part.repeat_interleave(torch.tensor(sizes)).to(query.device)

    # one number for image, query and target, so that one sort serves all images
    queries, targets = query.max() + 1, target.max() + 1
    pair, count = ((image * queries + query) * targets + target).unique(return_counts=True)
    owner, target = pair // targets, pair % targets  # owner: image and query
    image, query = owner // queries, owner % queries
    order = (image * (len(layers) + 1) - count).argsort(stable=True)
    # the first of a query in this order is its most frequent target
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    best = torch.full_like(order, len(order)).scatter_reduce(0, _dense(owner), rank, "amin")
    kept = order[(best[_dense(owner)] == rank)[order]]
    counts = image[kept].bincount(minlength=images).tolist()
    return list(zip(query[kept].split(counts), target[kept].split(counts), strict=True))


def _dense(sorted_values: Tensor) -> Tensor:
    """0 for the lowest of ascending values, 1 for the next, and so on."""
    return torch.cat([sorted_values.new_zeros(1), sorted_values.diff().ne(0).cumsum(0)])
