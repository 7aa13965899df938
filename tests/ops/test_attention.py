# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of attention against float64, whatever path it takes on a device."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.ops.layers import unbind_layers
from tests.ops.attention_cases import (
    HALVES,
    Case,
    assert_as_exact_as_torch,
    assert_padding_is_zero,
    assert_same_bits,
    attention_case,
    expected,
    garbage,
    grid_case,
    run,
)

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SDPA_BACK_ENDS = pytest.mark.parametrize(
    "back_end", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=lambda b: b.name
)
# (h, w) of each image and (h, w) of the grid: one cell, one row, one column, all of it, nothing
RECTS = {
    "cells": ([(1, 1), (3, 5)], 4, 6),
    "row": ([(1, 17), (1, 30)], 1, 30),
    "column": ([(17, 1), (30, 1)], 30, 1),
    "whole rows": ([(3, 16), (5, 16)], 5, 16),
    "everything": ([(9, 15), (9, 15)], 9, 15),
    "an empty image": ([(0, 0), (4, 20), (0, 7), (7, 0)], 7, 20),
    "narrow and low": ([(9, 3), (2, 15)], 9, 15),
}


def check(case):
    ours = run(case)
    assert_as_exact_as_torch(case, ours)
    assert_padding_is_zero(case, ours)
    return ours


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 63, 64, 65, 100, 127, 129])
@HALVES
def test_is_as_exact_as_torch(device, rows, dtype):
    heads = 2 if rows < 64 else 1
    check(attention_case(rows, heads=heads, dtype=dtype, device=device, seed=rows))


def test_many_rows(device):
    check(attention_case(850, images=1, heads=1, device=device))


