# SPDX-License-Identifier: Apache-2.0
"""Attention at DETR's shapes against every back end of SDPA and against varlen on packed tokens.

Head dimension 32, bfloat16.  Queries, keys and values of self-attention are views of one tensor
(B, L, 3, H, D), as a fused projection makes them.  Padded batches hold images that fill the grid to
different parts of its rows and columns.  ``varlen`` gets their tokens packed beforehand, which a
model has to do by itself; SDPA gets the mask of the keys.  What padded queries give is compared
with nothing.

A rate counts the scores of real queries and real keys alone.  Its limit is that of the kernels'
design on an SM: forward by exponentials, 16 a clock and what the rescaling takes of them; backward
by the 448 operations for a score of the two passes, at 62 % of the tensor cores' rate, which
``mma.sync`` reaches on an H100.  With dropout, equality is asserted at p = 0 and the time is that
of p = 0.1.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Case, Contender, Missing, Setup, optional, within_norm
from detr_fast import ops

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_CPU = {"flash", "math"}
HEAD_DIM = 32
MATH_BYTES = 8 * 1024**3  # math keeps several score matrices: none of its runs beyond this
EQUAL = within_norm(2e-2)  # bfloat16 inputs and probabilities against float32 arithmetic
# scores a clock and SM
FORWARD, BACKWARD = 15.1, 5.7
BOTH = 1 / (1 / FORWARD + 1 / BACKWARD)

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q, k, v (B, H, L, D), probability


class Shape(NamedTuple):
    """One attention of DETR; self-attention where ``queries`` is None."""

    name: str
    batch: int
    heads: int
    grid: tuple[int, int]  # rows and columns of the keys
    queries: int | None = None

    @property
    def keys(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        """Queries of an image."""
        return self.queries or self.keys

    def rect(self, padded: bool) -> Tensor:
        """Real rows and columns of the grid in each image: int32 (B, 2)."""
        # 30 % of the scores of 16 images are real, 65 % of those of two: as in training on COCO
        least = (0.5 if self.batch > 2 else 0.8) if padded else 1.0
        shares = torch.linspace(least, 1.0, self.batch)
        sides = [(shares * side).round() for side in self.grid]
        return torch.stack([sides[0], sides[1].flip(0)], dim=1).int()

    def scores(self, padded: bool) -> int:
        """Of real queries and real keys."""
        keys = self.rect(padded).long().prod(1)
        queries = keys if self.queries is None else torch.full_like(keys, self.queries)
        return self.heads * int((queries * keys).sum())


ENCODER = Shape("encoder", 16, 8, (32, 32))
# shape, padded, dropout
SHAPES = [
    *((ENCODER, padded, dropout) for padded in (False, True) for dropout in (0.0, 0.1)),
    (Shape("encoder", 16, 8, (25, 34)), True, 0.0),
    (Shape("encoder", 1, 8, (25, 34)), False, 0.0),  # one image of 800 x 1066 at stride 32
    *((Shape("dc5 encoder", 2, 8, (50, 68)), padded, 0.0) for padded in (False, True)),
    (Shape("dc5 encoder", 16, 8, (64, 64)), True, 0.0),
    *((Shape("cross", 16, 8, (32, 32), 100), padded, 0.0) for padded in (False, True)),
    (Shape("decoder self", 16, 8, (1, 100)), False, 0.0),
]
TINY = Shape("tiny", 2, 2, (4, 6))


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All shapes on a GPU; a tiny one on a CPU, where it is there to be tested."""
    tiny = [(TINY, padded, dropout) for padded in (False, True) for dropout in (0.0, 0.1)]
    return [
        case(device, *shape, direction)
        for shape in (tiny if quick or device.type == "cpu" else SHAPES)
        for direction in (forward, with_gradients)
    ]


def test_attention(case, bench):
    bench(case)


def case(
    device: torch.device, shape: Shape, padded: bool, dropout: float, direction: Callable
) -> Case:
    size = f"B{shape.batch} H{shape.heads} {shape.rows}x{shape.keys} D{HEAD_DIM}"
    features = [name for name, on in (("padded", padded), ("dropout", dropout)) if on]
    way, limit = ("forward", FORWARD) if direction is forward else ("forward+backward", BOTH)
    return Case(
        name=" ".join([shape.name, size, *features, way]),
        build=functools.partial(contenders, device, shape, padded, dropout, direction),
        check=EQUAL,
        scores=shape.scores(padded),
        scores_per_clock=limit,
    )


class Inputs(NamedTuple):
    """Query, key, value (B, H, L, D), a gradient, which rows are real, and that as an argument."""

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    real_queries: Tensor  # (B, Q)
    real_keys: Tensor  # (B, K)
    rows: dict[str, Any]  # of ops.attention; empty if all are real


