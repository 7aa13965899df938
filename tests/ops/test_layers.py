# SPDX-License-Identifier: Apache-2.0
"""Slices whose gradients are not copied where they lie as the slices did."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast.ops.layers import unbind_layers


class InOneBlock(torch.autograd.Function):
    """Gives gradients that are slices of one block, each filled with its number."""

    @staticmethod
    def forward(ctx, block, order, *slices):
        ctx.block, ctx.order, ctx.shape = block, order, slices[0].shape
        return sum(s.sum() for s in slices)

    @staticmethod
    def backward(ctx, grad):
        parts = ctx.block.view(-1, *ctx.shape).unbind()
        for i, part in enumerate(parts):
            part.fill_(i)
        return None, None, *(parts[i] for i in ctx.order)


def gradient(block, order=(0, 1, 2)):
    stacked = torch.zeros(3, 2, 5, dtype=torch.float64, requires_grad=True)
    total = InOneBlock.apply(block, order, *unbind_layers(stacked))
    return torch.autograd.grad(total, stacked)[0]


def test_slices_are_views():
    stacked = torch.randn(3, 2, 5)
    slices = unbind_layers(stacked)
    assert [s.data_ptr() for s in slices] == [s.data_ptr() for s in stacked]
    assert_close(slices, stacked.unbind())


def test_a_block_of_gradients_is_the_gradient():
    block = torch.empty(30, dtype=torch.float64)
    found = gradient(block)
    assert found.data_ptr() == block.data_ptr()
    assert_close(found, torch.arange(3.0, dtype=torch.float64)[:, None, None].expand(3, 2, 5))


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 1, 1), (2, 1, 0)], ids=str)
def test_others_are_stacked(order):
    block = torch.empty(30, dtype=torch.float64)
    found = gradient(block, order)
    assert found.data_ptr() != block.data_ptr()
    assert_close(found[:, 0, 0], torch.tensor(order, dtype=torch.float64))


def test_a_block_with_a_gap_is_none():
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


def weighted(stacked):
    return sum((i + 1) * s.sin().sum() for i, s in enumerate(unbind_layers(stacked)))


def test_transforms_of_torch_go_through():
    stacked = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(weighted(stacked), stacked)
    assert_close(torch.func.grad(weighted)(stacked.detach()), expected)
    total = weighted(stacked)
    [batched] = torch.autograd.grad(total, stacked, torch.eye(2)[0].double(), is_grads_batched=True)
    assert_close(batched, torch.stack([expected, 0 * expected]))
    assert torch.autograd.gradcheck(weighted, stacked, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(weighted, stacked)
    traced = torch.jit.trace(weighted, stacked)
    assert "PythonOp" not in str(traced.graph)
    assert_close(traced(stacked), total)


def test_compiles_in_one_graph():
    torch.compiler.reset()

    stacked = torch.randn(3, 4, requires_grad=True)
    [expected] = torch.autograd.grad(weighted(stacked), stacked)
    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(stacked), stacked)[0], expected)
