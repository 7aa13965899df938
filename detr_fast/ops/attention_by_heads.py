# SPDX-License-Identifier: Apache-2.0
"""Attention with dropout on a CPU, a few heads of an image at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detr_fast.ops.dropout import random_bytes

_dropout = torch.ops.detr_fast.dropout_bytes.default
_softmax_gradient = torch.ops.aten._softmax_backward_data.out
_SCORES = 1 << 20  # of the heads that are computed at a time: they stay in a processor's cache


def attention_by_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kept: int) -> Tensor:
    """Attend with dropout.

    SDPA has no fused kernel with dropout for a CPU: it keeps several matrices of all scores for the
    backward pass.  Here a byte of each score is kept, and weights are computed again.

    Args:
        q (Tensor[B, H, Q, D]): queries, float32 or float64.
        k (Tensor[B, H, K, D]): keys.
        v (Tensor[B, H, K, V]): values.
        mask (Tensor | None): broadcastable to (B, H, Q, K): bool, True for keys to look at, or
            floating point, added to the scores; not differentiated.
        kept (int): of 256 equally probable numbers, those with which a weight is kept.

    Returns:
        Tensor[B, H, Q, V]: averages of the values, 0 where there is no key; in memory (B, Q, H, V).
    """
    out: Tensor = _ByHeads.apply(q, k, v, mask, kept)
    return out


class _ByHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kept: int
    ) -> Tensor:
        bias = None if mask is None else _bias(mask, q)
        random = random_bytes(*q.shape[:3], k.shape[2])
        ctx.save_for_backward(q, k, v, bias, random)
        ctx.kept = kept
        out = _rows_first(q, v.shape[3])
        for part, weights in _weights(q, k, bias):
            _dropout(weights, random[part], kept, weights)
            out[part] = torch.bmm(weights, v[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, random = ctx.saved_tensors
        scale = q.shape[3] ** -0.5
        dq, dk, dv = _gradient_block(q, k, v)
        memory = None
        with torch.autocast(q.device.type, enabled=False):
            for part, weights in _weights(q, k, bias):
                memory = torch.empty_like(weights) if memory is None else memory
                slopes, bytes_of_part = memory[: len(weights)], random[part]
                _dropout(weights, bytes_of_part, ctx.kept, slopes)
                dv[part] = torch.bmm(slopes.mT, grad[part])
                torch.bmm(grad[part], v[part].mT, out=slopes)
                _dropout(slopes, bytes_of_part, ctx.kept, slopes)
                _softmax_gradient(slopes, weights, -1, q.dtype, grad_input=slopes)
                dq[part] = torch.bmm(slopes, k[part]).mul_(scale)
                dk[part] = torch.bmm(slopes.mT, q[part]).mul_(scale)
        return dq, dk, dv, None, None


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """What is added to the scores, still to be broadcast: 0 or -inf, of a bool mask."""
    if mask.dtype == torch.bool:
        mask = q.new_zeros(()).masked_fill(~mask, -torch.inf)
    return mask.detach()


def _weights(
    q: Tensor, k: Tensor, bias: Tensor | None
) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """For each part of (B, H) its attention weights, before dropout, all in the same memory."""
    (images, heads, queries, columns), keys = q.shape, k.shape[2]
    scale = columns**-0.5
    parts = max(1, min(heads, -(-heads * queries * keys // _SCORES)))
    together = max(1, -(-heads // parts))
    memory = q.new_empty(together, queries, keys)
    empty = None
    if bias is not None:
        nothing = bias.isneginf().all(-1, keepdim=True)
        if bool(nothing.any()):
            empty = nothing.expand(images, heads, queries, 1)
        bias = bias.expand(images, heads, queries, keys)
    for image in range(images):
        for first in range(0, heads, together):
            part = (image, slice(first, first + together))
            of_q, of_k = q[part], k[part].mT
            weights = memory[: len(of_q)]
            if bias is None:
                torch.baddbmm(weights, of_q, of_k, beta=0, alpha=scale, out=weights)
            else:
                torch.baddbmm(bias[part], of_q, of_k, alpha=scale, out=weights)
            torch.softmax(weights, -1, out=weights)
            if empty is not None:
                weights.masked_fill_(empty[part], 0)
            yield part, weights


def _rows_first(like: Tensor, columns: int) -> Tensor:
    """Tensor[B, H, L, columns] in whose memory the heads of a row are side by side."""
    images, heads, rows, _ = like.shape
    return like.new_empty(images, rows, heads, columns).transpose(1, 2)


def _gradient_block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Where gradients go; of self-attention one block, which `unbind_layers` recognises."""
    (images, heads, rows, columns) = q.shape
    if q.shape == k.shape == v.shape:
        block = q.new_empty(images, rows, 3, heads, columns)
        return tuple(x.transpose(1, 2) for x in block.unbind(2))
    return tuple(_rows_first(x, x.shape[3]) for x in (q, k, v))
