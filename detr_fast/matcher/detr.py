# SPDX-License-Identifier: Apache-2.0
"""The matcher of facebookresearch/detr."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detr_fast.matcher.base import ImageTargets, Outputs, Pairs, match_layers, match_on_device
from detr_fast.matcher.packing import Targets
from detr_fast.ops.matcher import ClassCost, CostWeights, Match
from detr_fast.reference.match import SOFTMAX

__all__ = ["HungarianMatcher", "build_matcher"]


class HungarianMatcher(nn.Module):
    """The matcher of facebookresearch/detr: one query for each target at the least total cost.

    The cost of a query and a target is ``cost_bbox`` times the L1 distance of the boxes, less
    ``cost_class`` times the probability of the target's class, less ``cost_giou`` times the GIoU
    (Carion et al., ECCV 2020).  It is computed in float32 (float64 for float64 inputs), also under
    autocast; ties are resolved as scipy does.

    Source: facebookresearch/detr at 29901c5, ``models/matcher.py``; its training uses weights
    1, 5, 2.  Differences: boxes of negative extent are not refused; the GIoU of two boxes without
    area is 0, not NaN; a cost that is not finite is named, with its image, term and input.

    Args:
        cost_class (float): weight of the class probability.
        cost_bbox (float): weight of the L1 distance.
        cost_giou (float): weight of the GIoU.

    Raises:
        ValueError: if all weights are 0.
    """

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1) -> None:
        super().__init__()
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise ValueError("cost_class, cost_bbox and cost_giou are all 0: nothing to match by")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    def extra_repr(self) -> str:
        """The three weights."""
        return (
            f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}"
        )

    @property
    def class_cost(self) -> ClassCost:
        """The formula of the class cost."""
        return SOFTMAX

    @property
    def weights(self) -> CostWeights:
        """The weights of the three costs."""
        return CostWeights(self.cost_class, self.cost_bbox, self.cost_giou)

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets) -> Pairs:
        """Match every image of a batch.

        Args:
            outputs (Mapping): ``"pred_logits"`` (Tensor[B, Q, C], no-object included) and
                ``"pred_boxes"`` (Tensor[B, Q, 4], ``(cx, cy, w, h)``).
            targets (Sequence[Mapping]): for each image ``"labels"`` (Tensor[n] of integers below
                C) and ``"boxes"`` (Tensor[n, 4], ``(cx, cy, w, h)``); n may be 0, or above Q.

        Returns:
            list[tuple[Tensor, Tensor]]: for each image the matched queries, ascending, and the
            target of each: int64 on the CPU, of length ``min(Q, n)``.

        Raises:
            ValueError: if shapes do not fit, a label is out of range or a cost is not finite.
        """
        return match_layers([outputs], targets, self.weights, self.class_cost)[0]

    def match(
        self,
        layers: Sequence[Outputs],
        targets: Targets,
        *,
        raise_non_finite: bool = True,
        names: Sequence[str] | None = None,
    ) -> Match:
        """Match the outputs of all decoder layers at once, without a wait for the device.

        What a criterion calls in place of `forward` for each layer; a class that changes how
        pairs are found overrides both, or `forward` alone, which then counts.  Of several
        optima it finds any one.

        Args:
            layers (Sequence[Mapping]): outputs as of `forward`.
            targets (Targets): on the device of the outputs.
            raise_non_finite (bool): raise on the CPU if a cost is not finite; else, and on a GPU,
                the status of the match says so.
            names (Sequence[str] | None): what the layers are called in a message.

        Raises:
            ValueError: as `forward`; names the layer, too.
        """
        return match_on_device(
            layers,
            targets,
            self.weights,
            self.class_cost,
            raise_non_finite=raise_non_finite,
            names=names,
        )


def build_matcher(args: Any) -> HungarianMatcher:
    """Matcher of the flags ``set_cost_class``, ``set_cost_bbox`` and ``set_cost_giou``."""
    return HungarianMatcher(
        cost_class=args.set_cost_class,
        cost_bbox=args.set_cost_bbox,
        cost_giou=args.set_cost_giou,
    )
