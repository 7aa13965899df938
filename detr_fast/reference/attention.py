# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention over padded sequences, in plain torch: every score is a number."""

from typing import NamedTuple

import torch
from torch import Tensor

KEEP_LEVELS = 256  # a probability of dropout is a multiple of 1 / 256


class Rows(NamedTuple):
    """Which rows of padded sequences are real; see :func:`detr_fast.ops.attention`."""

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
    keep: Tensor | None = None,
) -> Tensor:
    """:func:`detr_fast.ops.attention`; ``keep (BoolTensor[B, H, Q, K])`` says what is not dropped.

    By default torch's generator says it.
    """
    real_queries = Rows(query_rect, None, padded_width).mask(q.shape[-2])
    real_keys = Rows(key_rect, key_count, padded_width).mask(k.shape[-2])
    if real_keys is not None:  # what is not real may be NaN, and 0 * NaN is
        k, v = (x.masked_fill(~real_keys[:, None, :, None], 0) for x in (k, v))
    if real_queries is not None:
        q = q.masked_fill(~real_queries[:, None, :, None], 0)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    if real_keys is not None:
        scores = scores.masked_fill(~real_keys[:, None, None], -torch.inf)
    # a row without any key is 0, and so are its gradients
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    kept = kept_levels(dropout_p)
    if kept < KEEP_LEVELS:
        if keep is None:
            keep = torch.rand_like(weights) * KEEP_LEVELS < kept
        weights = (weights * keep) * (KEEP_LEVELS / max(kept, 1))
    out = weights @ v
    return out if real_queries is None else out.masked_fill(~real_queries[:, None, :, None], 0)
