# SPDX-License-Identifier: Apache-2.0
"""The matchers of IDEA-Research/detrex."""

import torch

from detr_fast.matcher import detr
from detr_fast.matcher.base import (
    FOCAL,
    ImageTargets,
    Outputs,
    Pairs,
    focal_or_softmax,
    match_layers,
)
from detr_fast.ops.matcher import CostWeights

__all__ = ["GroupHungarianMatcher", "HungarianMatcher"]


class HungarianMatcher(detr.HungarianMatcher):
    """DETR's matcher with a choice of class cost, by default focal.

    Source: IDEA-Research/detrex at e244e6c, ``detrex/modeling/matcher/matcher.py``.  Differences:
    as of `detr_fast.matcher.HungarianMatcher`.

    Args:
        cost_class (float): weight of the class cost.
        cost_bbox (float): weight of the L1 distance.
        cost_giou (float): weight of the GIoU.
        cost_class_type (str): ``"focal_loss_cost"`` of the sigmoid, or ``"ce_cost"``: minus the
            softmax probability.
        alpha (float): balance of the focal class cost.
        gamma (float): exponent of the focal class cost.

    Raises:
        ValueError: if all weights are 0 or ``cost_class_type`` is unknown.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        cost_class_type: str = "focal_loss_cost",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(cost_class, cost_bbox, cost_giou)
        if cost_class_type not in ("focal_loss_cost", "ce_cost"):
            raise ValueError(
                f'cost_class_type: expected "focal_loss_cost" or "ce_cost", got {cost_class_type!r}'
            )
        self.cost_class_type = cost_class_type
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets) -> Pairs:
        """Match every image of a batch: as `detr_fast.matcher.HungarianMatcher.forward`."""
        weights = CostWeights(self.cost_class, self.cost_bbox, self.cost_giou)
        focal = self.cost_class_type == "focal_loss_cost"
        class_cost = focal_or_softmax(focal, self.alpha, self.gamma)
        return match_layers([outputs], targets, weights, class_cost)[0]


class GroupHungarianMatcher(detr.HungarianMatcher):
    """The matcher of Group DETR: the focal class cost, each group of queries on its own.

    Source: IDEA-Research/detrex at e244e6c, ``projects/group_detr/modeling/group_matcher.py``.
    Differences: as of `detr_fast.matcher.HungarianMatcher`; a number of queries that is no
    multiple of the number of groups is refused, where the original leaves the last ones out.

    Args:
        cost_class (float): weight of the focal class cost.
        cost_bbox (float): weight of the L1 distance.
        cost_giou (float): weight of the GIoU.

    Raises:
        ValueError: if all weights are 0.
    """

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets, group_nums: int = 1) -> Pairs:
        """Match every image and group.

        Args:
            outputs (Mapping): as of `detr_fast.matcher.HungarianMatcher.forward`.
            targets (Sequence[Mapping]): likewise.
            group_nums (int): equal groups that the queries are cut into, in their order.

        Returns:
            list[tuple[Tensor, Tensor]]: for each image the matched queries, group after group,
            and the target of each: int64 on the CPU.
        """
        weights = CostWeights(self.cost_class, self.cost_bbox, self.cost_giou)
        return match_layers([outputs], targets, weights, FOCAL, groups=group_nums)[0]