def inputs(device: torch.device, shape: Shape, padded: bool) -> Inputs:
    """Random ones; nothing comes back to queries that are not real."""
    generator = torch.Generator().manual_seed(0)

    def heads(length: int, count: int) -> Tensor:
        size = (shape.batch, length, count, shape.heads, HEAD_DIM)
        return torch.randn(size, generator=generator).to(device, torch.bfloat16)

    if shape.queries is None:
        q, k, v = heads(shape.keys, 3).unbind(2)
    else:
        (q,), (k, v) = heads(shape.queries, 1).unbind(2), heads(shape.keys, 2).unbind(2)
    rect = shape.rect(padded).to(device)
    place = torch.arange(shape.keys, device=device)
    row, column = place // shape.grid[1], place % shape.grid[1]
    real_keys = (row < rect[:, :1]) & (column < rect[:, 1:])
    real_queries = real_keys
    rows = {"key_rect": rect, "query_rect": rect, "padded_width": shape.grid[1]}
    if shape.queries is not None:
        real_queries = torch.ones(shape.batch, shape.queries, dtype=torch.bool, device=device)
        del rows["query_rect"]
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
    upstream = torch.randn(q.shape, generator=generator).to(q) * real_queries[:, None, :, None]
    return Inputs(q, k, v, upstream, real_queries, real_keys, rows if padded else {})


def contenders(
    device: torch.device, shape: Shape, padded: bool, dropout: float, direction: Callable
) -> Setup:
    """Ours, SDPA's own choice, each of its back ends alone, packed tokens."""
    given = inputs(device, shape, padded)
    real = given.real_queries[:, None, :, None]
    mask = given.real_keys[:, None, None] if padded else None

    def of_real(out: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return out * real, *gradients

    def contender(attend: Attend) -> Contender:
        run = functools.partial(direction, attend, *given[:4])
        return Contender(lambda: run(dropout), checked=lambda: of_real(*run(0.0)))

    def ours(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return ops.attention(q, k, v, dropout_p=p, **given.rows)

    def by_sdpa(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, mask, p)

    def exact() -> tuple[Tensor, ...]:
        q, k, v, upstream = (x.detach().float() for x in given[:4])
        leaves = (x.requires_grad_() for x in (q, k, v))
        return of_real(*direction(functools.partial(by_sdpa, None), *leaves, upstream, 0.0))

    result: dict[str, Contender | Missing] = {
        "detr_fast": contender(ours),
        "SDPA": contender(functools.partial(by_sdpa, None)),
    }
    for name, backend in BACKENDS.items():
        usable = device.type == "cuda" or name in ON_CPU
        by_one = contender(functools.partial(by_sdpa, backend))
        result[name] = by_one if usable else Missing("needs a GPU")
    if shape.batch * shape.heads * shape.rows * shape.keys * 4 * 4 > MATH_BYTES:
        result["math"] = Missing("its score matrices would not fit")
    result["varlen"] = varlen(given, dropout, direction)
    return Setup(expected=exact, contenders=result)


def varlen(given: Inputs, dropout: float, direction: Callable) -> Contender | Missing:
    """Attention of sequences of their own lengths, one behind another."""
    module = optional("torch.nn.attention.varlen")
    if isinstance(module, Missing):
        return module
    if dropout:
        return Missing("no dropout")
    if given.q.device.type != "cuda":
        return Missing("needs a GPU")
    sides = (given.real_queries, given.real_keys, given.real_keys, given.real_queries)
    packed = [
        x.detach().transpose(1, 2)[real].requires_grad_()
        for x, real in zip(given[:4], sides, strict=True)
    ]

    def starts(real: Tensor) -> Tensor:
        return torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()

    bounds = [starts(real) for real in sides[:2]]
    longest = [int(real.sum(1).max()) for real in sides[:2]]

    def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return module.varlen_attn(q, k, v, *bounds, *longest)

    def unpacked() -> tuple[Tensor, ...]:
        found = direction(attend, *packed, 0.0)
        result = []
        for x, real in zip(found, (sides[0], *sides[:3]), strict=False):
            full = x.new_zeros(*real.shape, *x.shape[1:])
            full[real] = x
            result.append(full.transpose(1, 2))
        return tuple(result)

    return Contender(lambda: direction(attend, *packed, 0.0), checked=unpacked)


def forward(attend: Attend, q, k, v, upstream, dropout: float) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (attend(q, k, v, dropout),)


def with_gradients(attend: Attend, q, k, v, upstream, dropout: float) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    out = attend(q, k, v, dropout)
    return out, *torch.autograd.grad(out, (q, k, v), upstream)
