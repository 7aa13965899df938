# SPDX-License-Identifier: Apache-2.0
"""The matcher of RF-DETR."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_fast.matcher import detr
from detr_fast.matcher.base import ImageTargets, Outputs, Pairs, match_layers
from detr_fast.matcher.masks import mask_costs, sample_points
from detr_fast.ops.matcher import ClassCost, CostWeights

__all__ = ["HungarianMatcher", "build_matcher"]


class HungarianMatcher(detr.HungarianMatcher):
    """DETR's matcher with groups, the focal class cost by log-sigmoid, masks and keypoints.

    Source: roboflow/rf-detr, package ``rfdetr`` 1.11.2, ``rfdetr/models/matcher.py``.  NaN and
    infinity cost more than anything finite of their problem, where the original compares with the
    whole batch.  All layers of a training step are matched by one call of the op.  Differences: as
    of `detr_fast.matcher.HungarianMatcher`.

    Args:
        cost_class (float): weight of the focal class cost.
        cost_bbox (float): weight of the L1 distance.
        cost_giou (float): weight of the GIoU.
        focal_alpha (float): balance of the focal class cost; gamma is 2.
        use_pos_only (bool): without effect, as in the original.
        use_position_modulated_cost (bool): likewise.
        mask_point_sample_ratio (int): masks are compared at ``H * W`` over this many points.
        cost_mask_ce (float): weight of the cross-entropy of masks.
        cost_mask_dice (float): weight of the dice loss of masks.
        num_keypoints_per_class (list[int] | None): for the cost of keypoints, which is computed by
            the installed ``rfdetr``.
        keypoint_l1_loss_coef (float): weight of the distance of keypoints.
        keypoint_findable_loss_coef (float): weight of whether they can be found.
        keypoint_visible_loss_coef (float): weight of whether they are visible.
        keypoint_nll_loss_coef (float): weight of their likelihood.

    Raises:
        ValueError: if the first three weights are 0.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        focal_alpha: float = 0.25,
        use_pos_only: bool = False,
        use_position_modulated_cost: bool = False,
        mask_point_sample_ratio: int = 16,
        cost_mask_ce: float = 1,
        cost_mask_dice: float = 1,
        num_keypoints_per_class: list[int] | None = None,
        keypoint_l1_loss_coef: float = 0.0,
        keypoint_findable_loss_coef: float = 0.0,
        keypoint_visible_loss_coef: float = 0.0,
        keypoint_nll_loss_coef: float = 0.0,
    ) -> None:
        super().__init__(cost_class, cost_bbox, cost_giou)
        self.focal_alpha = focal_alpha
        self.mask_point_sample_ratio = mask_point_sample_ratio
        self.cost_mask_ce = cost_mask_ce
        self.cost_mask_dice = cost_mask_dice
        self.num_keypoints_per_class = num_keypoints_per_class or []
        self.keypoint_l1_loss_coef = keypoint_l1_loss_coef
        self.keypoint_findable_loss_coef = keypoint_findable_loss_coef
        self.keypoint_visible_loss_coef = keypoint_visible_loss_coef
        self.keypoint_nll_loss_coef = keypoint_nll_loss_coef

    @torch.no_grad()
    def forward(
        self,
        outputs: Outputs,
        targets: ImageTargets,
        group_detr: int = 1,
        target_side_safety: object = None,
    ) -> Pairs:
        """Match every image and group.

        Args:
            outputs (Mapping): as of `detr_fast.matcher.HungarianMatcher.forward`, and
                optionally ``"pred_masks"`` (Tensor[B, Q, H, W], or a dict of its factors) and
                ``"pred_keypoints"``.
            targets (Sequence[Mapping]): likewise, optionally ``"masks"``, ``"keypoints"``, and
                ``"valid"`` (Tensor[n], bool): false for targets that fill up a fixed number,
                which take the queries that others leave.
            group_detr (int): equal groups that the queries are cut into, in their order.
            target_side_safety (object): ignored; there is nothing to be prepared.

        Returns:
            list[tuple[Tensor, Tensor]]: for each image the matched queries, group after group,
            and the target of each: int64 on the CPU.
        """
        return _match(self, [outputs], targets, group_detr)[0]

    @torch.no_grad()
    def _match_many(
        self,
        outputs_list: Sequence[Outputs],
        targets: ImageTargets,
        group_detr: int = 1,
        target_side_safety: object = None,
    ) -> list[Pairs]:
        """Match all layers at once: what the criterion of RF-DETR calls if it is there."""
        return _match(self, outputs_list, targets, group_detr)

    def _precompute_target_side_safety(self, outputs: Outputs, targets: ImageTargets) -> None:
        """Prepare nothing: the criterion of RF-DETR calls this once a step."""


