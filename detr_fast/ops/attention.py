# SPDX-License-Identifier: Apache-2.0
"""Attention over padded sequences: fused kernels for DETR's shapes, torch's SDPA for all others."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from detr_fast import reference
from detr_fast.ops._library import Path, chooses_path, why_no_kernel, with_reference
from detr_fast.ops.attention_by_heads import attention_by_heads
from detr_fast.ops.dropout import draws_bytes
from detr_fast.reference.attention import KEEP_LEVELS, Rows, kept_levels

__all__ = ["attention", "attention_weights"]

_ops = torch.ops.detr_fast
_HEAD_DIM = 32  # csrc/attention/rows.h
_FUSED_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = (*_FUSED_DTYPES, torch.float32, torch.float64)


# ---- checks, which look at no number on the device


def _check_shape(fits: bool, tensor: Tensor, name: str, *sizes: object) -> None:
    if not fits:
        expected = ", ".join(map(str, sizes)) + "," * (len(sizes) == 1)
        raise RuntimeError(f"{name}: expected shape ({expected}), got {tuple(tensor.shape)}")


def _check_device(tensor: Tensor, name: str, q: Tensor) -> None:
    if tensor.device != q.device:
        raise RuntimeError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")


def _check_rows(rows: Tensor | None, name: str, q: Tensor, *columns: int) -> None:
    if rows is None:
        return
    if rows.dtype != torch.int32:
        raise RuntimeError(f"{name}: expected dtype torch.int32, got {rows.dtype}")
    sizes = (q.shape[0], *columns)
    _check_shape(rows.shape == sizes, rows, name, *sizes)
    _check_device(rows, name, q)


def _check_grid(rect: Tensor | None, name: str, length: int, padded_width: int | None) -> None:
    if rect is None:
        return
    if padded_width is None:
        raise ValueError(f"{name}: needs padded_width, the number of cells in a row of the grid")
    if padded_width <= 0 or length % padded_width:
        raise RuntimeError(
            f"{name}: a sequence of {length} rows is no grid that is padded_width = "
            f"{padded_width} wide"
        )


def _check_padding(
    q: Tensor,
    k: Tensor,
    query_rect: Tensor | None,
    key_rect: Tensor | None,
    padded_width: int | None,
    key_count: Tensor | None,
) -> None:
    """Check q, k and what says which of their rows are real."""
    if q.dtype not in _DTYPES:
        known = ", ".join(map(str, _DTYPES))
        raise RuntimeError(f"q: expected dtype {known}, got {q.dtype}")
    _check_shape(q.dim() == 4, q, "q", "*", "*", "*", "*")
    images, heads, _, columns = q.shape
    fits = k.dim() == 4 and k.shape == (images, heads, k.shape[2], columns)
    _check_shape(fits, k, "k", images, heads, "*", columns)
    _check_alike(k, "k", q)
    if key_rect is not None and key_count is not None:
        raise ValueError("key_rect and key_count: expected at most one of them")
    _check_rows(query_rect, "query_rect", q, 2)
    _check_rows(key_rect, "key_rect", q, 2)
    _check_rows(key_count, "key_count", q)
    _check_grid(query_rect, "query_rect", q.shape[2], padded_width)
    _check_grid(key_rect, "key_rect", k.shape[2], padded_width)


def _check_alike(tensor: Tensor, name: str, q: Tensor) -> None:
    if tensor.dtype != q.dtype and computed_in(tensor) != computed_in(q):
        raise RuntimeError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")
    _check_device(tensor, name, q)


def _check(
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
) -> None:
    _check_padding(q, k, query_rect, key_rect, padded_width, key_count)
    rows = k.shape[:3]
    _check_shape(v.dim() == 4 and v.shape[:3] == rows, v, "v", *rows, "*")
    _check_alike(v, "v", q)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability, 0 to 1, got {dropout_p}")
    if mask is not None:
        _check_mask(mask, q, k)


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(
            f"mask: expected dtype torch.bool, True for keys to look at, or a floating point "
            f"dtype, got {mask.dtype}"
        )
    full = (*q.shape[:3], k.shape[2])
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if mask.dim() > 4 or any(own not in (1, size) for own, size in sizes):
        raise RuntimeError(
            f"mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}"
        )
    _check_device(mask, "mask", q)


def computed_in(tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor has in a product: that of autocast, where it is on; float64 stays."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


# ---- the public functions


def _check_weights(
    q: Tensor,
    k: Tensor,
    *,
    query_rect: Tensor | None = None,
    key_rect: Tensor | None = None,
    padded_width: int | None = None,
    key_count: Tensor | None = None,
    average: bool = True,
) -> None:
    _check_padding(q, k, query_rect, key_rect, padded_width, key_count)


attention_weights = with_reference(reference.attention_weights, check=_check_weights)(
    reference.attention_weights
)


@with_reference(reference.attention, check=_check)
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
    Differentiable once.  Where `detr_fast.ops.backend` says ``"fused"``, an image's results
    and gradients are the same bits in any batch and with any padding; else they are those of
    ``torch.nn.functional.scaled_dot_product_attention`` (``"sdpa"``), and with dropout on a CPU
    those of products of torch, a few heads at a time (``"by_heads"``).  Two exceptions: dropout
    goes by an image's place in the batch, and up to 128 queries have other bits with a
    ``query_rect`` than without: give that of the whole grid to compare.

    Under autocast all but float64 is computed in the dtype of autocast.

    Args:
        q (Tensor[B, H, Q, D]): queries, in any strides: half, bfloat16, float32 or float64.
        k (Tensor[B, H, K, D]): keys.
        v (Tensor[B, H, K, V]): values.
        query_rect (IntTensor[B, 2] | None): int32 (h, w) of each image: of the queries, a grid
            ``padded_width`` wide row by row, those of the upper left h x w cells are real.
        key_rect (IntTensor[B, 2] | None): the same of the keys.
        padded_width (int | None): cells of a row of the grid.
        key_count (IntTensor[B] | None): int32 number of real keys, which come first.
        mask (Tensor | None): broadcastable to (B, H, Q, K): bool, True for keys to look at, or
            floating point, added to the scores.
        dropout_p (float): probability that a weight is dropped.  The nearest multiple of 1 / 256
            is taken, 26 / 256 for 0.1, and the other weights are divided by what is left of 1, so
            that the mean is exact.  What is dropped follows torch's generator of the device.

    Returns:
        Tensor[B, H, Q, V]: averages of the values; 0 where there is no key.  Of the dtype that it
        is computed in; in memory (B, Q, H, V) where it is fused.

    Raises:
        RuntimeError: if a shape, dtype or device does not fit, or a sequence is no such grid.
        ValueError: if both key_rect and key_count are given, a rect without padded_width, or the
            probability is none.

    Examples:
        >>> q, k, v = torch.randn(3, 2, 8, 12, 32).unbind()
        >>> rect = torch.tensor([[3, 4], [2, 3]], dtype=torch.int32)  # of a grid 3 x 4
        >>> out = detr_fast.ops.attention(
        ...     q, k, v, query_rect=rect, key_rect=rect, padded_width=4
        ... )
    """
    dtype = computed_in(q)  # as are k and v: that has been checked
    q, k, v = (x.to(dtype) for x in (q, k, v))
    kept = kept_levels(dropout_p)
    if _why_not_fused(dtype, q, v, mask, kept):
        rows = query_rect, Rows(key_rect, key_count, padded_width), mask
        if not _is_widened(dtype, q, k, v):
            return _by_torch(q, k, v, *rows, kept)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (x.float() for x in (q, k, v))
            return _by_torch(q, k, v, *rows, kept).to(dtype)
    seed = None
    if kept < KEEP_LEVELS:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    width = 1 if padded_width is None else padded_width
    out: Tensor = _ops.attention.default(
        q, k, v, query_rect, key_rect, key_count, width, kept, seed
    )[0]
    return out.transpose(1, 2)


