# SPDX-License-Identifier: Apache-2.0
"""The matchers of Hugging Face transformers.

As of transformers 5.23: NaN and infinity of a cost count the largest float32.  Differences of all
classes: boxes of negative extent are not refused (the originals raise); the cost is computed in
float32 where theirs has the dtype of the outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.matcher import mask2former
from detr_fast.matcher.base import (
    FLOAT32_MAX,
    FOCAL,
    ImageTargets,
    Keys,
    Outputs,
    Pairs,
    focal_or_softmax,
    match_layers,
)
from detr_fast.matcher.mask2former import match_masks
from detr_fast.matcher.masks import mask_costs, sample_points
from detr_fast.ops.matcher import ClassCost, CostWeights
from detr_fast.reference.boxes import at_least_float32
from detr_fast.reference.match import SOFTMAX

__all__ = [
    "DeformableDetrHungarianMatcher",
    "GroundingDinoHungarianMatcher",
    "HungarianMatcher",
    "LwDetrHungarianMatcher",
    "Mask2FormerHungarianMatcher",
    "RTDetrHungarianMatcher",
    "RfDetrHungarianMatcher",
]

_KEYS = Keys("logits", "pred_boxes", "class_labels", "boxes")
_NON_FINITE = (FLOAT32_MAX, FLOAT32_MAX, FLOAT32_MAX)


class HungarianMatcher(nn.Module):
    """The matcher of DETR, Conditional DETR, Table Transformer and YOLOS in transformers.

    Source: ``transformers/loss/loss_for_object_detection.py``.

    Args:
        class_cost (float): weight of the class probability.
        bbox_cost (float): weight of the L1 distance.
        giou_cost (float): weight of the GIoU.

    Raises:
        ValueError: if all weights are 0.
    """

    def __init__(self, class_cost: float = 1, bbox_cost: float = 1, giou_cost: float = 1) -> None:
        super().__init__()
        if class_cost == 0 and bbox_cost == 0 and giou_cost == 0:
            raise ValueError("class_cost, bbox_cost and giou_cost are all 0: nothing to match by")
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost

    def extra_repr(self) -> str:
        """The three weights."""
        return (
            f"class_cost={self.class_cost}, bbox_cost={self.bbox_cost}, giou_cost={self.giou_cost}"
        )

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets) -> Pairs:
        """Match every image of a batch.

        Args:
            outputs (Mapping): ``"logits"`` (Tensor[B, Q, C], no-object included) and
                ``"pred_boxes"`` (Tensor[B, Q, 4], ``(cx, cy, w, h)``).
            targets (Sequence[Mapping]): for each image ``"class_labels"`` (Tensor[n]) and
                ``"boxes"`` (Tensor[n, 4], ``(cx, cy, w, h)``).

        Returns:
            list[tuple[Tensor, Tensor]]: for each image the matched queries, ascending, and the
            target of each: int64 on the CPU.
        """
        return _match(self, outputs, targets, SOFTMAX)


class DeformableDetrHungarianMatcher(HungarianMatcher):
    """The matcher of Deformable DETR and its relatives, with the focal class cost.

    Source: ``transformers/loss/loss_deformable_detr.py``.
    """

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets) -> Pairs:
        """Match every image of a batch: as `HungarianMatcher.forward`."""
        return _match(self, outputs, targets, FOCAL)


class LwDetrHungarianMatcher(HungarianMatcher):
    """The matcher of LW-DETR: focal class cost, each group of queries on its own.

    Source: ``transformers/loss/loss_lw_detr.py``.  A number of queries that is no multiple of the
    number of groups is refused, where the original leaves the last ones out.
    """

    @torch.no_grad()
    def forward(  # type: ignore[override]  # the original has one more argument, too
        self, outputs: Outputs, targets: ImageTargets, group_detr: int
    ) -> Pairs:
        """Match every image and group: as `HungarianMatcher.forward`, group after group."""
        return _match(self, outputs, targets, FOCAL, groups=group_detr)


class RTDetrHungarianMatcher(nn.Module):
    """The matcher of RT-DETR and D-FINE.

    Source: ``transformers/loss/loss_rt_detr.py``, which ``loss_d_fine.py`` uses, too.

    Args:
        config (Any): with ``matcher_class_cost``, ``matcher_bbox_cost``, ``matcher_giou_cost``,
            ``use_focal_loss``, ``matcher_alpha`` and ``matcher_gamma``.

    Raises:
        ValueError: if all weights are 0.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.class_cost = config.matcher_class_cost
        self.bbox_cost = config.matcher_bbox_cost
        self.giou_cost = config.matcher_giou_cost
        self.use_focal_loss = config.use_focal_loss
        self.alpha = config.matcher_alpha
        self.gamma = config.matcher_gamma
        if self.class_cost == self.bbox_cost == self.giou_cost == 0:
            raise ValueError("matcher_*_cost of the config are all 0: nothing to match by")

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets) -> Pairs:
        """Match every image of a batch: as `HungarianMatcher.forward`."""
        class_cost = focal_or_softmax(self.use_focal_loss, self.alpha, self.gamma)
        return _match(self, outputs, targets, class_cost)


