# SPDX-License-Identifier: Apache-2.0
"""The terms of a loss: as scalars, weighted and summed, by a number of ops that does not grow.

DETR hands its losses around as a dict of scalars, three and more for each decoder layer.  Torch
would take them apart, weight and add them and pad their gradients one by one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def loss_weights(
    dec_layers: int,
    aux_loss: bool = True,
    *,
    ce_loss_coef: float = 1,
    bbox_loss_coef: float = 5,
    giou_loss_coef: float = 2,
) -> dict[str, float]:
    """The ``weight_dict`` of `SetCriterion`: equal weights in all decoder layers.

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


def scalars_of(table: Tensor, losses: int) -> list[Sequence[Tensor]]:
    """The elements of a table, row by row.

    Args:
        table (Tensor[L, K]): results of `detr_fast.ops.set_loss`.
        losses (int): how many of the K columns have a gradient, the first ones.
    """
    columns = table.shape[1]
    scalars, logged = _Scalars.apply(table), _elements(table.detach())
    return [
        (*scalars[i : i + losses], *logged[i + losses : i + columns])
        for i in range(0, len(scalars), columns)
    ]


def weighted_losses(
    losses: Mapping[str, Tensor], weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss, and all terms under the names that DETR logs them with.

    Nothing waits for a GPU.

    Args:
        losses (Mapping[str, Tensor]): scalars on one device.
        weights (Mapping[str, float]): of those that count; others are logged alone.

    Returns:
        tuple[Tensor, dict[str, Tensor]]: sum of the weighted terms; each of these under its own
        name, and every term unweighted as ``<name>_unscaled``.

    Raises:
        ValueError: if no loss has a weight.
    """
    weighted = [name for name in losses if name in weights]
    if not weighted:
        raise ValueError(
            f"none of the losses {sorted(losses)} has a weight; weights are those of "
            f"{sorted(weights)}"
        )
    factors = tuple(float(weights[name]) for name in weighted)
    total, scaled = _WeightedSum.apply(factors, *(losses[name] for name in weighted))
    with torch.no_grad():
        unscaled = torch.stack([*losses.values()])
    terms = dict(zip(weighted, scaled.unbind(), strict=True))
    return total, terms | {
        f"{name}_unscaled": value for name, value in zip(losses, unscaled.unbind(), strict=True)
    }


def _elements(table: Tensor) -> tuple[Tensor, ...]:
    """The elements, which a caller may change in place as DETR's losses: they are no views."""
    if torch.compiler.is_compiling():
        return table.flatten().unbind()
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return table.flatten().unbind()


class _Scalars(torch.autograd.Function):
    """The elements of a table, whose gradients are stacked without a zero for each gap."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = table.shape
        ctx.set_materialize_grads(False)
        return _elements(table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None
        zero = torch.zeros_like(some)
        grad = torch.stack([zero if grad is None else grad for grad in grads])
        return grad.view(ctx.shape)


class _WeightedSum(torch.autograd.Function):
    """Sum of scalars by their factors, and the products; no factor has to travel to a device."""

    @staticmethod
    def forward(ctx: Any, factors: tuple[float, ...], *values: Tensor) -> tuple[Tensor, Tensor]:
        ctx.factors = factors
        ctx.set_materialize_grads(False)
        scaled = torch.stack(torch._foreach_mul(values, factors))
        ctx.mark_non_differentiable(scaled)
        return scaled.sum(), scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, *[None] * len(ctx.factors)
        return None, *torch._foreach_mul([grad] * len(ctx.factors), ctx.factors)