@chooses_path("attention")
def _path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **_: Any,
) -> Path:
    dtype = computed_in(q)
    why_not = _why_not_fused(dtype, q, v, mask, kept_levels(dropout_p))
    if not why_not:
        return "fused", f"{q.device.type} has a kernel for this"
    widened = _is_widened(dtype, q, k, v)
    why_not += "; in float32, which has the faster gradient" * widened
    if _is_by_heads(torch.float32 if widened else dtype, q.device, mask, kept_levels(dropout_p)):
        return "by_heads", why_not + "; SDPA keeps all scores where it drops some"
    return "sdpa", why_not


def _why_not_fused(dtype: torch.dtype, q: Tensor, v: Tensor, mask: Tensor | None, kept: int) -> str:
    """The reason; nothing where the fused kernels run."""
    if dtype not in _FUSED_DTYPES:
        return f"dtype {dtype}, fused: {' and '.join(map(str, _FUSED_DTYPES))}"
    if q.shape[3] != _HEAD_DIM or v.shape[3] != _HEAD_DIM:
        return f"head dimensions {q.shape[3]} and {v.shape[3]}, fused: {_HEAD_DIM}"
    if mask is not None:
        return "a mask"
    if kept == 0:
        return "everything is dropped"
    why_not: str = why_no_kernel("attention", q.device)
    return why_not


