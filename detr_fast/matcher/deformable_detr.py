# SPDX-License-Identifier: Apache-2.0
"""The matcher of Deformable DETR, Conditional DETR and H-DETR."""

from typing import Any

from detr_fast.matcher import detr
from detr_fast.matcher.base import FOCAL
from detr_fast.ops.matcher import ClassCost

__all__ = ["HungarianMatcher", "build_matcher"]


class HungarianMatcher(detr.HungarianMatcher):
    """DETR's matcher with the focal class cost of the sigmoid, alpha 0.25 and gamma 2.

    Source: fundamentalvision/Deformable-DETR at 11169a6, Atten4Vis/ConditionalDETR at 8ea7c3f and
    HDETR/H-Deformable-DETR at f58ceb1, each ``models/matcher.py``; their training uses weights
    2, 5, 2.  H-DETR's criterion hands in targets that are repeated already.  Differences: as of
    `detr_fast.matcher.HungarianMatcher`.

    Args:
        cost_class (float): weight of the focal class cost.
        cost_bbox (float): weight of the L1 distance.
        cost_giou (float): weight of the GIoU.

    Raises:
        ValueError: if all weights are 0.
    """

    @property
    def class_cost(self) -> ClassCost:
        """The focal class cost."""
        return FOCAL


def build_matcher(args: Any) -> HungarianMatcher:
    """Matcher of the flags ``set_cost_class``, ``set_cost_bbox`` and ``set_cost_giou``."""
    return HungarianMatcher(
        cost_class=args.set_cost_class,
        cost_bbox=args.set_cost_bbox,
        cost_giou=args.set_cost_giou,
    )
