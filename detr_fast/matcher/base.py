# SPDX-License-Identifier: Apache-2.0
"""What the drop-in matchers share: dicts of outputs and targets in, pairs of CPU indices out."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from detr_fast.matcher.packing import Targets
from detr_fast.ops.matcher import ClassCost, CostWeights, Match, MatchStatus, hungarian_match
from detr_fast.reference.match import NonFinite
from detr_fast.reference.matcher import matching_cost_terms

Outputs: TypeAlias = Mapping[str, Any]
ImageTargets: TypeAlias = Sequence[Mapping[str, Tensor]]
Pairs: TypeAlias = list[tuple[Tensor, Tensor]]

FOCAL = ClassCost("focal", 0.25, 2.0)
FLOAT32_MAX = torch.finfo(torch.float32).max


def focal_or_softmax(focal: bool, alpha: float, gamma: float) -> ClassCost:
    """The two class costs that several code bases let one choose from."""
    return ClassCost("focal" if focal else "softmax", alpha, gamma)


class Keys(NamedTuple):
    """What a code base calls logits and boxes of the outputs, and labels and boxes of a target."""

    logits: str = "pred_logits"
    boxes: str = "pred_boxes"
    labels: str = "labels"
    target_boxes: str = "boxes"


DETR_KEYS = Keys()


def match_layers(
    layers: Sequence[Outputs],
    targets: ImageTargets,
    weights: CostWeights,
    class_cost: ClassCost,
    *,
    keys: Keys = DETR_KEYS,
    groups: int = 1,
    extra_cost: Sequence[Sequence[Tensor]] | None = None,
    non_finite: NonFinite = "error",
) -> list[Pairs]:
    """Match several outputs, such as those of all decoder layers, with one call of the op.

    Ties are resolved as scipy does.  Indices come to the host in one copy.

    Args:
        layers (Sequence[Mapping]): for each layer logits (Tensor[B, Q, C]) and boxes
            (Tensor[B, Q, 4]); Q and dtypes may differ between layers.
        targets (Sequence[Mapping]): for each image labels (Tensor[n]) and boxes (Tensor[n, 4]).
        weights (CostWeights): of class cost, L1 and GIoU.
        class_cost (ClassCost): the formula of the class cost.
        keys (Keys): what the four tensors are called.
        groups (int): query groups of an image, each matched on its own.
        extra_cost (Sequence[Sequence[Tensor[Q, n]]] | None): for each layer and image.
        non_finite (str | tuple[float, float, float]): see `hungarian_match`.

    Returns:
        list[list[tuple[Tensor, Tensor]]]: for each layer and image the matched queries,
        ascending, and the target of each: int64 on the CPU.

    Raises:
        ValueError: if shapes do not fit, or under ``"error"`` if a cost is not finite or a label
            outside of the columns; names layer, image, term and input.
    """
    logits, boxes = layer_tensors(layers, len(targets), groups, keys)
    packed = Targets.from_list(targets, keys.labels, keys.target_boxes)
    if packed.labels.device != logits[0].device:
        packed = packed.to(logits[0].device)
    extra = None
    if extra_cost is not None and targets:
        extra = [_padded_cost(costs, packed.labels.shape[1]) for costs in extra_cost]
    try:
        match = hungarian_match(
            logits,
            boxes,
            packed,
            weights,
            class_cost,
            groups=groups,
            extra_cost=extra,
            ties="scipy",
            non_finite=non_finite,
        )
        pairs, status = host_pairs(match, packed.count_host)
    except ValueError as error:
        names = [f"layer {i}, " for i in range(len(layers))] if len(layers) > 1 else [""]
        found = _diagnosis(logits, boxes, packed, weights, class_cost, keys, names)
        if non_finite != "error" or found is None:
            raise
        raise ValueError(found) from error
    wrong_label = status & MatchStatus.LABEL
    if wrong_label.any():  # where costs are replaced; this is none
        layer = int(wrong_label.nonzero()[0, 0])
        check_labels(packed, logits[layer].shape[-1], keys)
    return pairs


def match_on_device(
    layers: Sequence[Outputs],
    targets: Targets,
    weights: CostWeights,
    class_cost: ClassCost,
    *,
    raise_non_finite: bool = True,
    names: Sequence[str] | None = None,
) -> Match:
    """Match the outputs of all decoder layers of DETR with one call of the op.

    Nothing waits for a GPU, and of several optima it is any one.

    Args:
        layers (Sequence[Mapping]): for each layer ``"pred_logits"`` (Tensor[B, Q, C]) and
            ``"pred_boxes"`` (Tensor[B, Q, 4]).
        targets (Targets): on the device of the outputs.
        weights (CostWeights): of class cost, L1 and GIoU.
        class_cost (ClassCost): the formula of the class cost.
        raise_non_finite (bool): raise on the CPU if a cost is not finite; else the status says it.
        names (Sequence[str] | None): what the layers are called in a message.

    Raises:
        ValueError: if shapes do not fit or a cost is not finite; names layer, image and term.
    """
    logits, boxes = layer_tensors(layers, len(targets))
    try:
        return hungarian_match(
            logits,
            boxes,
            targets,
            weights,
            class_cost,
            non_finite="error" if raise_non_finite else "status",
        )
    except ValueError as error:
        names = names or [f"layer {i}" for i in range(len(layers))]
        named = [f"{name}, " for name in names]
        found = _diagnosis(logits, boxes, targets, weights, class_cost, DETR_KEYS, named)
        if found is None:
            raise
        raise ValueError(found) from error


def layer_tensors(
    layers: Sequence[Outputs], images: int, groups: int = 1, keys: Keys = DETR_KEYS
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and boxes of all layers, each of one dtype.

    Raises:
        ValueError: if a shape does not fit the number of images and groups.
    """
    logits = _of_one_dtype([layer[keys.logits] for layer in layers])
    boxes = _of_one_dtype([layer[keys.boxes] for layer in layers])
    for of_layer, boxes_of_layer in zip(logits, boxes, strict=True):
        _check_shapes(of_layer, boxes_of_layer, images, groups, keys)
    return logits, boxes


