# SPDX-License-Identifier: Apache-2.0
"""The original DETR's matcher and losses, restated: what a training step computes after the model.

The expressions are those of facebookresearch/detr and so is their cost: each decoder layer on its
own, loops over images, one matrix for all pairs of a batch where only its diagonal is used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Missing, optional
from benchmarks.problems import WEIGHTS, scipy_solver
from detr_fast import reference

Layer = dict[str, Tensor]
Pairs = list[tuple[Tensor, Tensor]]


def torchvision_giou() -> Any:
    """torchvision's pairwise GIoU, or why it is missing."""
    torchvision = optional("torchvision")
    return torchvision if isinstance(torchvision, Missing) else torchvision.ops.generalized_box_iou


def missing_for_original() -> Missing | None:
    """Why the original cannot run, if it cannot."""
    return next((m for m in (torchvision_giou(), scipy_solver()) if isinstance(m, Missing)), None)


@torch.no_grad()
def original_match(outputs: Layer, targets: list[Layer]) -> Pairs:
    """What the original DETR computes: one matrix for all pairs of images, then scipy."""
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    probability = logits.flatten(0, 1).softmax(-1)
    labels = torch.cat([t["labels"] for t in targets])
    of_targets = torch.cat([t["boxes"] for t in targets])
    cost = (
        WEIGHTS.cost_bbox * torch.cdist(boxes.flatten(0, 1), of_targets, p=1)
        + WEIGHTS.cost_class * -probability[:, labels]
        - WEIGHTS.cost_giou * _giou(boxes.flatten(0, 1), of_targets)
    )
    cost = cost.view(*logits.shape[:2], -1).cpu()
    blocks = cost.split([len(t["labels"]) for t in targets], -1)
    pairs = [scipy_solver()(block[image]) for image, block in enumerate(blocks)]
    return [(torch.as_tensor(q), torch.as_tensor(t)) for q, t in pairs]


def original_losses(
    layers: list[Layer], targets: list[Layer], class_weight: Tensor
) -> dict[str, Tensor]:
    """The losses of all decoder layers, the last one without a suffix, matching included."""
    *auxiliary, last = layers
    num_boxes = sum(len(t["labels"]) for t in targets)
    divisor = torch.as_tensor([num_boxes], dtype=torch.float, device=class_weight.device)
    divisor = torch.clamp(divisor, min=1).item()
    losses: dict[str, Tensor] = {}
    for suffix, layer in {"": last, **{f"_{i}": x for i, x in enumerate(auxiliary)}}.items():
        pairs = original_match(layer, targets)
        values = _layer_losses(layer, targets, pairs, divisor, class_weight, log=not suffix)
        losses |= {name + suffix: value for name, value in values.items()}
    return losses


def _layer_losses(
    layer: Layer,
    targets: list[Layer],
    pairs: Pairs,
    num_boxes: float,
    class_weight: Tensor,
    log: bool,
) -> dict[str, Tensor]:
    logits, boxes = layer["pred_logits"], layer["pred_boxes"]
    image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
    query = torch.cat([q for q, _ in pairs])
    labels = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, pairs, strict=True)])
    classes = torch.full(
        logits.shape[:2], logits.shape[-1] - 1, dtype=torch.int64, device=logits.device
    )
    classes[image, query] = labels
    losses = {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, class_weight)}
    if log:
        best = logits[image, query].topk(1)[1].t()
        accuracy = best.eq(labels.view(1, -1)).view(-1).float().sum(0) * (100.0 / len(labels))
        losses["class_error"] = 100 - accuracy
    with torch.no_grad():
        counts = torch.as_tensor([len(t["labels"]) for t in targets], device=logits.device)
        seen = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
        losses["cardinality_error"] = F.l1_loss(seen.float(), counts.float())
    found = boxes[image, query]
    of_targets = torch.cat([t["boxes"][j] for t, (_, j) in zip(targets, pairs, strict=True)])
    losses["loss_bbox"] = F.l1_loss(found, of_targets, reduction="none").sum() / num_boxes
    losses["loss_giou"] = (1 - torch.diag(_giou(found, of_targets))).sum() / num_boxes
    return losses


def original_total(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Term by term, as the original's loop adds up."""
    return sum(losses[name] * weights[name] for name in losses if name in weights)


def _giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """All pairs, of centres and sizes."""
    corners = (reference.box_cxcywh_to_xyxy(boxes) for boxes in (boxes1, boxes2))
    return torchvision_giou()(*corners)
