# SPDX-License-Identifier: Apache-2.0
"""Slices of a tensor, one by one, without a copy of their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def unbind_layers(stacked: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """The slices of a tensor, as ``stacked.unbind(dim)``.

    Torch stacks the gradients of the slices again.  `detr_fast.ops.set_loss` puts those of
    all layers, `detr_fast.ops.attention` those of queries, keys and values into one block of
    memory, in order; where they come back like this, the block, or the part of it that the slices
    take, is the gradient: of 900 queries, 92 columns, 6 layers and 16 images 32 MB need not be
    copied.

    Args:
        stacked (Tensor[..., L, ...]): for instance logits (L, B, Q, C), or with ``dim=2`` what one
            product has projected to queries, keys and values, (B, L, 3, H, D).
        dim (int): along which the slices are counted.

    Returns:
        tuple[Tensor[...], ...]: L views.
    """
    # compilers see through a stack by themselves, and cannot see through the look at the storage
    if torch.compiler.is_compiling() or _is_traced() or not torch.is_grad_enabled():
        return stacked.unbind(dim)
    slices: tuple[Tensor, ...] = _Unbind.apply(stacked, dim % stacked.dim())
    return slices


def _is_traced() -> bool:
    traced: bool = torch._C._get_tracing_state() is not None
    return traced


class _Unbind(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(stacked: Tensor, dim: int) -> tuple[Tensor, ...]:
        return stacked.unbind(dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, ...]) -> None:
        ctx.dim = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, ...]:
        return tangent.unbind(ctx.dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        known = [grad for grad in grads if grad is not None]
        if not known:
            return None, None
        if len(known) == len(grads) and (block := _block_of(known, ctx.dim)) is not None:
            return block, None
        zero = torch.zeros_like(known[0]) if len(known) < len(grads) else known[0]
        return torch.stack([zero if grad is None else grad for grad in grads], ctx.dim), None


def _block_of(slices: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor that these are the slices of, in order and evenly apart; None if there is none."""
    if any(part.requires_grad for part in slices):  # to be differentiated again
        return None
    first = slices[0]
    try:
        storages = {part.untyped_storage()._cdata for part in slices}
    except (RuntimeError, NotImplementedError):  # within torch.func a tensor has none
        return None
    starts = [part.storage_offset() - first.storage_offset() for part in slices]
    step = starts[-1] // (len(slices) - 1) if len(slices) > 1 else 1
    evenly = step > 0 and starts == [i * step for i in range(len(slices))]
    if len(storages) > 1 or not evenly or any(part.stride() != first.stride() for part in slices):
        return None
    shape = (*first.shape[:dim], len(slices), *first.shape[dim:])
    strides = (*first.stride()[:dim], step, *first.stride()[dim:])
    return first.as_strided(shape, strides)
