# SPDX-License-Identifier: Apache-2.0
"""The matchers of Mask2Former and MaskDINO: masks are part of the cost."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from detr_fast.matcher.base import DETR_KEYS, FOCAL, ImageTargets, Outputs, Pairs, match_layers
from detr_fast.matcher.masks import mask_costs, sample_points
from detr_fast.ops.matcher import CostWeights
from detr_fast.reference.match import SOFTMAX, NonFinite
from detr_fast.reference.matcher import CostTerms, matching_cost, matching_cost_terms

__all__ = ["HungarianMatcher", "MaskDINOHungarianMatcher", "match_masks"]

_COCO_THINGS = 80


class HungarianMatcher(nn.Module):
    """The matcher of Mask2Former: softmax class cost, cross-entropy and dice loss of masks.

    Source: facebookresearch/Mask2Former at 9b0651c, ``mask2former/modeling/matcher.py`` (Cheng et
    al., CVPR 2022); its training uses weights 2, 5, 5.  It takes the same random points as the
    original.  Differences: the sum over the points is rounded in another order, by about 1e-6.

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
        cost_class: float = 1,
        cost_mask: float = 1,
        cost_dice: float = 1,
        num_points: int = 0,
    ) -> None:
        super().__init__()
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError("cost_class, cost_mask and cost_dice are all 0: nothing to match by")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    def extra_repr(self) -> str:
        """Weights and number of points."""
        return (
            f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, "
            f"cost_dice={self.cost_dice}, num_points={self.num_points}"
        )

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: ImageTargets) -> Pairs:
        """Match every image of a batch.

        Args:
            outputs (Mapping): ``"pred_logits"`` (Tensor[B, Q, C], no-object included) and
                ``"pred_masks"`` (Tensor[B, Q, H, W]).
            targets (Sequence[Mapping]): for each image ``"labels"`` (Tensor[n]) and ``"masks"``
                (Tensor[n, h, w], padded as the prediction is).

        Returns:
            list[tuple[Tensor, Tensor]]: for each image the matched queries, ascending, and the
            target of each: int64 on the CPU.
        """
        return match_masks(
            outputs["pred_logits"],
            outputs["pred_masks"],
            [target["labels"] for target in targets],
            [target["masks"] for target in targets],
            (self.cost_class, self.cost_mask, self.cost_dice),
            self.num_points,
        )


def match_masks(
    logits: Tensor,
    predicted: Tensor,
    labels: Sequence[Tensor],
    masks: Sequence[Tensor],
    weights: tuple[float, float, float],
    points: int,
    non_finite: NonFinite = "error",
) -> Pairs:
    """Match by class and masks.

    Args:
        logits (Tensor[B, Q, C]): class scores before the softmax.
        predicted (Tensor[B, Q, H, W]): masks before the sigmoid.
        labels (Sequence[Tensor[n]]): of each image.
        masks (Sequence[Tensor[n, h, w]]): of each image.
        weights (tuple[float, float, float]): of class, cross-entropy and dice loss.
        points (int): random points of an image.
        non_finite (str | tuple[float, float, float]): what NaN and infinity do.

    Returns:
        list[tuple[Tensor, Tensor]]: as of `HungarianMatcher.forward`.
    """
    cost_class, cost_mask, cost_dice = weights
    extra = []
    for of_image, of_targets in zip(predicted, masks, strict=True):
        entropy, dice = _at_random_points(of_image, of_targets, points)
        extra.append(cost_mask * entropy + cost_dice * dice)
    no_boxes = logits.new_zeros(*logits.shape[:2], 4)
    targets = [
        {"labels": of_image, "boxes": logits.new_zeros(len(of_image), 4)} for of_image in labels
    ]
    return match_layers(
        [{"pred_logits": logits, "pred_boxes": no_boxes}],
        targets,
        CostWeights(cost_class, 0, 0),
        SOFTMAX,
        extra_cost=[extra],
        non_finite=non_finite,
    )[0]


