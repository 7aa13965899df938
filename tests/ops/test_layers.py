# SPDX-License-Identifier: Apache-2.0
"""Slices whose gradients are not copied where they lie as the slices did."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from detr_fast.ops.layers import unbind_layers


class InOneBlock(torch.autograd.Function):
    """Gives gradients that are slices of one block, each filled with its number."""

    @staticmethod
    def forward(ctx, block, order, dim, *slices):
        ctx.block, ctx.order, ctx.dim, ctx.shape = block, order, dim, slices[0].shape
        return sum(s.sum() for s in slices)

    @staticmethod
    def backward(ctx, grad):
        shape, dim = ctx.shape, ctx.dim
        parts = ctx.block.view(*shape[:dim], -1, *shape[dim:]).unbind(dim)
        for i, part in enumerate(parts):
            part.fill_(i)
        return None, None, None, *(parts[i] for i in ctx.order)


def gradient(block, order=(0, 1, 2), shape=(2, 5), dim=0, of_block=None):
    """Of three slices along ``dim``, from those of the block along ``of_block``."""
    stacked = torch.zeros(*shape[:dim], 3, *shape[dim:], dtype=torch.float64, requires_grad=True)
    of_block = dim if of_block is None else of_block
    total = InOneBlock.apply(block, order, of_block, *unbind_layers(stacked, dim))
    return torch.autograd.grad(total, stacked)[0]


def test_slices_are_views():
    stacked = torch.randn(3, 2, 5)
    slices = unbind_layers(stacked)
    assert [s.data_ptr() for s in slices] == [s.data_ptr() for s in stacked]
    assert_close(slices, stacked.unbind())
    assert_close(unbind_layers(stacked, -1), stacked.unbind(-1))


def test_a_block_of_gradients_is_the_gradient():
    block = torch.empty(30, dtype=torch.float64)
    found = gradient(block)
    assert found.data_ptr() == block.data_ptr()
    assert_close(found, torch.arange(3.0, dtype=torch.float64)[:, None, None].expand(3, 2, 5))


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (1, 3, 2, 5), (4, 1, 2, 5), (4, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, 4])
def test_along_any_dimension(shape, dim):
    """As queries, keys and values (B, L, 3, H, D) lie in one product."""
    block = torch.empty(3 * math.prod(shape), dtype=torch.float64)
    found = gradient(block, shape=shape, dim=dim)
    assert found.data_ptr() == block.data_ptr()
    assert found.is_contiguous()
    numbers = torch.arange(3.0, dtype=torch.float64)
    assert_close(found.movedim(dim, -1), numbers.expand(*shape, 3))


@pytest.mark.parametrize(("dim", "of_block"), [(0, 2), (2, 0), (1, 2)])
def test_slices_along_another_dimension_of_the_block(dim, of_block):
    shape = (4, 3, 2, 5)
    block = torch.empty(3 * math.prod(shape), dtype=torch.float64)
    found = gradient(block, shape=shape, dim=dim, of_block=of_block)
    assert found.data_ptr() == block.data_ptr()
    numbers = torch.arange(3.0, dtype=torch.float64)
    assert_close(found.movedim(dim, -1), numbers.expand(*shape, 3))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 3), (0, 2, 4)], ids=str)
def test_part_of_a_block_is_the_gradient(order):
    """As of queries and keys, where the block has the values, too."""
    block = torch.empty(5 * 10, dtype=torch.float64)
    found = gradient(block, order, dim=1)
    assert found.untyped_storage().data_ptr() == block.data_ptr()
    assert_close(found[0, :, 0], torch.tensor(order, dtype=torch.float64))


def test_one_slice_is_not_copied():
    stacked = torch.zeros(1, 2, 5, dtype=torch.float64, requires_grad=True)
    block = torch.empty(10, dtype=torch.float64)
    total = InOneBlock.apply(block, (0,), 0, *unbind_layers(stacked))
    assert torch.autograd.grad(total, stacked)[0].data_ptr() == block.data_ptr()


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 1, 1), (2, 1, 0)], ids=str)
def test_others_are_stacked(order):
    block = torch.empty(30, dtype=torch.float64)
    found = gradient(block, order)
    assert found.data_ptr() != block.data_ptr()
    assert_close(found[:, 0, 0], torch.tensor(order, dtype=torch.float64))


def test_a_block_with_uneven_gaps_is_none():
    block = torch.empty(40, dtype=torch.float64)
    assert_close(gradient(block, (0, 1, 3))[:, 0, 0], torch.tensor([0, 1, 3.0]).double())


class OfThree(torch.autograd.Function):
    """Gives as gradients of q, k, v (B, L, H, D) the slices of a block (B, L, 3, H, D)."""

    @staticmethod
    def forward(ctx, block, q, k, v):
        ctx.block = block
        return q.sum() + k.sum() + v.sum()

    @staticmethod
    def backward(ctx, grad):
        return None, *ctx.block.unbind(2)


@pytest.mark.parametrize("together", [3, 2], ids=["qkv", "qk"])
def test_slices_within_the_rows_of_a_block_are_the_gradient(together):
    block = torch.randn(2, 5, 3, 4, 8)
    stacked = torch.zeros(2, 5, together, 4, 8, requires_grad=True)
    others = [torch.zeros(2, 5, 4, 8, requires_grad=True)] * (3 - together)
    seen = []
    inner = stacked * 1  # of which the gradient is seen before anyone copies it
    inner.register_hook(seen.append)
    OfThree.apply(block, *unbind_layers(inner, dim=2), *others).backward()
    assert seen[0].data_ptr() == block.data_ptr()
    assert torch.equal(stacked.grad, block[:, :, :together])


def test_a_slice_that_nobody_uses_has_no_gradient():
    stacked = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    first, _, last = unbind_layers(stacked)
    (first.sum() + 2 * last.sum()).backward()
    assert_close(stacked.grad, torch.tensor([[1.0], [0], [2]]).double().expand(3, 2))
    assert torch.autograd.gradcheck(lambda s: unbind_layers(s)[1].sin(), stacked)


def weighted(stacked, dim=0):
    return sum((i + 1) * s.sin().sum() for i, s in enumerate(unbind_layers(stacked, dim)))


def test_transforms_of_torch_go_through():
    stacked = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(weighted(stacked), stacked)
    assert_close(torch.func.grad(weighted)(stacked.detach()), expected)
    total = weighted(stacked)
    [batched] = torch.autograd.grad(total, stacked, torch.eye(2)[0].double(), is_grads_batched=True)
    assert_close(batched, torch.stack([expected, 0 * expected]))
    assert torch.autograd.gradcheck(weighted, stacked, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(weighted, stacked)
    for dim in (1, -1):
        weighted_columns = partial(weighted, dim=dim)
        assert torch.autograd.gradcheck(weighted_columns, stacked, check_forward_ad=True)
        [of_columns] = torch.autograd.grad(weighted_columns(stacked), stacked)
        assert_close(torch.func.grad(weighted_columns)(stacked.detach()), of_columns)
    traced = torch.jit.trace(weighted, stacked)
    assert "PythonOp" not in str(traced.graph)
    assert_close(traced(stacked), total)


def test_compiles_in_one_graph():
    torch.compiler.reset()

    stacked = torch.randn(3, 4, requires_grad=True)
    [expected] = torch.autograd.grad(weighted(stacked), stacked)
    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(stacked), stacked)[0], expected)