def _is_widened(dtype: torch.dtype, *inputs: Tensor) -> bool:
    """Whether SDPA computes in float32 what has half of its bits.

    Of DETR's shapes the gradient of torch's CPU kernel takes up to 7 times as long in bfloat16 (32
    images of 16 queries and 64 keys) as in float32, of 400 queries and keys 1.4 times; forward the
    two are alike.
    """
    if dtype not in _FUSED_DTYPES or inputs[0].device.type != "cpu":
        return False
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _is_by_heads(dtype: torch.dtype, device: torch.device, mask: Tensor | None, kept: int) -> bool:
    """Whether `attention_by_heads` computes what the fused kernels do not."""
    fits = dtype in (torch.float32, torch.float64) and 0 < kept < KEEP_LEVELS
    return fits and draws_bytes(device) and not (mask is not None and mask.requires_grad)


def _by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_rect: Tensor | None,
    keys: Rows,
    mask: Tensor | None,
    kept: int,
) -> Tensor:
    by_heads = _is_by_heads(q.dtype, q.device, mask, kept)
    real_queries = Rows(query_rect, None, keys.padded_width).mask(q.shape[2])
    real_keys = keys.mask(k.shape[2])
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    # 0 * NaN is NaN: what is not real comes into no product, forward or backward
    if real_keys is not None:
        k, v = (x.masked_fill(~real_keys[:, None, :, None], 0) for x in (k, v))
        mask = _with_keys(mask, real_keys)
    padded = None if real_queries is None else ~real_queries[:, None, :, None]
    if padded is not None:
        q = q.masked_fill(padded, 0)
    if by_heads:
        out = attention_by_heads(q, k, v, mask, kept)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, 1 - kept / KEEP_LEVELS)
    return out if padded is None else out.masked_fill(padded, 0)


def _with_keys(mask: Tensor | None, real_keys: Tensor) -> Tensor:
    """The mask that leaves out keys that are not real (BoolTensor[B, K])."""
    # an image without keys looks at its first one, which is 0: no back end meets an empty softmax
    first = torch.arange(real_keys.shape[1], device=real_keys.device) == 0
    looked_at = (real_keys | first)[:, None, None]
    if mask is None:
        return looked_at
    if mask.dtype == torch.bool:
        return mask & looked_at
    return mask.masked_fill(~looked_at, -torch.inf)


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
    words = 0 if kept == KEEP_LEVELS else (k.shape[2] + 127) // 128 * 4  # dropout.h
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


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, query_rect, key_rect, key_count, *ctx.options, _ = inputs
    _, lse, keep = output
    ctx.save_for_backward(q, k, v, *output, query_rect, key_rect, key_count)
    ctx.mark_non_differentiable(lse, keep)
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _ops.attention_backward.default(grad, *ctx.saved_tensors, *ctx.options)
    # of self-attention one block, which unbind_layers(qkv, dim=2) recognises
    rows_first: Sequence[Tensor] = grads[0].unbind(2) if len(grads) == 1 else grads
    return tuple(g.transpose(1, 2) for g in rows_first)


def _attention_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    grads = [None] * 3 if grad is None else _gradients(ctx, grad)
    return *grads, *[None] * 6


torch.library.register_autograd(
    "detr_fast::attention", _attention_backward, setup_context=_attention_setup
)