class GroundingDinoHungarianMatcher(HungarianMatcher):
    """The matcher of Grounding DINO: the focal cost is averaged over the tokens of a class.

    Source: ``transformers/loss/loss_grounding_dino.py``.
    """

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets) -> Pairs:
        """Match every image of a batch: as `HungarianMatcher.forward`.

        ``outputs["label_maps"]`` (Sequence[Tensor[classes, C]]) tells for each image the tokens of
        a class.
        """
        x = at_least_float32(outputs["logits"])
        p, (_, alpha, gamma, eps) = x.sigmoid(), FOCAL
        positive = alpha * (1 - p) ** gamma * -(p + eps).log()
        cost = positive - (1 - alpha) * p**gamma * -(1 - p + eps).log()
        extra = []
        for of_image, tokens, target in zip(cost, outputs["label_maps"], targets, strict=True):
            of_targets = tokens[target["class_labels"]].to(cost.dtype)
            mean = of_targets / of_targets.sum(-1, keepdim=True)
            with torch.autocast(cost.device.type, enabled=False):
                extra.append(self.class_cost * (of_image @ mean.T))
        weights = CostWeights(0, self.bbox_cost, self.giou_cost)
        return _match(self, outputs, targets, FOCAL, weights=weights, extra=extra)


class RfDetrHungarianMatcher(HungarianMatcher):
    """The matcher of RF-DETR's segmentation: focal class cost, masks, groups.

    Source: ``transformers/loss/loss_rf_detr.py``.  As there, masks are compared at
    ``B * Q * 4 // mask_point_sample_ratio`` points.

    Args:
        class_cost (float): weight of the focal class cost.
        bbox_cost (float): weight of the L1 distance.
        giou_cost (float): weight of the GIoU.
        mask_point_sample_ratio (int): see above.
        cost_mask_class_cost (float): weight of the cross-entropy of masks.
        cost_mask_dice_cost (float): weight of the dice loss of masks.
    """

    def __init__(
        self,
        class_cost: float = 1,
        bbox_cost: float = 1,
        giou_cost: float = 1,
        mask_point_sample_ratio: int = 16,
        cost_mask_class_cost: float = 1,
        cost_mask_dice_cost: float = 1,
    ) -> None:
        super().__init__(class_cost, bbox_cost, giou_cost)
        self.mask_point_sample_ratio = mask_point_sample_ratio
        self.cost_mask_class = cost_mask_class_cost
        self.cost_mask_dice = cost_mask_dice_cost

    @torch.no_grad()
    def forward(  # type: ignore[override]  # the original has one more argument, too
        self, outputs: Outputs, targets: ImageTargets, group_detr: int
    ) -> Pairs:
        """Match every image and group: as `HungarianMatcher.forward`, group after group.

        ``outputs["pred_masks"]`` (Tensor[B, Q, H, W]) and ``"masks"`` (Tensor[n, h, w]) of each
        target count, too.
        """
        predicted = outputs["pred_masks"]
        number = outputs["pred_boxes"].numel() // self.mask_point_sample_ratio
        points = torch.rand(1, number, 2, device=predicted.device)
        extra = []
        for of_image, target in zip(predicted, targets, strict=True):
            masks = sample_points(target["masks"].to(of_image), points, mode="nearest")
            entropy, dice = mask_costs(sample_points(of_image, points), masks)
            extra.append(self.cost_mask_class * entropy + self.cost_mask_dice * dice)
        return _match(self, outputs, targets, FOCAL, groups=group_detr, extra=extra)


class Mask2FormerHungarianMatcher(mask2former.HungarianMatcher):
    """The matcher of Mask2Former, OneFormer, EoMT (with DINOv3, too) and VidEoMT.

    Source: ``transformers/models/mask2former/modeling_mask2former.py``.

    Args:
        cost_class (float): weight of the class probability.
        cost_mask (float): weight of the cross-entropy of masks.
        cost_dice (float): weight of the dice loss of masks.
        num_points (int): random points of an image at which masks are compared.

    Raises:
        ValueError: if all weights are 0.
    """

    def __init__(
        self,
        cost_class: float = 1.0,
        cost_mask: float = 1.0,
        cost_dice: float = 1.0,
        num_points: int = 12544,
    ) -> None:
        super().__init__(cost_class, cost_mask, cost_dice, num_points)

    @torch.no_grad()
    def forward(  # type: ignore[override]  # tensors where the original has dicts
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> Pairs:
        """Match every image of a batch.

        Args:
            masks_queries_logits (Tensor[B, Q, H, W]): masks before the sigmoid.
            class_queries_logits (Tensor[B, Q, C]): class scores, no-object included.
            mask_labels (Sequence[Tensor[n, h, w]]): masks of each image.
            class_labels (Sequence[Tensor[n]]): labels of each image.

        Returns:
            list[tuple[Tensor, Tensor]]: for each image the matched queries, ascending, and the
            target of each: int64 on the CPU.
        """
        return match_masks(
            class_queries_logits,
            masks_queries_logits,
            class_labels,
            mask_labels,
            (self.cost_class, self.cost_mask, self.cost_dice),
            self.num_points,
            _NON_FINITE,
        )


def _match(
    matcher: Any,
    outputs: Outputs,
    targets: ImageTargets,
    class_cost: ClassCost,
    *,
    groups: int = 1,
    weights: CostWeights | None = None,
    extra: list[Tensor] | None = None,
) -> Pairs:
    """Match by the weights of a matcher, ours or the library's."""
    return match_layers(
        [outputs],
        targets,
        weights or CostWeights(matcher.class_cost, matcher.bbox_cost, matcher.giou_cost),
        class_cost,
        keys=_KEYS,
        groups=groups,
        extra_cost=None if extra is None else [extra],
        non_finite=_NON_FINITE,
    )[0]