def host_pairs(match: Match, counts: Sequence[int]) -> tuple[list[Pairs], Tensor]:
    """The pairs of a match without repeated targets, as CPU tensors; one copy from the device.

    Args:
        match (Match): of L layers and B images.
        counts (Sequence[int]): targets of each image.

    Returns:
        tuple: pairs as of `match_layers`, and the status of the match on the CPU.

    Raises:
        ValueError: if a problem has no result.
    """
    found, status = match.target_of_query.flatten(), match.status.flatten()
    if not status.is_cpu:
        both = torch.cat((found, status)).cpu()
        found, status = both.split_with_sizes([found.size(0), status.size(0)])
    _, queries, groups, _ = match.sizes
    sizes = [groups * min(of_layer // groups, count) for of_layer in queries for count in counts]
    width = max(1, match.target_of_query.size(2))
    position = (found >= 0).nonzero().view(-1)
    if position.size(0) != sum(sizes):
        match.raise_for_status()
    in_image = (position % width).split_with_sizes(sizes)
    chosen = found.index_select(0, position).split_with_sizes(sizes)
    pairs, images = list(zip(in_image, chosen, strict=True)), len(counts)
    of_layers = [pairs[i * images : (i + 1) * images] for i in range(len(queries))]
    return of_layers, status.view(match.status.shape)


def _of_one_dtype(tensors: list[Tensor]) -> list[Tensor]:
    """Promoted where they differ, as under autocast those of the encoder and the decoder may."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) < 2:
        return tensors
    common = reduce(torch.promote_types, dtypes)
    return [tensor.to(common) for tensor in tensors]


def _check_shapes(logits: Tensor, boxes: Tensor, images: int, groups: int, keys: Keys) -> None:
    if logits.dim() != 3 or boxes.shape != (*logits.shape[:2], 4):
        raise ValueError(
            f"expected {keys.logits} (B, Q, C) and {keys.boxes} (B, Q, 4), "
            f"got {tuple(logits.shape)} and {tuple(boxes.shape)}"
        )
    if images != len(logits):
        raise ValueError(f"{images} targets for a batch of {len(logits)} images")
    if groups < 1 or logits.shape[1] % groups:
        raise ValueError(f"{logits.shape[1]} queries cannot be cut into {groups} equal groups")


def _padded_cost(costs: Sequence[Tensor], width: int) -> Tensor:
    """B costs (Q, n) -> (B, Q, width); what pads is not read."""
    return torch.stack(
        [torch.nn.functional.pad(cost, (0, width - cost.shape[1])) for cost in costs]
    )


def _diagnosis(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: Targets,
    weights: CostWeights,
    class_cost: ClassCost,
    keys: Keys,
    names: Sequence[str],
) -> str | None:
    """Name the first image whose cost is not finite; None where the sum or an extra cost is so."""
    for name, x, b in zip(names, logits, boxes, strict=True):
        for image, n in enumerate(targets.count_host):
            of_image = x[image], b[image], targets.labels[image, :n], targets.boxes[image, :n]
            why = _why_not_finite(*of_image, weights, class_cost, keys)
            if why is not None:
                return f"{name}image {image}: {why}"
    return None


def check_labels(targets: Targets, columns: int, keys: Keys = DETR_KEYS) -> None:
    """Raise if a label is outside of the columns of the logits; waits for a GPU.

    Raises:
        ValueError: names image and label.
    """
    padding = torch.arange(targets.labels.shape[1], device=targets.labels.device)
    padding = padding >= targets.count[:, None]
    outside = ((targets.labels < 0) | (targets.labels >= columns)) & ~padding
    if outside.any():
        image, at = outside.nonzero()[0].tolist()
        found = targets.labels[image, at : at + 1]
        raise ValueError(f"image {image}: {_wrong_label(found, columns, keys)}")


def _wrong_label(labels: Tensor, columns: int, keys: Keys) -> str | None:
    outside = labels[(labels < 0) | (labels >= columns)]
    if outside.numel() == 0:
        return None
    return (
        f"label {int(outside[0])} is outside of the {columns} columns of {keys.logits}: "
        "num_classes shall be the largest label + 1"
    )


def _why_not_finite(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    weights: CostWeights,
    class_cost: ClassCost,
    keys: Keys,
) -> str | None:
    """Explain NaN or infinity in the terms of one image."""
    wrong_label = _wrong_label(labels, logits.shape[1], keys)
    if weights.cost_class and wrong_label is not None:
        return wrong_label
    terms = matching_cost_terms(
        logits[None], boxes[None], labels[None], target_boxes[None], weights, class_cost
    )
    of_terms = [
        name
        for name, term in terms._asdict().items()
        if term is not None and not term.isfinite().all()
    ]
    if not of_terms:
        return None
    inputs = {keys.logits: logits, keys.boxes: boxes, "target boxes": target_boxes}
    of_inputs = [name for name, value in inputs.items() if not value.isfinite().all()]
    cause = (
        f"{' and '.join(of_inputs)} hold NaN or infinity: the training has diverged, or the data "
        "set holds such boxes"
        if of_inputs
        else "numbers overflow: the training has diverged, or the data set holds huge boxes"
    )
    return f"matching cost not finite in the term {', '.join(of_terms)}; {cause}"
