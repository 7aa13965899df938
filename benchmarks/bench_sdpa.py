# SPDX-License-Identifier: Apache-2.0
"""The attention to beat: every back end of scaled_dot_product_attention at DETR's shapes.

Head dimension 32, 8 heads, bfloat16; storage (L, B, E) as ``nn.MultiheadAttention`` keeps it.  A
padding mask is what that module hands over: an additive (B, H, 1, S) tensor.  The subject is what
SDPA picks by itself; the peers are its back ends, one by one.  With dropout, equality is asserted
at p = 0 and the time is that of p = 0.1.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Case, Contender, Missing, Setup, within_norm

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


class Shape(NamedTuple):
    """One attention of DETR: `queries` and `keys` are positions or object queries."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int

    @property
    def flops(self) -> int:
        """Of the forward: two products of 2 * HEAD_DIM operations a score."""
        return 4 * HEAD_DIM * self.scores

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.queries * self.keys


ENCODER = Shape("encoder", 16, 8, 1024, 1024)
SHAPES = [
    ENCODER,
    Shape("encoder", 1, 8, 850, 850),  # one image of 800 x 1066 at stride 32
    Shape("dc5 encoder", 2, 8, 3400, 3400),
    Shape("cross", 16, 8, 100, 1024),
    Shape("decoder self", 16, 8, 100, 100),
]
TINY = Shape("tiny", 2, 2, 24, 40)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All shapes on a GPU; a tiny one on a CPU, where it is there to be tested."""
    tiny = quick or device.type == "cpu"
    result = []
    for shape in [TINY] if tiny else SHAPES:
        for masked in (False, True) if shape.name != "decoder self" else (False,):
            for dropout in (0.0, 0.1) if shape in (ENCODER, TINY) else (0.0,):
                for direction in (forward, with_gradients):
                    result.append(case(device, shape, masked, dropout, direction))
    return result


def test_sdpa(case, bench):
    bench(case)


def case(
    device: torch.device, shape: Shape, masked: bool, dropout: float, direction: Callable
) -> Case:
    size = f"B{shape.batch} H{shape.heads} {shape.queries}x{shape.keys} D{HEAD_DIM}"
    features = [name for name, on in (("mask", masked), ("dropout", dropout)) if on]
    way, passes = ("forward", 1) if direction is forward else ("forward+backward", 3.5)
    return Case(
        name=" ".join([shape.name, size, *features, way]),
        build=functools.partial(contenders, device, shape, masked, dropout, direction),
        check=EQUAL,
        flops=int(passes * shape.flops),  # the backward: five products of the same size
    )


def contenders(
    device: torch.device, shape: Shape, masked: bool, dropout: float, direction: Callable
) -> Setup:
    """SDPA's own choice, then each back end alone."""
    q, k, v, upstream = tensors(device, shape)
    mask = padding_mask(device, shape, q.dtype) if masked else None

    def contender(backend: SDPBackend | None) -> Contender:
        def attention(p: float) -> Callable:
            return functools.partial(direction, backend, q, k, v, mask, p, upstream)

        return Contender(run=attention(dropout), checked=attention(0.0))

    def exact() -> tuple[Tensor, ...]:
        wide = [t.detach().float().requires_grad_(t.requires_grad) for t in (q, k, v)]
        wide_mask = None if mask is None else mask.float()
        return direction(SDPBackend.MATH, *wide, wide_mask, 0.0, upstream.float())

    result: dict[str, Contender | Missing] = {"sdpa": contender(None)}
    for name, backend in BACKENDS.items():
        usable = device.type == "cuda" or name in ON_CPU
        result[name] = contender(backend) if usable else Missing("needs a GPU")
    if shape.scores * 4 * 4 > MATH_BYTES:
        result["math"] = Missing("its score matrices would not fit")
    return Setup(expected=exact, contenders=result)


def tensors(device: torch.device, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value (B, H, L, D) as views of (L, B * H * D) storage, and a gradient."""
    generator = torch.Generator().manual_seed(0)

    def view(length: int) -> Tensor:
        storage = torch.randn(length, shape.batch * shape.heads, HEAD_DIM, generator=generator)
        rows = storage.to(device, torch.bfloat16).transpose(0, 1)
        return rows.unflatten(0, (shape.batch, shape.heads))

    q, k, v = (view(n).requires_grad_() for n in (shape.queries, shape.keys, shape.keys))
    return q, k, v, view(shape.queries)


def padding_mask(device: torch.device, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Images that fill from 30 % to all of the batch's positions."""
    real = torch.linspace(0.3, 1.0, shape.batch).mul(shape.keys).long()
    padded = torch.arange(shape.keys) >= real[:, None]
    additive = torch.zeros(padded.shape).masked_fill(padded, float("-inf")).to(device, dtype)
    return additive[:, None, None].repeat(1, shape.heads, 1, 1)


def forward(backend, q, k, v, mask, dropout, upstream) -> tuple[Tensor, ...]:
    with only(backend), torch.no_grad():
        return (scaled_dot_product_attention(q, k, v, mask, dropout),)


def with_gradients(backend, q, k, v, mask, dropout, upstream) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    with only(backend):
        out = scaled_dot_product_attention(q, k, v, mask, dropout)
    return out, *torch.autograd.grad(out, (q, k, v), upstream)


def only(backend: SDPBackend | None):
    """Leave SDPA this back end alone, or its own choice."""
    return nullcontext() if backend is None else sdpa_kernel(backend)
