# SPDX-License-Identifier: Apache-2.0
"""Dropout by random bytes on a CPU, and attention that drops by them a few heads at a time."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops
from detr_fast.models.attention import FUSED, REFERENCE
from detr_fast.ops import attention_by_heads
from detr_fast.ops.attention_by_heads import attention_by_heads as by_heads
from detr_fast.ops.dropout import dropout, random_bytes
from detr_fast.ops.layers import unbind_layers
from detr_fast.reference.attention import Rows, attention_keeping

OP = torch.ops.detr_fast.dropout_bytes
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# ---- the op


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40_000])
@pytest.mark.parametrize("kept", [1, 230, 255])
def test_bits_are_those_of_the_formula(dtype, count, kept):
    torch.manual_seed(0)
    x = (torch.randn(count) * 10.0 ** torch.randint(-6, 5, (count,))).to(dtype)
    random = random_bytes(count)
    out = torch.full_like(x, torch.nan)
    OP(x, random, kept, out)
    wide = x.double() if dtype == torch.float64 else x.float()
    expected = torch.where(random < kept, wide * (256 / kept), 0.0).to(dtype)
    assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(dtype):
    """It stays where it is kept, and is gone where it is dropped."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf] * 2, dtype=dtype)
    if dtype == torch.bfloat16:  # all bits of the mantissa: must not be rounded to another number
        x[0] = torch.tensor(0x7FFF, dtype=torch.int16).view(dtype)
    random = torch.tensor([0, 0, 0, 9, 9, 9], dtype=torch.uint8)
    OP(x, random, 5, x)
    expected = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 0, 0], dtype=dtype)
    assert_close(x, expected, equal_nan=True, rtol=0, atol=0)


X, RANDOM = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.uint8)
MISTAKES = {
    "x: expected dtype": (X.int(), RANDOM, 9, X.int()),
    "random: expected dtype Byte, got Float": (X, X, 9, X),
    r"random: expected shape \(2, 3\), got \(3, 2\)": (X, RANDOM.view(3, 2), 9, X),
    r"out: expected shape \(2, 3\), got \(6,\)": (X, RANDOM, 9, X.flatten()),
    "out: expected the dtype of x, Float, got Double": (X, RANDOM, 9, X.double()),
    "kept: expected 1 to 255, got 0": (X, RANDOM, 0, X),
    "kept: expected 1 to 255, got 256": (X, RANDOM, 256, X),
    "contiguous": (X.mT, RANDOM.mT, 9, X.mT),
}


@pytest.mark.parametrize(("message", "given"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_named(message, given):
    with pytest.raises(RuntimeError, match=message):
        OP(*given)


def test_opcheck():
    torch.library.opcheck(OP.default, (X, RANDOM, 230, torch.empty_like(X)))


# ---- dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keep_rate_scale_and_gradient(p):
    """The mean stays, and the gradient goes where the value has come from."""
    torch.manual_seed(0)
    x = torch.ones(1000, 1000, requires_grad=True)
    out = dropout(x, p)
    out.backward(torch.full_like(x, 2.0))
    levels = 256 - round(p * 256)
    assert out.unique().tolist() == pytest.approx([0, 256 / levels])
    assert abs(out.mean().item() - 1) < 4 * (256 / levels - 1) ** 0.5 / 1000
    assert_close(x.grad, 2 * out.detach())


def test_neighbours_are_independent():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(1 << 20), 0.5) > 0).double() - 0.5
    for apart in (1, 2, 4, 8, 64):
        assert abs((kept[apart:] * kept[:-apart]).mean()) < 4 * 0.25 / 2**10


def test_seed_reproduces():
    x = torch.ones(33)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_none_and_all():
    x = torch.randn(9)
    assert torch.equal(dropout(x, 0.0), x)
    assert not dropout(x, 1.0).any()


def test_any_layout():
    torch.manual_seed(0)
    x = torch.randn(5, 6, 7).permute(2, 0, 1).requires_grad_()
    out = dropout(x, 0.5)
    out.sum().backward()
    assert_close(out, x.detach() * x.grad)


def test_compiled_and_transformed_code_takes_torchs():
    x = torch.ones(1000)
    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager")
    assert set(compiled(x, 0.5).tolist()) == {0, 2}
    mapped = torch.func.vmap(lambda x: dropout(x, 0.5), randomness="different")(x.view(10, 100))
    assert set(mapped.flatten().tolist()) == {0, 2}


def test_module_drops_while_it_trains():
    module, x = FUSED.dropout(0.5), torch.ones(64)
    assert 0 in module(x)
    assert torch.equal(module.eval()(x), x)
    assert REFERENCE.dropout is torch.nn.Dropout


# ---- attention


