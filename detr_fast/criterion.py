# SPDX-License-Identifier: Apache-2.0
"""The set prediction loss of DETR (Carion et al., ECCV 2020)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn

from detr_fast.loss_terms import loss_weights, scalars_of, weighted_losses
from detr_fast.matcher.base import layer_tensors
from detr_fast.matcher.packing import Targets
from detr_fast.ops.criterion import ClassLoss, set_loss
from detr_fast.ops.matcher import Match
from detr_fast.reference.criterion import CROSS_ENTROPY

__all__ = ["SetCriterion", "loss_weights", "weighted_losses"]

Outputs: TypeAlias = Mapping[str, Any]
ImageTargets: TypeAlias = Sequence[Mapping[str, Tensor]]
Indices: TypeAlias = Sequence[tuple[Tensor, Tensor]]

# losses of the op, by the name of the method that gives them and by their own: their columns
_COLUMNS = {
    "labels": {"loss_ce": 0, "class_error": 4},
    "boxes": {"loss_bbox": 1, "loss_giou": 2},
    "cardinality": {"cardinality_error": 3},
}
_DIFFERENTIABLE = 3  # the first ones; the others are for the log
_LAST_LAYER_ONLY = "class_error"


class SetCriterion(nn.Module):
    """Matches predictions and targets, then computes the losses of the matched pairs.

    Constructor, loss names and values are those of facebookresearch/detr.  One op matches all
    decoder layers, another computes their losses, and nothing waits for a GPU.  The arithmetic is
    float32 (float64 for float64 inputs), also under autocast.

    A subclass adds the loss ``"name"`` by a method ``loss_name``, or overrides one of the three;
    it is called for each decoder layer with the pairs of its images.  The matcher may be any module
    with the signature of DETR's; one with a method ``match``, as
    `detr_fast.matcher.HungarianMatcher.match`, is asked once for all layers.

    Args:
        num_classes (int): number of classes without no-object: the largest label + 1.
        matcher (nn.Module): called with outputs and targets, returns the pairs of each image.
        weight_dict (Mapping[str, float]): weight of each loss by name: `loss_weights` makes
            it, `weighted_losses` applies it.
        eos_coef (float): weight of no-object in the cross-entropy.
        losses (Sequence[str]): ``"labels"``, ``"boxes"`` and ``"cardinality"``, in any choice.
        class_loss (ClassLoss): the classification loss: cross-entropy of ``num_classes + 1``
            columns, or one of the sigmoid of ``num_classes`` columns.
        raise_non_finite (bool): on the CPU, raise if a matching cost is not finite.  Else, and on
            a GPU always, the losses of such a decoder layer are NaN.

    Attributes:
        empty_weight (Tensor[num_classes + 1]): the weights of the classes in the cross-entropy, a
            buffer.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: Mapping[str, float],
        eos_coef: float,
        losses: Sequence[str],
        *,
        class_loss: ClassLoss = CROSS_ENTROPY,
        raise_non_finite: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = losses
        self.class_loss = class_loss
        self.raise_non_finite = raise_non_finite
        if self._has_no_object:
            empty_weight = torch.ones(num_classes + 1)
            empty_weight[-1] = eos_coef
            self.register_buffer("empty_weight", empty_weight)

    def forward(self, outputs: Outputs, targets: ImageTargets | Targets) -> dict[str, Tensor]:
        """Compute the losses of all decoder layers.

        Args:
            outputs (Mapping): ``"pred_logits"`` (Tensor[B, Q, C]), ``"pred_boxes"`` (Tensor[B, Q,
                4], ``(cx, cy, w, h)`` in [0, 1]) and, if the earlier layers count as well,
                ``"aux_outputs"``: a list of such mappings.
            targets (Sequence[Mapping] | Targets): for each image ``"labels"`` (Tensor[n], integers
                below ``num_classes``) and ``"boxes"`` (Tensor[n, 4]), n may be 0; or these packed.

        Returns:
            dict[str, Tensor]: the scalars ``loss_ce``, ``class_error`` (percent), ``loss_bbox``,
            ``loss_giou``, ``cardinality_error``; those of ``aux_outputs[i]`` with the suffix
            ``_i``, without ``class_error``.

        Raises:
            ValueError: if a shape does not fit or a loss is not known; of tensors on the CPU also
                if a label is out of range or a matching cost is not finite.  On a GPU the losses
                of such a layer are NaN.
        """
        # in the order of the decoder, in which unbind_layers wants its gradients back
        layers = {f"_{i}": layer for i, layer in enumerate(outputs.get("aux_outputs", ()))}
        layers[""] = {name: value for name, value in outputs.items() if name != "aux_outputs"}
        device = outputs["pred_logits"].device
        packed = targets if isinstance(targets, Targets) else Targets.from_list(targets)
        self._check_columns(layers)
        self.check_labels(packed)
        packed = packed.to(device, non_blocking=device.type != "cpu")
        fused = [loss for loss in self.losses if self._is_fused(loss)]
        hooks = [loss for loss in self.losses if loss not in fused]
        if isinstance(targets, Targets):  # the list only for those who ask for it: it takes time
            by_image = hooks or not _speaks_for_all_layers(self.matcher)
            targets = packed.to_list() if by_image else []
        with torch.autocast(device.type, enabled=False):
            match, pairs = self._match(layers, packed, targets)
            num_boxes = _boxes_per_process(packed) if hooks or _has_processes() else None
            rows: Sequence[Sequence[Tensor]] = [()] * len(layers)
            if fused:
                table = self._losses(fused, [*layers.values()], packed, match, num_boxes)
                rows = scalars_of(table, _DIFFERENTIABLE)
            indices: Sequence[Indices] = pairs() if hooks else [()] * len(layers)
            known = dict(zip(layers, zip(layers.values(), rows, indices, strict=True), strict=True))
            losses: dict[str, Tensor] = {}
            for suffix in sorted(layers, key=bool):  # the last layer first
                layer, row, of_layer = known[suffix]
                for loss in self.losses:
                    if loss == "masks" and suffix:  # of the last layer alone, as in the original
                        continue
                    if loss in fused:
                        values = self._named(loss, row, log=not suffix)
                    else:
                        quiet = {"log": False} if suffix and loss == "labels" else {}
                        seen = layer if suffix else outputs
                        values = self.get_loss(loss, seen, targets, of_layer, num_boxes, **quiet)
                    losses |= {name + suffix: value for name, value in values.items()}
        return losses

    def get_loss(
        self,
        loss: str,
        outputs: Outputs,
        targets: ImageTargets,
        indices: Indices,
        num_boxes: float | Tensor | None,
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
        """Classification loss of all queries, no-object where unmatched.

        With ``log`` also ``class_error``: 100 less the accuracy on the matched queries, percent.
        """
        return self._loss_of_layer("labels", outputs, targets, indices, num_boxes, log)

    def loss_cardinality(
        self, outputs: Outputs, targets: ImageTargets, indices: Indices, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Mean absolute error of the number of objects in an image; for the log, no gradient."""
        return self._loss_of_layer("cardinality", outputs, targets, indices, num_boxes)

    def loss_boxes(
        self, outputs: Outputs, targets: ImageTargets, indices: Indices, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """L1 and GIoU loss of the matched pairs, summed and divided by ``num_boxes``."""
        return self._loss_of_layer("boxes", outputs, targets, indices, num_boxes)

    def check_labels(self, targets: Targets) -> None:
        """Raise if a label is no class; of targets on the CPU, for on a GPU a look would wait.

        Raises:
            ValueError: names image and label.
        """
        labels = targets.labels
        if not labels.is_cpu or labels.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = labels.aminmax()
        if low >= 0 and high < self.num_classes:
            return
        real = torch.arange(labels.shape[1]) < targets.count[:, None]
        outside = ((labels < 0) | (labels >= self.num_classes)) & real
        if outside.any():
            image, index = outside.nonzero()[0].tolist()
            raise ValueError(
                f"image {image}: label {int(labels[image, index])} is outside of [0, "
                f"{self.num_classes}): num_classes shall be the largest label + 1"
            )

    def _check_columns(self, layers: Mapping[str, Outputs]) -> None:
        columns = self.num_classes + self._has_no_object
        for layer in layers.values():
            shape = tuple(layer["pred_logits"].shape)
            if shape[-1] != columns:
                content = "classes and no-object" if self._has_no_object else "classes"
                raise ValueError(
                    f"pred_logits: expected {columns} columns ({self.num_classes} {content}), got "
                    f"shape {shape}"
                )

    @property
    def _has_no_object(self) -> bool:
        return self.class_loss.kind == "cross_entropy"

    def _is_fused(self, loss: str) -> bool:
        """Whether a loss is that of the op: no subclass or instance has its own."""
        methods = ("get_loss", f"loss_{loss}")
        return loss in _COLUMNS and not any(
            name in vars(self) or getattr(type(self), name) is not getattr(SetCriterion, name)
            for name in methods
        )

    def _named(self, loss: str, row: Sequence[Tensor], log: bool = True) -> dict[str, Tensor]:
        """The values of a loss from the five results of the op for one layer."""
        varifocal = self.class_loss.kind == "varifocal"
        return {
            "loss_vfl" if varifocal and name == "loss_ce" else name: row[column]
            for name, column in _COLUMNS[loss].items()
            if log or name != _LAST_LAYER_ONLY
        }

    def _match(
        self, layers: Mapping[str, Outputs], packed: Targets, targets: ImageTargets
    ) -> tuple[Match | Tensor, Callable[[], Sequence[Indices]]]:
        """What is matched, for the op, and a function that gives the pairs of each layer."""
        names = [f"aux_outputs[{n[1:]}]" if n else "last decoder layer" for n in layers]
        if _speaks_for_all_layers(self.matcher):
            ask: Callable[..., Match] = self.matcher.match  # type: ignore[assignment]
            match = ask(
                [*layers.values()], packed, raise_non_finite=self.raise_non_finite, names=names
            )
            return match, match.pairs
        pairs = []
        for name, layer in zip(names, layers.values(), strict=True):
            try:
                pairs.append(self.matcher(layer, targets))
            except ValueError as error:
                raise ValueError(f"{name}, {error}") from error
        queries = [layer["pred_boxes"].shape[1] for layer in layers.values()]
        device = packed.labels.device
        found = [_target_of_query(of_layer, max(queries), device) for of_layer in pairs]
        return torch.stack(found), lambda: pairs

    def _losses(
        self,
        losses: Sequence[str],
        layers: Sequence[Outputs],
        targets: Targets,
        match: Match | Tensor,
        num_boxes: float | Tensor | None,
    ) -> Tensor:
        """Results (L, 5) of the op; what ``losses`` do not need has no gradient, not even 0."""
        logits, boxes = layer_tensors(layers, len(targets))
        if "labels" not in losses:
            logits = [x.detach() for x in logits]
        if "boxes" not in losses:
            boxes = [x.detach() for x in boxes]
        return set_loss(
            logits,
            boxes,
            targets,
            match,
            class_loss=self.class_loss,
            class_weight=self.empty_weight if self._has_no_object else None,
            num_boxes=num_boxes,
        )

    def _loss_of_layer(
        self,
        loss: str,
        outputs: Outputs,
        targets: ImageTargets,
        indices: Indices,
        num_boxes: float | Tensor,
        log: bool = True,
    ) -> dict[str, Tensor]:
        """The values of a loss for one layer whose pairs are known."""
        some = outputs["pred_boxes"] if "pred_boxes" in outputs else outputs["pred_logits"]
        shape = some.shape[:2]
        nothing = {
            "pred_logits": some.new_zeros(*shape, self.num_classes + self._has_no_object),
            "pred_boxes": some.new_zeros(*shape, 4),
        }
        packed = Targets.from_list(targets)
        packed = packed.to(some.device, non_blocking=some.device.type != "cpu")
        found = _target_of_query(indices, shape[1], some.device)[None]
        table = self._losses([loss], [{**nothing, **outputs}], packed, found, num_boxes)
        [row] = scalars_of(table, _DIFFERENTIABLE)
        return self._named(loss, row, log)

    def _get_src_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Image and query of every matched pair, to index ``(B, Q, ...)`` with."""
        return _flat_index([src for src, _ in indices])

    def _get_tgt_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Image and target of every matched pair, to index ``(B, T, ...)`` with."""
        return _flat_index([tgt for _, tgt in indices])


def _speaks_for_all_layers(matcher: nn.Module) -> bool:
    """Whether a matcher has a ``match`` that goes with its ``forward``: no later class has that."""
    if "forward" in vars(matcher):
        return False
    defined = {
        name: next((i for i, c in enumerate(type(matcher).__mro__) if name in vars(c)), None)
        for name in ("match", "forward")
    }
    match, forward = defined["match"], defined["forward"]
    return match is not None and forward is not None and match <= forward


def _target_of_query(pairs: Indices, queries: int, device: torch.device) -> Tensor:
    """The target of each query (B, queries), -1 where it is free, from the pairs of each image.

    Where a query has several targets, which the op cannot know of, all are targets that there are
    not: so the losses are NaN.

    Raises:
        ValueError: if a query has several targets and the pairs are on the CPU.
    """
    found = torch.full((len(pairs), queries), -1, device=device)
    if not pairs:
        return found
    for number, (src, _) in enumerate(pairs):
        if src.is_cpu and len(src) > len(src.unique()):
            raise ValueError(
                f"image {number}: the matcher gives one query several targets, but the criterion "
                "takes one for each: match them one to one"
            )
    image, query = _flat_index([src.to(device, non_blocking=True) for src, _ in pairs])
    target = torch.cat([tgt for _, tgt in pairs]).to(found, non_blocking=True)
    found = found.index_put((image, query), target)
    return found.where((found >= 0).sum() == len(query), torch.iinfo(torch.int64).max)


def _flat_index(indices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    images = [torch.full_like(index, image) for image, index in enumerate(indices)]
    return torch.cat(images), torch.cat([*indices])


def _has_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _boxes_per_process(targets: Targets) -> Tensor:
    """Boxes per process, 1 at least; counted where the targets are, without a wait."""
    total = targets.count.sum().float()
    if _has_processes():
        distributed.all_reduce(total)
        total = total / distributed.get_world_size()
    return total.clamp(min=1)
