# SPDX-License-Identifier: Apache-2.0
"""The matcher of RT-DETR, second version."""

from collections.abc import Mapping

import torch
from torch import Tensor

from detr_fast.matcher import rtdetr
from detr_fast.matcher.base import ImageTargets, Outputs, Pairs, focal_or_softmax, match_layers
from detr_fast.matcher.masks import mask_costs, sample_points
from detr_fast.ops.matcher import CostWeights

__all__ = ["HungarianMatcher"]


class HungarianMatcher(rtdetr.HungarianMatcher):
    """The matcher of RT-DETR with a dict as its result, and optional costs of masks.

    Source: lyuwenyu/RT-DETR at 068dfde, ``rtdetrv2_pytorch/src/zoo/rtdetr/matcher.py``; costs of
    masks as of its commit 0aa14cc.  Differences: as of
    `detr_fast.matcher.HungarianMatcher`.

    Args:
        weight_dict (Mapping[str, float]): ``cost_class``, ``cost_bbox``, ``cost_giou``, and where
            there are masks ``cost_mask`` and ``cost_dice``.
        use_focal_loss (bool): take the focal class cost of the sigmoid, and not the softmax.
        alpha (float): balance of the focal class cost.
        gamma (float): exponent of the focal class cost.
        num_sample_points (int): random points of an image at which masks are compared.

    Raises:
        ValueError: if all weights are 0.
    """

    def __init__(
        self,
        weight_dict: Mapping[str, float],
        use_focal_loss: bool = False,
        alpha: float = 0.25,
        gamma: float = 2.0,
        num_sample_points: int = 12544,
    ) -> None:
        super().__init__(weight_dict, use_focal_loss, alpha, gamma)
        self.cost_mask = weight_dict.get("cost_mask", 0)
        self.cost_dice = weight_dict.get("cost_dice", 0)
        self.num_sample_points = num_sample_points

    @torch.no_grad()
    def forward(  # type: ignore[override]  # a dict where version 1 has a list
        self, outputs: Outputs, targets: ImageTargets
    ) -> dict[str, Pairs]:
        """Match every image of a batch.

        Args:
            outputs (Mapping): as of `detr_fast.matcher.HungarianMatcher.forward`, and
                optionally ``"pred_masks"`` (Tensor[B, Q, H, W]).
            targets (Sequence[Mapping]): likewise, and optionally ``"masks"`` (Tensor[n, h, w]).

        Returns:
            dict[str, list]: ``"indices"``, for each image the matched queries, ascending, and the
            target of each: int64 on the CPU.
        """
        weights = CostWeights(self.cost_class, self.cost_bbox, self.cost_giou)
        class_cost = focal_or_softmax(self.use_focal_loss, self.alpha, self.gamma)
        extra = None
        if (self.cost_mask or self.cost_dice) and "pred_masks" in outputs:
            extra = [
                [
                    self._mask_cost(predicted, target)
                    for predicted, target in zip(outputs["pred_masks"], targets, strict=True)
                ]
            ]
        pairs = match_layers([outputs], targets, weights, class_cost, extra_cost=extra)[0]
        return {"indices": pairs}

    def _mask_cost(self, predicted: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """(Q, H, W) -> (Q, n) of one image."""
        if "masks" not in target or target["masks"].numel() == 0:
            return predicted.new_zeros(len(predicted), len(target["labels"]))
        points = torch.rand(1, self.num_sample_points, 2, device=predicted.device)
        masks = target["masks"].to(predicted)
        entropy, dice = mask_costs(sample_points(predicted, points), sample_points(masks, points))
        return self.cost_mask * entropy + self.cost_dice * dice
