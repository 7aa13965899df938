# SPDX-License-Identifier: Apache-2.0
"""The set prediction loss of DETR (Carion et al., ECCV 2020)."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from detr_fast.matcher.packing import pack_targets
from detr_fast.reference.boxes import matched_box_losses

Outputs: TypeAlias = Mapping[str, Any]
ImageTargets: TypeAlias = Sequence[Mapping[str, Tensor]]
Indices: TypeAlias = Sequence[tuple[Tensor, Tensor]]


class SetCriterion(nn.Module):
    """Matches predictions and targets, then computes the losses of the matched pairs.

    Constructor, loss names and values are those of facebookresearch/detr.  The arithmetic is
    float32 (float64 for float64 inputs), also under autocast.  A subclass adds the loss ``"name"``
    by a method ``loss_name``.

    Args:
        num_classes (int): number of classes without no-object: the largest label + 1.
        matcher (nn.Module): called with outputs and targets, returns the pairs of each image.
        weight_dict (Mapping[str, float]): weight of each loss by name.  The caller applies it;
            :func:`loss_weights` makes it.
        eos_coef (float): weight of no-object in the classification loss.
        losses (Sequence[str]): ``"labels"``, ``"boxes"`` and ``"cardinality"``, in any choice.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: Mapping[str, float],
        eos_coef: float,
        losses: Sequence[str],
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = losses
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def forward(self, outputs: Outputs, targets: ImageTargets) -> dict[str, Tensor]:
        """Compute the losses of all decoder layers.

        Args:
            outputs (Mapping): ``"pred_logits"`` (Tensor[B, Q, num_classes + 1]), ``"pred_boxes"``
                (Tensor[B, Q, 4], ``(cx, cy, w, h)`` in [0, 1]) and, if the earlier layers count
                as well, ``"aux_outputs"``: a list of such mappings.
            targets (Sequence[Mapping]): for each image ``"labels"`` (Tensor[n], integers below
                ``num_classes``) and ``"boxes"`` (Tensor[n, 4]); n may be 0.

        Returns:
            dict[str, Tensor]: the scalars ``loss_ce``, ``class_error`` (percent), ``loss_bbox``,
            ``loss_giou``, ``cardinality_error``; those of ``aux_outputs[i]`` with the suffix
            ``_i``, without ``class_error``.

        Raises:
            ValueError: if a label is out of range, a shape does not fit, a loss is not known or a
                matching cost is not finite.
        """
        logits = outputs["pred_logits"]
        labels, _, counts = pack_targets(targets)
        self._check(logits, labels)
        num_boxes = _mean_over_processes(sum(counts), logits.device)
        layers = {"": {name: value for name, value in outputs.items() if name != "aux_outputs"}}
        layers |= {f"_{i}": layer for i, layer in enumerate(outputs.get("aux_outputs", ()))}
        losses: dict[str, Tensor] = {}
        with torch.autocast(logits.device.type, enabled=False):
            for suffix, layer in layers.items():
                try:
                    indices = self.matcher(layer, targets)
                except ValueError as error:
                    name = f"aux_outputs[{suffix[1:]}]" if suffix else "last decoder layer"
                    raise ValueError(f"{name}, {error}") from error
                for loss in self.losses:
                    # class_error is read of the last layer only
                    options = {"log": False} if suffix and loss == "labels" else {}
                    values = self.get_loss(loss, layer, targets, indices, num_boxes, **options)
                    losses |= {name + suffix: value for name, value in values.items()}
        return losses

    def get_loss(
        self,
        loss: str,
        outputs: Outputs,
        targets: ImageTargets,
        indices: Indices,
        num_boxes: float | Tensor,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Call the method ``loss_<loss>``.

        Raises:
            ValueError: if there is none.
        """
        method = getattr(self, f"loss_{loss}", None)
        if method is None:
            known = sorted(n.removeprefix("loss_") for n in dir(self) if n.startswith("loss_"))
            why = " (panoptic heads are not in this version)" if loss == "masks" else ""
            raise ValueError(f"unknown loss {loss!r}{why}; known are {', '.join(known)}")
        values: dict[str, Tensor] = method(outputs, targets, indices, num_boxes, **kwargs)
        return values

    def loss_labels(
        self,
        outputs: Outputs,
        targets: ImageTargets,
        indices: Indices,
        num_boxes: float | Tensor,
        log: bool = True,
    ) -> dict[str, Tensor]:
        """Weighted cross-entropy of all queries, no-object where unmatched.

        With ``log`` also ``class_error``: 100 less the accuracy on the matched queries, percent.
        """
        logits = _at_least_float32(outputs["pred_logits"])
        idx = self._get_src_permutation_idx(indices)
        matched = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)])
        matched = matched.to(logits.device, torch.int64)
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[idx] = matched
        weight = self.empty_weight.to(logits.dtype)
        losses = {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, weight)}
        if log:
            correct = (logits[idx].argmax(-1) == matched).float().sum()
            losses["class_error"] = 100 - correct * (100.0 / max(len(matched), 1))
        return losses

    def loss_cardinality(
        self, outputs: Outputs, targets: ImageTargets, indices: Indices, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Mean absolute error of the number of objects in an image; for the log, no gradient."""
        logits = outputs["pred_logits"]
        lengths = torch.tensor([len(t["labels"]) for t in targets], device=logits.device)
        predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
        return {"cardinality_error": F.l1_loss(predicted.float(), lengths.float())}

    def loss_boxes(
        self, outputs: Outputs, targets: ImageTargets, indices: Indices, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """L1 and GIoU loss of the matched pairs, summed and divided by ``num_boxes``."""
        boxes = _at_least_float32(outputs["pred_boxes"])
        src = boxes[self._get_src_permutation_idx(indices)]
        tgt = [t["boxes"][j] for t, (_, j) in zip(targets, indices, strict=True)]
        l1, giou_loss = matched_box_losses(src, torch.cat(tgt).to(src).reshape(-1, 4))
        return {"loss_bbox": l1.sum() / num_boxes, "loss_giou": giou_loss.sum() / num_boxes}

    def _get_src_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Image and query of every matched pair, to index ``(B, Q, ...)`` with."""
        return _flat_index([src for src, _ in indices])

    def _get_tgt_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Image and target of every matched pair, to index ``(B, T, ...)`` with."""
        return _flat_index([tgt for _, tgt in indices])

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if logits.shape[-1] != self.num_classes + 1:
            raise ValueError(
                f"pred_logits: expected {self.num_classes + 1} columns ({self.num_classes} classes "
                f"and no-object), got shape {tuple(logits.shape)}"
            )
        outside = (labels < 0) | (labels >= self.num_classes)
        if outside.any():
            image, index = outside.nonzero()[0].tolist()
            raise ValueError(
                f"image {image}: label {int(labels[image, index])} is outside of [0, "
                f"{self.num_classes}): num_classes shall be the largest label + 1"
            )


def loss_weights(
    dec_layers: int,
    aux_loss: bool = True,
    *,
    ce_loss_coef: float = 1,
    bbox_loss_coef: float = 5,
    giou_loss_coef: float = 2,
) -> dict[str, float]:
    """The ``weight_dict`` of :class:`SetCriterion`: equal weights in all decoder layers.

    Args:
        dec_layers (int): number of decoder layers.
        aux_loss (bool): whether the layers before the last one have losses too (``_0``, ``_1``...).
        ce_loss_coef (float): weight of the classification loss.
        bbox_loss_coef (float): weight of the L1 loss.
        giou_loss_coef (float): weight of the GIoU loss.
    """
    last = {"loss_ce": ce_loss_coef, "loss_bbox": bbox_loss_coef, "loss_giou": giou_loss_coef}
    layers = range(dec_layers - 1) if aux_loss else ()
    return last | {f"{name}_{i}": weight for i in layers for name, weight in last.items()}


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _flat_index(indices: list[Tensor]) -> tuple[Tensor, Tensor]:
    images = [torch.full_like(index, image) for image, index in enumerate(indices)]
    return torch.cat(images), torch.cat(indices)


def _mean_over_processes(num_boxes: int, device: torch.device) -> float | Tensor:
    """Boxes per process, 1 at least; left on the device where processes share the work."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return float(max(num_boxes, 1))
    total = torch.tensor(float(num_boxes), device=device)
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).clamp(min=1)
