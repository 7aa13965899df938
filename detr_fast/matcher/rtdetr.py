# SPDX-License-Identifier: Apache-2.0
"""The matcher of RT-DETR, first version."""

from collections.abc import Mapping

import torch
from torch import nn

from detr_fast.matcher.base import ImageTargets, Outputs, Pairs, focal_or_softmax, match_layers
from detr_fast.ops.matcher import CostWeights

__all__ = ["HungarianMatcher"]


class HungarianMatcher(nn.Module):
    """DETR's matcher, configured by a dict, with a choice of class cost.

    Source: lyuwenyu/RT-DETR at 068dfde, ``rtdetr_pytorch/src/zoo/rtdetr/matcher.py``, which
    registers the class for its configuration files: ``register(HungarianMatcher)``.  Differences:
    as of `detr_fast.matcher.HungarianMatcher`.

    Args:
        weight_dict (Mapping[str, float]): ``cost_class``, ``cost_bbox`` and ``cost_giou``; its
            configuration files say 2, 5, 2.
        use_focal_loss (bool): take the focal class cost of the sigmoid, and not the softmax.
        alpha (float): balance of the focal class cost.
        gamma (float): exponent of the focal class cost.

    Raises:
        ValueError: if all weights are 0.
    """

    __share__ = ("use_focal_loss",)  # read by the configuration system of RT-DETR

    def __init__(
        self,
        weight_dict: Mapping[str, float],
        use_focal_loss: bool = False,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.cost_class = weight_dict["cost_class"]
        self.cost_bbox = weight_dict["cost_bbox"]
        self.cost_giou = weight_dict["cost_giou"]
        self.use_focal_loss = use_focal_loss
        self.alpha = alpha
        self.gamma = gamma
        if not any(weight_dict.values()):
            raise ValueError(f"weight_dict: all weights are 0, got {dict(weight_dict)}")

    def extra_repr(self) -> str:
        """Weights and class cost."""
        class_cost = f"focal({self.alpha}, {self.gamma})" if self.use_focal_loss else "softmax"
        return (
            f"cost_class={self.cost_class} {class_cost}, cost_bbox={self.cost_bbox}, "
            f"cost_giou={self.cost_giou}"
        )

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets) -> Pairs:
        """Match every image of a batch: as `detr_fast.matcher.HungarianMatcher.forward`."""
        weights = CostWeights(self.cost_class, self.cost_bbox, self.cost_giou)
        class_cost = focal_or_softmax(self.use_focal_loss, self.alpha, self.gamma)
        return match_layers([outputs], targets, weights, class_cost)[0]
