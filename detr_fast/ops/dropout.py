# SPDX-License-Identifier: Apache-2.0
"""Dropout on a CPU: a random byte decides on a number, for which torch draws a random double."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detr_fast.reference.attention import KEEP_LEVELS, kept_levels


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero some elements and scale the others (Srivastava et al., JMLR 2014), to train.

    On a CPU the nearest multiple of 1 / 256 is taken for the probability, and the scale fits that.
    Elsewhere, and in compiled and transformed code, it is torch's own.

    Args:
        x (Tensor[...]): of any floating point dtype.
        p (float): probability that an element becomes 0, in [0, 1].

    Returns:
        Tensor[...]: of the shape and dtype of x; x itself if nothing is dropped.
    """
    kept = kept_levels(p)
    if kept in (0, KEEP_LEVELS) or not draws_bytes(x.device):
        return torch.nn.functional.dropout(x, p)
    out: Tensor = _Dropout.apply(x, kept)
    return out


def draws_bytes(device: torch.device) -> bool:
    """Whether dropout on this device, in this context, goes by `random_bytes`."""
    transformed = torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()
    return device.type == "cpu" and not transformed


def random_bytes(*shape: int) -> Tensor:
    """From torch's generator (ByteTensor[shape]), eight of them in the time of one number."""
    count = torch.Size(shape).numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.uint8)[:count].view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: int) -> Tensor:
        random = random_bytes(*x.shape)
        ctx.save_for_backward(random)
        ctx.kept = kept
        return _kept(x, random, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (random,) = ctx.saved_tensors
        return _kept(grad, random, ctx.kept), None


def _kept(x: Tensor, random: Tensor, kept: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ops.detr_fast.dropout_bytes.default(x.contiguous(), random, kept, out)
    return out


@torch.library.register_fake("detr_fast::dropout_bytes")
def _dropout_bytes_fake(x: Tensor, random: Tensor, kept: int, out: Tensor) -> None:
    return None