@pytest.mark.parametrize("rows", [850, 1024, 4097])
@HALVES
def test_many_rows_on_a_gpu(gpu, rows, dtype):
    check(attention_case(rows, images=2, heads=8, dtype=dtype, device=gpu))
    rects = [(rows // 16, 9), (rows // 32, 16)]
    check(grid_case(rects, rows // 16, 16, heads=8, dtype=dtype, device=gpu))


@pytest.mark.parametrize("images", [1, 64])
def test_any_number_of_images_on_a_gpu(gpu, images):
    check(attention_case(100, 300, images=images, heads=8, device=gpu))


@pytest.mark.parametrize(("rects", "height", "width"), RECTS.values(), ids=RECTS)
@HALVES
def test_rectangles_of_grids(device, rects, height, width, dtype):
    check(grid_case(rects, height, width, heads=1, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 65), (5, 16), (17, 129), (65, 1), (130, 40), (100, 300)], ids=str
)
def test_other_queries_than_keys(device, queries, keys):
    check(attention_case(queries, keys, heads=1, device=device, seed=queries))


@pytest.mark.parametrize("queries", [5, 20, 129])
def test_queries_look_at_a_grid(device, queries):
    """Of a decoder: they are real all, and may be as many as cells are."""
    rects = [(2, 7), (4, 3), (0, 0)]
    case = attention_case(
        *(queries, 40), rects=rects, query_rects=False, padded_width=10, heads=1, device=device
    )
    assert "query_rect" not in case.padding
    check(case)


@pytest.mark.parametrize("keys", [20, 70])
def test_counted_keys(device, keys):
    check(attention_case(20, keys, counts=(keys, 0, 1, keys - 3), heads=1, device=device))


def test_numbers_out_of_range_are_clamped(device):
    """Nothing is read that is not there, and nobody looks at the numbers to complain."""
    case = grid_case([(9, 3), (-1, 5), (2, -7), (99, 99)], 4, 6, heads=1, device=device)
    clamped = [(4, 3), (0, 5), (2, 0), (4, 6)]
    assert_same_bits(run(case), run(grid_case(clamped, 4, 6, heads=1, device=device)))
    case = attention_case(8, 20, counts=(99, -4), heads=1, device=device)
    assert_same_bits(run(case), run(attention_case(8, 20, counts=(20, 0), heads=1, device=device)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_padding_leaves_no_trace(device, dtype):
    cases = (
        grid_case([(3, 5), (0, 0), (2, 6)], 4, 6, dtype=dtype, device=device),
        attention_case(9, 24, counts=(13, 0), dtype=dtype, device=device),
    )
    for case in cases:
        ours = run(case)
        assert_padding_is_zero(case, ours)
        assert all(x.isfinite().all() for x in ours)
        for fill in (torch.zeros_like, lambda x: 100 - garbage(x)):
            assert_same_bits(run(case.with_padding_of(fill)), ours)


def test_a_real_nan_is_seen(device):
    """By the queries of its image and head, and by no other."""
    case = grid_case([(3, 5), (4, 6)], 4, 6, device=device)
    case.k[0, 1, 7, 3] = torch.nan
    out = ops.attention(*case[:3], **case.padding)
    real = case.real()[0][0]
    assert out[0, 1, real].isnan().all()
    assert not out[0, 1, ~real].any()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()


def test_large_scores_do_not_overflow(device):
    case = attention_case(40, heads=1, dtype=torch.float16, device=device)
    case = case._replace(q=(case.q * 30).clamp(-60, 60), k=(case.k * 30).clamp(-60, 60))
    ours, exact = run(case), expected(case)
    assert_close(ours.out.double(), exact.out, rtol=2e-3, atol=2e-3)
    assert all(x.isfinite().all() for x in ours)


def layouts(case):
    """The same numbers as they may lie in memory."""
    q, k, v = case[:3]
    block = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)  # (B, L, 3, H, D)
    yield "slices of a product", [x.transpose(1, 2) for x in block.unbind(2)]
    yield (
        "sequence first",
        [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (q, k, v)],
    )
    shifted = [torch.cat([x.flatten()[:1], x.flatten()]) for x in (q, k, v)]
    yield "two bytes off", [x[1:].view(q.shape) for x in shifted]
    yield "columns apart", [x.repeat_interleave(2, 3)[..., ::2] for x in (q, k, v)]
    yield "rows of 33", [F.pad(x, (0, 1))[..., :32] for x in (q, k, v)]


def test_lies_in_memory_in_any_way(device):
    case = grid_case([(3, 5), (4, 6)], 4, 6, device=device)
    ours = run(case)
    grads = [case.grad.mT.contiguous().mT, case.grad.transpose(1, 2).contiguous().transpose(1, 2)]
    for name, tensors in layouts(case):
        for grad in grads:
            other = case._replace(**dict(zip("qkv", tensors, strict=False)), grad=grad)
            outcome = run(other)
            for x, y in zip(outcome, ours, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_one_head_for_all_and_one_gradient(device):
    """Expanded tensors: strides of 0."""
    case = attention_case(20, device=device)
    shared = [x[:, :1].expand_as(x) for x in case[:4]]
    given = Case(*shared, {}, 0.0)
    assert_same_bits(run(given), run(Case(*[x.contiguous() for x in shared], {}, 0.0)))


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_nothing_to_do(device, sizes, dropout_p):
    images, heads, queries, keys = sizes
    for dtype in (torch.bfloat16, torch.float32):
        case = attention_case(queries, keys, images=images, heads=heads, dtype=dtype, device=device)
        ours = run(case._replace(dropout_p=dropout_p))
        assert ours.out.shape == (*sizes[:3], 32)
        assert not any(x.any() for x in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_padding_of_nothing(device, dtype):
    cases = (
        attention_case(5, 0, counts=(3, 0), dtype=dtype, device=device),
        attention_case(0, 8, rects=[(2, 3), (1, 1)], padded_width=4, dtype=dtype, device=device),
        grid_case([], 4, 6, dtype=dtype, device=device),
    )
    for case in cases:
        assert not any(x.any() for x in run(case))


@pytest.mark.parametrize(
    "needs",
    [(True, False, False), (False, True, False), (False, False, True), (True, False, True)],
    ids=str,
)
@pytest.mark.parametrize("keys", [20, 9])
def test_some_need_gradients(device, needs, keys):
    case = attention_case(20, keys, heads=1, device=device)
    ours = run(case)
    leaves = [x.clone().requires_grad_(need) for x, need in zip(case[:3], needs, strict=True)]
    ops.attention(*leaves).backward(case.grad)
    for leaf, grad, need in zip(leaves, ours[1:], needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_same_bits(leaf.grad, grad)


def test_a_fused_projection_has_its_gradient_in_one_block(device):
    case = grid_case([(3, 5), (4, 6)], 4, 6, device=device)
    qkv = torch.stack([x.transpose(1, 2) for x in case[:3]], 2).requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in unbind_layers(qkv, dim=2))
    [grad] = torch.autograd.grad(ops.attention(q, k, v, **case.padding), qkv, case.grad)
    assert grad.is_contiguous()
    assert_same_bits([x.transpose(1, 2) for x in grad.unbind(2)], list(run(case)[1:]))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_stride_of_one_row_is_of_no_account(device, rows):
    case = attention_case(rows, 1, heads=1, device=device)
    q, k, v = (
        x.as_strided(x.shape, (*x.stride()[:2], 1, 1)) if x.shape[2] == 1 else x for x in case[:3]
    )
    assert_same_bits(run(case._replace(q=q, k=k, v=v)), run(case))


# ---- what torch's SDPA computes


@FLOATS
def test_sdpa_equals_reference(machine, dtype):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    cases = [
        grid_case(rects, height, width, dtype=dtype, device=machine)
        for rects, height, width in RECTS.values()
    ]
    cases += [
        attention_case(5, 20, counts=(20, 0, 3), dtype=dtype, device=machine),
        attention_case(5, 20, columns=16, dtype=dtype, device=machine),
    ]
    for case in cases:
        ours = run(case)
        assert_close(ours, run(case, reference.attention), rtol=tolerance, atol=tolerance)
        assert_close(ours, expected(case), rtol=tolerance, atol=tolerance, check_dtype=False)
        assert_padding_is_zero(case, ours)


@SDPA_BACK_ENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_back_end_of_sdpa_leaks(dtype, back_end):
    case = grid_case([(3, 5), (0, 0), (2, 6)], 4, 6, dtype=dtype)
    with sdpa_kernel(back_end):
        ours = run(case)
    assert_padding_is_zero(case, ours)
    assert_close(ours, expected(case), rtol=0.02, atol=0.02, check_dtype=False)
    assert not any(x[1].any() for x in ours)


def test_sdpa_need_not_know_of_empty_rows(monkeypatch):
    """A back end may as well give NaN where a query has no key: 0 / 0."""

    def unsafe(q, k, v, mask, dropout_p):
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    case = grid_case([(3, 5), (0, 0), (2, 6)], 4, 6, dtype=torch.float64)
    counted = attention_case(9, 24, counts=(13, 0), dtype=torch.float64)
    monkeypatch.setattr(F, "scaled_dot_product_attention", unsafe)
    for each in (case, counted):
        assert_close(run(each), expected(each))


MASKS = {
    "bool": lambda g: torch.rand(2, 1, 24, 24, generator=g) < 0.7,
    "of heads": lambda g: torch.rand(2, 1, 24, generator=g) < 0.7,
    "added": lambda g: torch.randn(24, 24, generator=g),
    "added infinity": lambda g: torch.randn(2, 24, 24, generator=g)[:, None].log(),
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_a_mask_joins_the_padding(machine, make):
    case = grid_case([(3, 5), (0, 6)], 4, 6, dtype=torch.float64, device=machine)
    mask = make(torch.Generator().manual_seed(3)).to(machine).nan_to_num(-torch.inf)
    if mask.dtype == torch.bool:
        mask[..., 0, :] = False  # and a query that may look at nothing
    ours = run(case, mask=mask)
    assert_close(ours, run(case, reference.attention, mask=mask))
    assert_padding_is_zero(case, ours)
    assert ops.backend("attention", *case[:3], mask=mask)[0] == "sdpa"


def test_other_head_dimensions_of_values(machine):
    """Conditional DETR compares 64 columns and averages 32."""
    case = attention_case(7, 20, columns=64, dtype=torch.float64, device=machine)
    case = case._replace(v=case.v[..., :32], grad=case.grad[..., :32])
    assert_close(run(case), run(case, reference.attention))


@pytest.mark.parametrize("function", [ops.attention, reference.attention])
def test_passes_gradcheck(function):
    case = grid_case([(2, 1), (1, 2), (0, 0)], 2, 3, heads=1, columns=4, dtype=torch.float64)
    case = case.with_padding_of(torch.ones_like)
    inputs = [x.requires_grad_() for x in case[:3]]
    assert torch.autograd.gradcheck(lambda *x: function(*x, **case.padding), inputs)
    counted = attention_case(3, 4, counts=(2, 0), heads=1, columns=4, dtype=torch.float64)
    counted = counted.with_padding_of(torch.ones_like)
    inputs = [x.requires_grad_() for x in counted[:3]]
    assert torch.autograd.gradcheck(lambda *x: function(*x, **counted.padding), inputs)