def rows(queries=5, keys=7, columns=3, images=3, heads=4, dtype=torch.float64):
    """q, k and v, as a product leaves them in memory, and the upstream gradient."""
    q, k, v, g = (
        torch.randn(images, length, heads, columns, dtype=dtype).transpose(1, 2)
        for length in (queries, keys, keys, queries)
    )
    return *(x.requires_grad_() for x in (q, k, v)), g


def masks(queries=5, keys=7, images=3, heads=4):
    some = torch.rand(images, heads, queries, keys) < 0.6
    some[0, 0, 0] = False  # a query without keys
    real = torch.arange(keys) < torch.tensor([keys, 3, 1])[:, None]
    return {
        "none": None,
        "keys": real[:, None, None],
        "all": some,
        "of queries": some[0, 0],
        "added": torch.randn(heads, queries, keys, dtype=torch.float64).masked_fill(
            ~some[0], -torch.inf
        ),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("scores", [1, 70, 1 << 20], ids=["one head", "two heads", "all heads"])
def test_attention_equals_reference_with_that_mask(monkeypatch, name, scores):
    monkeypatch.setattr(attention_by_heads, "_SCORES", scores)
    torch.manual_seed(0)
    mask = masks()[name]
    q, k, v, g = rows()
    state = torch.get_rng_state()
    ours = by_heads(q, k, v, mask, 200)
    gradients = torch.autograd.grad(ours, (q, k, v), g)
    torch.set_rng_state(state)
    keep = random_bytes(3, 4, 5, 7) < 200
    expected = attention_keeping(keep, 200, q, k, v, Rows(), Rows(), mask)
    assert_close(ours, expected)
    for ours, right in zip(gradients, torch.autograd.grad(expected, (q, k, v), g), strict=True):
        assert_close(ours, right)


def test_public_attention_takes_this_path():
    """With dropout on a CPU and the dtype that it computes in; else it is SDPA's."""
    q, k, v, _ = rows(dtype=torch.float32)
    path = lambda *x, **o: ops.backend("attention", *x, **o)[0]  # noqa: E731
    assert path(q, k, v, dropout_p=0.1) == "by_heads"
    assert path(*(x.bfloat16() for x in (q, k, v)), dropout_p=0.1) == "by_heads"  # widened
    assert path(q, k, v) == "sdpa"
    assert path(q, k, v, dropout_p=1.0) == "sdpa"
    bias = torch.zeros(5, 7, requires_grad=True)
    assert path(q, k, v, mask=bias, dropout_p=0.1) == "sdpa"
    torch.manual_seed(0)
    out = ops.attention(q, k, v, dropout_p=0.1)
    torch.manual_seed(0)
    assert torch.equal(out, by_heads(q, k, v, None, 230))
    assert out.transpose(1, 2).is_contiguous()


def test_gradients_of_self_attention_are_one_block():
    """What one product has projected gets one gradient, without a copy."""
    qkv = torch.randn(2, 6, 3, 4, 8, requires_grad=True)
    parts = [x.transpose(1, 2) for x in unbind_layers(qkv, dim=2)]
    out = ops.attention(*parts, dropout_p=0.5)
    gradients = torch.autograd.grad(out, parts, torch.ones_like(out), retain_graph=True)
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == 1
    (block,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    for part, gradient in zip(block.unbind(2), gradients, strict=True):
        assert_close(part.transpose(1, 2), gradient)


def test_padding_is_not_read():
    """NaN in keys that are not real reaches neither values nor gradients."""
    q, k, v, g = rows(dtype=torch.float32)
    with torch.no_grad():
        k[1, :, 3:], v[1, :, 3:] = torch.nan, torch.inf
    count = torch.tensor([7, 3, 7], dtype=torch.int32)
    out = ops.attention(q, k, v, key_count=count, dropout_p=0.1)
    gradients = torch.autograd.grad(out, (q, k, v), g)
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert not any(x[1, :, 3:].any() for x in gradients[1:])


def test_backward_within_autocast():
    q, k, v, g = rows(dtype=torch.float32)
    torch.manual_seed(0)
    expected = torch.autograd.grad(by_heads(q, k, v, None, 128), (q, k, v), g)
    torch.manual_seed(0)
    out = by_heads(q, k, v, None, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(torch.autograd.grad(out, (q, k, v), g), expected, rtol=0, atol=0)


def test_no_rows():
    for shape in ({"queries": 0}, {"images": 0}, {"keys": 0}):
        q, k, v, g = rows(**shape)
        out = by_heads(q, k, v, None, 128)
        assert out.shape == g.shape
        gradients = torch.autograd.grad(out, (q, k, v), g)
        assert not any(x.any() for x in (out, *gradients))
