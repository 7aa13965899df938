# SPDX-License-Identifier: Apache-2.0
"""Inputs of ``attention`` with garbage in their padding, its outcome, and how exact that is."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from detr_fast import ops
from detr_fast.reference.attention import (
    KEEP_LEVELS,
    Rows,
    attention_keeping,
    dropout_mask,
    kept_levels,
)

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# where kernels run that promise bits
FUSED = pytest.mark.parametrize(
    "device", ["cudasim-forward", "cudasim-reverse", "cudasim-random", "cuda"], indirect=True
)
GARBAGE = torch.tensor([torch.nan, torch.inf, -torch.inf, 6e4])


class Case(NamedTuple):
    """Arguments of ``attention`` and the gradient that comes back to its result."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    padding: dict[str, Any]
    dropout_p: float

    @property
    def rows(self) -> tuple[Rows, Rows]:
        """Of queries and of keys."""
        p = self.padding.get
        width = p("padded_width")
        return Rows(p("query_rect"), None, width), Rows(p("key_rect"), p("key_count"), width)

    def real(self) -> tuple[Tensor, Tensor]:
        """Of queries (B, Q) and of keys (B, K), True where real."""
        sides = zip(self.rows, (self.q, self.k), strict=True)
        return tuple(
            torch.ones(len(x), x.shape[2], dtype=torch.bool, device=x.device)
            if (mask := rows.mask(x.shape[2])) is None
            else mask
            for rows, x in sides
        )

    def with_padding_of(self, fill) -> "Case":
        """The same but for rows that are not real, which ``fill(tensor)`` makes."""
        queries, keys = (real[:, None, :, None] for real in self.real())
        sides = zip(self[:4], (queries, keys, keys, queries), strict=True)
        return self._replace(
            **{
                name: torch.where(real, x, fill(x))
                for name, (x, real) in zip(self._fields, sides, strict=False)
            }
        )


def garbage(tensor):
    places = torch.randint(
        len(GARBAGE), tensor.shape, generator=torch.Generator().manual_seed(len(tensor))
    )
    return GARBAGE[places].to(tensor)


def attention_case(
    queries,
    keys=None,
    *,
    images=2,
    heads=2,
    rects=None,
    query_rects=True,
    padded_width=None,
    counts=None,
    dtype=torch.bfloat16,
    device="cpu",
    seed=0,
    dropout_p=0.0,
    columns=32,
):
    """Normally distributed; ``rects`` and ``counts`` have a number for each image.

    With rects, all rows lie in grids, or those of the keys alone (``query_rects=False``).
    """
    keys = queries if keys is None else keys
    g = torch.Generator().manual_seed(seed)
    padding = {}
    for given, name, columns_of in ((rects, "key_rect", (2,)), (counts, "key_count", ())):
        if given is not None:
            images = len(given)
            numbers = torch.tensor(given, dtype=torch.int32, device=device)
            padding[name] = numbers.view(images, *columns_of)
    if rects is not None:
        padding["padded_width"] = padded_width
        if query_rects:
            padding["query_rect"] = padding["key_rect"]
    tensors = [
        torch.randn(images, heads, rows, columns, generator=g).to(device, dtype)
        for rows in (queries, keys, keys, queries)
    ]
    return Case(*tensors, padding, dropout_p).with_padding_of(garbage)


def grid_case(rects, height, width, **options):
    """Self-attention of images of height x width cells, of which ``rects`` are real."""
    return attention_case(height * width, rects=rects, padded_width=width, **options)


class Outcome(NamedTuple):
    """Of (B, H, Q, D), and gradients of q, k and v."""

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def run(case, op=ops.attention, **options):
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    if case.dropout_p:
        options["dropout_p"] = case.dropout_p
    out = op(*leaves, **case.padding, **options)
    return Outcome(out.detach(), *torch.autograd.grad(out, leaves, case.grad))


def rebuilt_mask(case, seed):
    """What dropout keeps (B, H, Q, K)."""
    numbers = [
        rows.numbers(len(x), x.shape[2]).to(x.device)
        for rows, x in zip(case.rows, (case.q, case.k), strict=True)
    ]
    return dropout_mask(seed, case.q.shape[1], kept_levels(case.dropout_p), *numbers)


def expected(case, dtype=torch.float64, keep=None):
    """By the reference, in float64 of the very same numbers."""

    def op(q, k, v, **_):
        kept = kept_levels(case.dropout_p)
        return attention_keeping(keep, kept, q, k, v, *case.rows)

    tensors = [x.to(dtype) for x in case[:4]]
    return run(Case(*tensors, {}, 0), op)


def assert_as_exact_as_torch(case, ours, keep=None):
    """Errors are at most twice, of gradients thrice those of plain torch in the same dtype.

    The largest error and the mean one; as Dao's flash attention is tested.
    """
    exact, plain = expected(case, keep=keep), expected(case, case.q.dtype, keep)
    for name, mine, its, true in zip(Outcome._fields, ours, plain, exact, strict=True):
        assert mine.shape == true.shape
        assert mine.dtype == case.q.dtype
        assert mine.isfinite().all(), name
        if true.numel() == 0:
            continue
        factor = 2 if name == "out" else 3
        slack = torch.finfo(case.q.dtype).eps * true.abs().max().item() + 1e-5
        errors, allowed = ((x.double() - true).abs() for x in (mine, its))
        assert errors.max() <= factor * allowed.max() + slack, name
        assert errors.mean() <= factor * allowed.mean() + slack / 8, name


def assert_padding_is_zero(case, ours):
    queries, keys = (~real[:, None, :, None] for real in case.real())
    for x, padded in zip(ours, (queries, queries, keys, keys), strict=True):
        assert not x.masked_select(padded).any()


def assert_same_bits(ours, theirs):
    assert_close(ours, theirs, rtol=0, atol=0)


def next_seed(device, manual=5):
    """Seed torch's generator; returns the number that dropout draws next from it."""
    torch.manual_seed(manual)
    seed = int(torch.randint(2**63 - 1, (), device=device))
    torch.manual_seed(manual)
    return seed


def raw_arguments(case, seed=None):
    """Of the op ``detr_fast::attention`` itself."""
    p = case.padding.get
    tensors = (p("query_rect"), p("key_rect"), p("key_count"))
    kept = KEEP_LEVELS if seed is None else kept_levels(case.dropout_p)
    return *case[:3], *tensors, p("padded_width", 1), kept, seed
