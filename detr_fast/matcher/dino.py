# SPDX-License-Identifier: Apache-2.0
"""The matchers of IDEA-Research/DINO."""

from typing import Any

import torch

from detr_fast.matcher import detr
from detr_fast.matcher.base import ImageTargets, Outputs, Pairs, check_labels
from detr_fast.matcher.packing import Targets
from detr_fast.ops.matcher import ClassCost
from detr_fast.reference.matcher import matching_cost, matching_cost_terms

__all__ = ["HungarianMatcher", "SimpleMinsumMatcher", "build_matcher"]


class HungarianMatcher(detr.HungarianMatcher):
    """DETR's matcher with the focal class cost of the sigmoid, gamma 2.

    Source: IDEA-Research/DINO at faa8520, ``models/dino/matcher.py``.  Differences: as of
    `detr_fast.matcher.HungarianMatcher`.

    Args:
        cost_class (float): weight of the focal class cost.
        cost_bbox (float): weight of the L1 distance.
        cost_giou (float): weight of the GIoU.
        focal_alpha (float): balance of the focal class cost.

    Raises:
        ValueError: if all weights are 0.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        focal_alpha: float = 0.25,
    ) -> None:
        super().__init__(cost_class, cost_bbox, cost_giou)
        self.focal_alpha = focal_alpha

    def extra_repr(self) -> str:
        """The weights and alpha."""
        return f"{super().extra_repr()}, focal_alpha={self.focal_alpha}"

    @property
    def class_cost(self) -> ClassCost:
        """The focal class cost."""
        return ClassCost("focal", self.focal_alpha)


class SimpleMinsumMatcher(HungarianMatcher):
    """The cheapest query for each target; two targets may get the same one.

    Source and arguments: as of `HungarianMatcher`.
    """

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets) -> Pairs:
        """Give every target its cheapest query, the first of several.

        Returns:
            list[tuple[Tensor, Tensor]]: for each image the query of each target, and the targets
            in their order: int64 on the device of the outputs.

        Raises:
            ValueError: if a label is outside of the columns of the logits.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        packed = Targets.from_list(targets)
        check_labels(packed, logits.shape[-1])
        packed = packed.to(logits.device)
        terms = matching_cost_terms(
            logits, boxes, packed.labels, packed.boxes, self.weights, self.class_cost
        )
        query = matching_cost(terms, self.weights, None).min(1).indices
        target = torch.arange(query.shape[1], device=query.device)
        return [(query[image, :n], target[:n]) for image, n in enumerate(packed.count_host)]


def build_matcher(args: Any) -> HungarianMatcher:
    """Matcher of the flags ``matcher_type``, ``set_cost_*`` and ``focal_alpha``.

    Raises:
        ValueError: if ``matcher_type`` is unknown.
    """
    types = {"HungarianMatcher": HungarianMatcher, "SimpleMinsumMatcher": SimpleMinsumMatcher}
    if args.matcher_type not in types:
        raise ValueError(
            f"matcher_type: expected one of {', '.join(types)}, got {args.matcher_type!r}"
        )
    return types[args.matcher_type](
        cost_class=args.set_cost_class,
        cost_bbox=args.set_cost_bbox,
        cost_giou=args.set_cost_giou,
        focal_alpha=args.focal_alpha,
    )
