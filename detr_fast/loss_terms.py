# SPDX-License-Identifier: Apache-2.0
"""The terms of a loss: as scalars, weighted and summed, by a number of ops that does not grow.

DETR hands its losses around as a dict of scalars, three and more for each decoder layer.  Torch
would slice, stack and pad their gradients one by one: 200 ops in place of 12.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def scalars_of(table: Tensor, losses: int) -> list[Sequence[Tensor]]:
    """The elements of a table, row by row.

    Args:
        table (Tensor[L, K]): results of :func:`detr_fast.ops.set_loss`.
        losses (int): how many of the K columns have a gradient, the first ones.
    """
    columns = table.shape[1]
    scalars, logged = _Scalars.apply(table), table.detach().flatten().unbind()
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
    """
    weighted = [name for name in losses if name in weights]
    order = [*weighted, *(name for name in losses if name not in weights)]
    values = [losses[name] for name in order]
    factors = _constants(tuple(weights[n] for n in weighted), values[0].dtype, values[0].device)
    total, scaled, unscaled = _WeightedSum.apply(factors, *values)
    terms = dict(zip(weighted, scaled.unbind(), strict=True))
    raw = dict(zip(order, unscaled.unbind(), strict=True))
    return total, terms | {f"{name}_unscaled": raw[name] for name in losses}


@lru_cache(maxsize=16)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device: copied there once, for a copy from pageable memory waits for a GPU."""
    return torch.tensor(values, dtype=dtype, device=device)


class _Scalars(torch.autograd.Function):
    """``table.flatten().unbind()``, whose gradients are stacked without a zero for each gap."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = table.shape
        ctx.set_materialize_grads(False)
        return table.flatten().unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None
        zero = torch.zeros_like(some)
        grad = torch.stack([zero if grad is None else grad for grad in grads])
        return grad.view(ctx.shape)


class _WeightedSum(torch.autograd.Function):
    """Sum of the first scalars by their factors; also the products, and all scalars stacked."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor, *values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(factors)
        ctx.unweighted = len(values) - len(factors)
        unscaled = torch.stack(values)
        scaled = unscaled[: len(factors)] * factors
        ctx.mark_non_differentiable(scaled, unscaled)
        ctx.set_materialize_grads(False)
        return scaled.sum(), scaled, unscaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        [factors] = ctx.saved_tensors
        grads = [None] * len(factors) if grad is None else (grad * factors).unbind()
        return None, *grads, *[None] * ctx.unweighted
