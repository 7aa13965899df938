# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention over padded sequences, in plain torch: every score is a number."""

from dataclasses import dataclass

import torch
from torch import Tensor

KEEP_LEVELS = 256  # a probability of dropout is a multiple of 1 / 256
_KEYS_IN_WORD = 32
_PHILOX_ROUNDS = 7
_WORD = 0xFFFFFFFF
_MOST_SCORES = 1 << 24  # that attention_weights has in memory at a time, beside its result


@dataclass(frozen=True)
class Rows:
    """Which rows of padded sequences are real; see `detr_fast.ops.attention`."""

    rect: Tensor | None = None
    count: Tensor | None = None
    padded_width: int | None = None

    def mask(self, length: int) -> Tensor | None:
        """True where real (BoolTensor[B, length]); None if every row is."""
        if self.rect is not None:
            assert self.padded_width is not None
            place = torch.arange(length, device=self.rect.device)
            height, width = self.rect[:, :1], self.rect[:, 1:]
            return (place // self.padded_width < height) & (place % self.padded_width < width)
        if self.count is not None:
            return torch.arange(length, device=self.count.device) < self.count[:, None]
        return None

    def numbers(self, images: int, length: int) -> Tensor:
        """Of each row among the real ones of its image (LongTensor[B, length]); -1: not real."""
        real = self.mask(length)
        if real is None:
            return torch.arange(length).expand(images, length)
        return torch.where(real, real.cumsum(1) - 1, -1)


def kept_levels(dropout_p: float) -> int:
    """Of KEEP_LEVELS equally probable numbers, those with which a weight is kept."""
    return KEEP_LEVELS - round(dropout_p * KEEP_LEVELS)


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
    """See `detr_fast.ops.attention`."""
    queries, keys = Rows(query_rect, None, padded_width), Rows(key_rect, key_count, padded_width)
    kept = kept_levels(dropout_p)
    keep = None
    if kept < KEEP_LEVELS:
        keep = torch.rand(*q.shape[:3], k.shape[2], device=q.device) * KEEP_LEVELS < kept
    return attention_keeping(keep, kept, q, k, v, queries, keys, mask)


def attention_keeping(
    keep: Tensor | None,
    kept: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Rows,
    keys: Rows,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend with the dropout that ``keep (BoolTensor[B, H, Q, K])``, True where kept, says."""
    real_queries, real_keys = queries.mask(q.shape[2]), keys.mask(k.shape[2])
    if real_keys is not None:  # what is not real may be NaN, and 0 * NaN is
        k, v = (x.masked_fill(~real_keys[:, None, :, None], 0) for x in (k, v))
    if real_queries is not None:
        q = q.masked_fill(~real_queries[:, None, :, None], 0)
    scores = q @ k.mT * q.shape[3] ** -0.5
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    if real_keys is not None:
        scores = scores.masked_fill(~real_keys[:, None, None], -torch.inf)
    weights = _softmax(scores)
    if keep is not None:
        weights = (weights * keep) * (KEEP_LEVELS / max(kept, 1))
    out = weights @ v
    return out if real_queries is None else out.masked_fill(~real_queries[:, None, :, None], 0)


def _softmax(scores: Tensor) -> Tensor:
    """Over keys; a row without any is 0, and so are its gradients."""
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


@torch.no_grad()
def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    query_rect: Tensor | None = None,
    key_rect: Tensor | None = None,
    padded_width: int | None = None,
    key_count: Tensor | None = None,
    average: bool = True,
) -> Tensor:
    """Compute with which weights `detr_fast.ops.attention` averages values, for pictures.

    Without dropout and without a gradient; some queries at a time, so that memory holds little more
    than the result.

    Args:
        q (Tensor[B, H, Q, D]): queries.
        k (Tensor[B, H, K, D]): keys.
        query_rect (IntTensor[B, 2] | None): as of `detr_fast.ops.attention`, as are
            ``key_rect``, ``padded_width`` and ``key_count``.
        average (bool): over the heads.

    Returns:
        Tensor[B, Q, K]: float32 weights, (B, H, Q, K) unless averaged; 0 where the query or the
        key is not real.

    Raises:
        RuntimeError: if a shape, dtype or device does not fit, or a sequence is no such grid.
        ValueError: if both key_rect and key_count are given, or a rect without padded_width.
    """
    images, heads, queries, _ = q.shape
    keys = k.shape[2]
    real_queries = Rows(query_rect, None, padded_width).mask(queries)
    real_keys = Rows(key_rect, key_count, padded_width).mask(keys)
    weights = q.new_empty(images, *[] if average else [heads], queries, keys, dtype=torch.float32)
    at_a_time = max(1, _MOST_SCORES // max(1, images * heads * keys))
    for first in range(0, queries, at_a_time):
        some = slice(first, first + at_a_time)
        with torch.autocast(q.device.type, enabled=False):
            scores = q[:, :, some].float() @ k.float().mT * q.shape[-1] ** -0.5
        if real_keys is not None:
            scores = scores.masked_fill(~real_keys[:, None, None], -torch.inf)
        part = _softmax(scores)
        weights[..., some, :] = part.mean(1) if average else part
    if real_queries is not None:
        padded = ~real_queries[:, :, None]
        weights.masked_fill_(padded if average else padded[:, None], 0)
    return weights


def dropout_mask(seed: int, heads: int, kept: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Rebuild which weights the fused kernels keep, as ``csrc/attention/dropout.h`` draws them.

    Args:
        seed (int): that the kernels had from torch's generator.
        heads (int): H.
        kept (int): of `kept_levels`.
        queries (LongTensor[B, Q]): of `Rows.numbers`.
        keys (LongTensor[B, K]): of `Rows.numbers`.

    Returns:
        BoolTensor[B, H, Q, K]: True where a weight is kept; False at rows that are not real.
    """
    (images, length), device = keys.shape, keys.device
    words = torch.arange((length + _KEYS_IN_WORD - 1) // _KEYS_IN_WORD, device=device)
    problem = torch.arange(images * heads, device=device).view(images, heads, 1, 1)
    less = torch.zeros((), dtype=torch.int64, device=device)
    for half in range(2):
        counter = (queries[:, None, :, None], 2 * words + half, problem, torch.zeros_like(less))
        for i, random in enumerate(_philox(counter, seed)):
            bit = _WORD if kept >> (4 * half + i) & 1 else 0
            less = (less & ~random) | (bit & (less | ~random))
    word, place = keys // _KEYS_IN_WORD, keys % _KEYS_IN_WORD ^ 7
    shape = (images, heads, queries.shape[1], length)
    drawn = less.gather(3, word.clamp(min=0)[:, None, None].expand(shape))
    real = (queries >= 0)[:, None, :, None] & (keys >= 0)[:, None, None]
    return (drawn >> place[:, None, None] & 1).bool() & real


def _philox(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Philox 4x32-7 (Salmon et al., SC 2011, section 3.2), on words in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_PHILOX_ROUNDS):
        # the products are of 64 bits: their sign is their highest bit
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32 & _WORD) ^ c1 ^ k0, product1 & _WORD
        c2, c3 = (product0 >> 32 & _WORD) ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