def _at_random_points(predicted: Tensor, masks: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """(Q, H, W), (n, h, w) -> cross-entropy and dice loss, (Q, n)."""
    at = torch.rand(1, points, 2, device=predicted.device)
    masks = masks.to(predicted)
    if masks.numel() == 0:
        none = predicted.new_zeros(len(predicted), len(masks), dtype=torch.float32)
        return none, none
    return mask_costs(sample_points(predicted, at), sample_points(masks, at))


class MaskDINOHungarianMatcher(HungarianMatcher):
    """The matcher of MaskDINO: focal class cost, masks, and boxes.

    Source: IDEA-Research/MaskDINO at 3831d85, ``maskdino/modeling/matcher.py``, where it is called
    ``HungarianMatcher`` (Li et al., CVPR 2023).  Differences: as of `HungarianMatcher`.

    Args:
        cost_class (float): weight of the focal class cost, alpha 0.25 and gamma 2.
        cost_mask (float): weight of the cross-entropy of masks.
        cost_dice (float): weight of the dice loss of masks.
        num_points (int): random points of an image at which masks are compared.
        cost_box (float): weight of the L1 distance.
        cost_giou (float): weight of the GIoU.
        panoptic_on (bool): labels from 80 on are stuff, whose boxes cost as much as the things'
            boxes do on average.

    Raises:
        ValueError: if the first three weights are 0.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_mask: float = 1,
        cost_dice: float = 1,
        num_points: int = 0,
        cost_box: float = 0,
        cost_giou: float = 0,
        panoptic_on: bool = False,
    ) -> None:
        super().__init__(cost_class, cost_mask, cost_dice, num_points)
        self.cost_box = cost_box
        self.cost_giou = cost_giou
        self.panoptic_on = panoptic_on

    @torch.no_grad()
    def forward(
        self,
        outputs: Outputs,
        targets: ImageTargets,
        cost: Sequence[str] = ("cls", "box", "mask"),
    ) -> Pairs:
        """Match every image of a batch.

        Args:
            outputs (Mapping): ``"pred_logits"`` (Tensor[B, Q, C]), ``"pred_boxes"``
                (Tensor[B, Q, 4], ``(cx, cy, w, h)``) and ``"pred_masks"`` (Tensor[B, Q, H, W]).
            targets (Sequence[Mapping]): for each image ``"labels"``, ``"boxes"`` and ``"masks"``.
            cost (Sequence[str]): the terms that count beside the class: ``"box"`` and ``"mask"``.

        Returns:
            list[tuple[Tensor, Tensor]]: for each image the matched queries, ascending, and the
            target of each: int64 on the CPU.
        """
        of_boxes = (self.cost_box, self.cost_giou) if "box" in cost else (0, 0)
        weights, extra = CostWeights(self.cost_class, *of_boxes), None
        with_masks, panoptic = "mask" in cost, self.panoptic_on and "box" in cost
        if with_masks or panoptic:
            extra = []
            for image, target in enumerate(targets):
                terms = []
                if with_masks:
                    entropy, dice = _at_random_points(
                        outputs["pred_masks"][image], target["masks"], self.num_points
                    )
                    terms.append(self.cost_mask * entropy + self.cost_dice * dice)
                if panoptic:
                    terms.append(_panoptic_box_cost(outputs, target, image, weights))
                extra.append(torch.stack(terms).sum(0))
        if panoptic:
            weights = CostWeights(self.cost_class, 0, 0)
        keyed = None if extra is None else [extra]
        return match_layers([outputs], targets, weights, FOCAL, keys=DETR_KEYS, extra_cost=keyed)[0]


def _panoptic_box_cost(
    outputs: Outputs, target: Mapping[str, Tensor], image: int, weights: CostWeights
) -> Tensor:
    """(Q, n): stuff has the mean cost of the things, or 0 where there are none."""
    labels = target["labels"]
    found = matching_cost_terms(
        outputs["pred_logits"][image, None],
        outputs["pred_boxes"][image, None],
        labels[None],
        target["boxes"][None],
        weights._replace(cost_class=0),
    )
    things = labels < _COCO_THINGS

    def with_means(term: Tensor | None) -> Tensor | None:
        if term is None:
            return None
        of_things = term[:, :, things]
        return term.where(things, of_things.mean() if of_things.numel() else 0)

    terms = CostTerms(None, with_means(found.cost_bbox), with_means(found.cost_giou))
    return matching_cost(terms, weights, None)[0]