def _match(
    matcher: Any, layers: Sequence[Outputs], targets: ImageTargets, groups: int
) -> list[Pairs]:
    """Match by the weights of a matcher of this class or of the original's."""
    weights = CostWeights(matcher.cost_class, matcher.cost_bbox, matcher.cost_giou)
    extra = [_extra_cost(matcher, layer, targets) for layer in layers]
    of_layers = [costs for costs in extra if costs is not None]
    return match_layers(
        layers,
        targets,
        weights,
        ClassCost("focal_logits", matcher.focal_alpha, 2.0),
        groups=groups,
        extra_cost=of_layers or None,
        non_finite="worst",
    )


def _extra_cost(matcher: Any, layer: Outputs, targets: ImageTargets) -> list[Tensor] | None:
    """Costs of masks, keypoints and padding of each image, (Q, n)."""
    terms = []
    if targets and "masks" in targets[0]:
        terms.append(_mask_cost(matcher, layer["pred_masks"], targets))
    if targets and "pred_keypoints" in layer and "keypoints" in targets[0]:
        terms.append(_keypoint_cost(matcher, layer["pred_keypoints"], targets))
    if targets and "valid" in targets[0]:
        terms.append(_padding_cost(layer["pred_logits"], targets))
    return [torch.stack(of_image).sum(0) for of_image in zip(*terms, strict=True)] or None


def _mask_cost(matcher: Any, predicted: Any, targets: ImageTargets) -> list[Tensor]:
    """Masks of all images are compared at the same points."""
    factors = None if isinstance(predicted, Tensor) else predicted
    image_like = predicted if factors is None else factors["spatial_features"]
    number = image_like.shape[-2] * image_like.shape[-1] // matcher.mask_point_sample_ratio
    points = torch.rand(1, number, 2, device=image_like.device)
    costs = []
    for image, target in enumerate(targets):
        logits = sample_points(image_like[image], points, padding_mode="border")
        if factors is not None:
            logits = _product(factors["query_features"][image], logits) + factors["bias"]
        masks = target["masks"].to(logits.dtype)
        masks = sample_points(masks, points, mode="nearest", padding_mode="border")
        entropy, dice = mask_costs(logits, masks)
        costs.append(matcher.cost_mask_ce * entropy + matcher.cost_mask_dice * dice)
    return costs


def _product(queries: Tensor, features: Tensor) -> Tensor:
    """(Q, K) and (K, P) -> (Q, P) in float32, also under autocast."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ features.float()


def _keypoint_cost(matcher: Any, predicted: Tensor, targets: ImageTargets) -> list[Tensor]:
    from rfdetr.models.heads.keypoints import compute_keypoint_matching_cost

    coefficients = (
        matcher.keypoint_l1_loss_coef,
        matcher.keypoint_findable_loss_coef,
        matcher.keypoint_visible_loss_coef,
        matcher.keypoint_nll_loss_coef,
    )
    costs = []
    for image, target in enumerate(targets):
        terms = compute_keypoint_matching_cost(
            all_pred_keypoints=predicted[image : image + 1],
            target_keypoints=target["keypoints"],
            target_classes=target["labels"],
            target_areas=target["boxes"][:, 2] * target["boxes"][:, 3],
            num_keypoints_per_class=matcher.num_keypoints_per_class,
        )
        weighted = [c * term[0] for c, term in zip(coefficients, terms, strict=True)]
        costs.append(torch.stack(weighted).sum(0))
    return costs


def _padding_cost(logits: Tensor, targets: ImageTargets) -> list[Tensor]:
    """Targets that only fill up cost the same, the most, with all queries: NaN counts so."""
    costs = []
    for target in targets:
        valid = target["valid"].to(logits.device)
        cost = torch.zeros(logits.shape[1], len(valid), device=logits.device, dtype=torch.float32)
        costs.append(cost.masked_fill(~valid, torch.nan))
    return costs


def build_matcher(args: Any) -> HungarianMatcher:
    """Matcher of RF-DETR's training arguments."""
    masks = (
        {
            "cost_mask_ce": args.mask_ce_loss_coef,
            "cost_mask_dice": args.mask_dice_loss_coef,
            "mask_point_sample_ratio": args.mask_point_sample_ratio,
        }
        if args.segmentation_head
        else {}
    )
    keypoints = {
        name: getattr(args, name)
        for name in (
            "num_keypoints_per_class",
            "keypoint_l1_loss_coef",
            "keypoint_findable_loss_coef",
            "keypoint_visible_loss_coef",
            "keypoint_nll_loss_coef",
        )
        if hasattr(args, name)
    }
    return HungarianMatcher(
        cost_class=args.set_cost_class,
        cost_bbox=args.set_cost_bbox,
        cost_giou=args.set_cost_giou,
        focal_alpha=args.focal_alpha,
        **masks,
        **keypoints,
    )
