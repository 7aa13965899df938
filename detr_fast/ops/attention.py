# SPDX-License-Identifier: Apache-2.0
"""Attention over padded sequences: fused kernels for DETR's shapes, torch's SDPA for all others."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import reference
from detr_fast.ops._library import with_reference
from detr_fast.reference.attention import Rows

__all__ = ["attention"]


@with_reference(reference.attention)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_rect: Tensor | None = None,
    key_rect: Tensor | None = None,
    padded_width: int | None = None,
    key_count: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., NeurIPS 2017, equation 1) of padded sequences.

    Padded keys are skipped and padded queries give 0: neither is read, whatever it holds.
    Differentiable once.

    Args:
        q (Tensor[B, H, Q, D]): queries, in any strides.
        k (Tensor[B, H, K, D]): keys.
        v (Tensor[B, H, K, D]): values.
        query_rect (IntTensor[B, 2] | None): int32 (h, w) of each image: of the queries, a grid
            ``padded_width`` wide row by row, those of the upper left h x w cells are real.
        key_rect (IntTensor[B, 2] | None): the same of the keys.
        padded_width (int | None): cells of a row of the grid.
        key_count (IntTensor[B] | None): int32 number of real keys, which come first.
        mask (Tensor | None): broadcastable to (B, H, Q, K): bool, True for keys to look at, or
            floating point, added to the scores.
        dropout_p (float): probability that a weight is dropped; a multiple of 1 / 256 is taken.

    Returns:
        Tensor[B, H, Q, D]: averages of the values; 0 where there is no key. Of dtype of q.

    Raises:
        RuntimeError: if a shape, dtype or device does not fit.
        ValueError: if both key_rect and key_count are given, or the probability is none.
    """
    return _sdpa(q, k, v, query_rect, Rows(key_rect, key_count, padded_width), mask, dropout_p)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_rect: Tensor | None,
    keys: Rows,
    mask: Tensor | None,
    dropout_p: float,
) -> Tensor:
    real_queries = Rows(query_rect, None, keys.padded_width).mask(q.shape[-2])
    real_keys = keys.mask(k.shape[-2])
    if real_keys is not None:
        k, v = (x.masked_fill(~real_keys[:, None, :, None], 0) for x in (k, v))
        real_keys = real_keys[:, None, None]
        mask = real_keys if mask is None else _both(mask, real_keys)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
    return out if real_queries is None else out.masked_fill(~real_queries[:, None, :, None], 0)


def _both(mask: Tensor, real_keys: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask & real_keys
    return mask.masked_fill(~real_keys, -torch.inf)


# ---- what torch has to know of the kernels


@torch.library.register_fake("detr_fast::attention")
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_rect: Tensor | None,
    key_rect: Tensor | None,
    key_count: Tensor | None,
    padded_width: int,
    kept: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    images, heads, queries, columns = q.shape
    words = 0 if seed is None else (k.shape[2] + 127) // 128 * 4
    return (
        q.new_empty(images, queries, heads, columns),
        q.new_empty(images, heads, queries, dtype=torch.float32),
        q.new_empty(images, heads, queries, words, dtype=torch.int32),
    )


@torch.library.register_fake("detr_fast::attention_backward")
def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> list[Tensor]:
    (images, heads, queries, columns), keys = q.shape, k.shape[2]
    if queries == keys:
        return [q.new_empty(images, queries, 3, heads, columns)]
    rows = (queries, keys, keys)
    return [q.new_empty(images, length, heads, columns) for length in rows]
