# SPDX-License-Identifier: Apache-2.0
"""The outputs of all decoder layers, one by one, without a copy of their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def unbind_layers(stacked: Tensor) -> tuple[Tensor, ...]:
    """The slices of a tensor, as ``stacked.unbind()``.

    Torch stacks the gradients of the slices again.  :func:`detr_fast.ops.set_loss` puts those of
    all layers into one block of memory, in order; where they come back like this, the block is the
    gradient: of 900 queries, 92 columns, 6 layers and 16 images 32 MB need not be copied.

    Args:
        stacked (Tensor[L, ...]): for instance logits (L, B, Q, C).

    Returns:
        tuple[Tensor[...], ...]: L views.
    """
    # compilers see through a stack by themselves, and cannot see through the look at the storage
    if torch.compiler.is_compiling() or _is_traced() or not torch.is_grad_enabled():
        return stacked.unbind()
    slices: tuple[Tensor, ...] = _Unbind.apply(stacked)
    return slices


def _is_traced() -> bool:
    traced: bool = torch._C._get_tracing_state() is not None
    return traced


class _Unbind(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked.unbind()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, ...]:
        return tangent.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        known = [grad for grad in grads if grad is not None]
        if not known:
            return None
        if len(known) == len(grads) and (block := _block_of(known)) is not None:
            return block
        zero = torch.zeros_like(known[0]) if len(known) < len(grads) else known[0]
        return torch.stack([zero if grad is None else grad for grad in grads])


def _block_of(slices: Sequence[Tensor]) -> Tensor | None:
    """The contiguous tensor that these are the slices of, in order; None if there is none."""
    if any(part.requires_grad for part in slices):  # to be differentiated again
        return None
    first = slices[0]
    try:
        storages = {part.untyped_storage()._cdata for part in slices}
    except (RuntimeError, NotImplementedError):  # within torch.func a tensor has none
        return None
    starts = [part.storage_offset() - first.storage_offset() for part in slices]
    in_order = starts == [i * first.numel() for i in range(len(slices))]
    if len(storages) > 1 or not in_order or not all(part.is_contiguous() for part in slices):
        return None
    return first.as_strided((len(slices), *first.shape), (first.numel(), *first.stride()))
