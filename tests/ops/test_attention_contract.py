# SPDX-License-Identifier: Apache-2.0
"""What attention promises to torch and to its callers: opcheck, compile, paths, weights."""

import sys

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast import ops, reference
from detr_fast.engine.dispatched import dispatched
from tests.ops.attention_cases import (
    FUSED,
    assert_same_bits,
    attention_case,
    expected,
    grid_case,
    raw_arguments,
    run,
)

OPS = torch.ops.detr_fast
CASES = {
    "dense": lambda **o: attention_case(17, **o),
    "cross": lambda **o: attention_case(5, 20, **o),
    "rect": lambda **o: grid_case([(3, 5), (0, 0)], 4, 6, **o),
    "count": lambda **o: attention_case(9, 24, counts=(13, 0), **o),
    "no images": lambda **o: attention_case(9, images=0, **o),
    "no keys": lambda **o: attention_case(9, 0, **o),
}
KINDS = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
NEEDS = [(True, True, True), (False, False, False), (True, False, False), (False, True, True)]
SIMULATED = pytest.mark.parametrize("device", ["cudasim-forward", "cuda"], indirect=True)


@SIMULATED
@pytest.mark.parametrize(
    ("kind", "dropout_p"),
    [*((kind, 0.0) for kind in CASES), *((kind, 0.5) for kind in ("dense", "rect", "no images"))],
)
def test_passes_opcheck(device, kind, dropout_p):
    make = CASES[kind]
    case = make(device=device, dropout_p=dropout_p).with_padding_of(torch.zeros_like)
    seed = torch.tensor(11, device=device) if dropout_p else None
    arguments = raw_arguments(case, seed)
    out, lse, keep = OPS.attention(*arguments)
    for needs in NEEDS if kind == "dense" else NEEDS[:2]:
        leaves = [x.clone().requires_grad_(n) for x, n in zip(case[:3], needs, strict=True)]
        torch.library.opcheck(OPS.attention.default, (*leaves, *arguments[3:]))
    saved = (*case[:3], out, lse, keep, *arguments[3:-1])
    torch.library.opcheck(
        OPS.attention_backward.default, (case.grad.transpose(1, 2).contiguous(), *saved)
    )


def loss(q, k, v, rect, width, dropout_p):
    """What surrounds attention in a model: another layout before it, one product behind it."""
    heads = [x.unflatten(-1, (2, 32)).transpose(1, 2) for x in (q, k, v)]
    out = ops.attention(
        *heads, query_rect=rect, key_rect=rect, padded_width=width, dropout_p=dropout_p
    )
    return out.transpose(1, 2).flatten(2).float().square().mean()


@pytest.mark.parametrize("device", ["cpu", "cudasim-forward", "cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiles_without_breaks_and_once_for_all_lengths(device, dtype):
    """What a path depends on is known when it is compiled."""
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, (height, width) in enumerate([(4, 6), (5, 9), (3, 13)]):
        g = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(2, height * width, 64, generator=g) for _ in range(3)]
        rect = torch.tensor([[3, 5], [1, 2]], dtype=torch.int32, device=device)
        outcomes = []
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            for call in (compiled, loss):
                leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
                total = call(*leaves, rect, width, 0.0)
                outcomes.append((total.detach(), torch.autograd.grad(total, leaves)))
        assert_close(*outcomes)
    torch._dynamo.reset()  # what is compiled for the simulator is for it alone


@pytest.mark.parametrize("device", ["cpu", "cudasim-forward", "cuda"], indirect=True)
def test_dropout_compiles(device, monkeypatch):
    """To the numbers of torch, which it draws uncompiled, too, where it does not draw bytes."""
    module = sys.modules["detr_fast.ops.attention"]  # the package has a function of that name
    monkeypatch.setattr(module, "draws_bytes", lambda device: False)
    torch._dynamo.reset()
    case = attention_case(20, device=device, dropout_p=0.5)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    outcomes = []
    for op in (compiled, ops.attention):
        torch.manual_seed(3)
        outcomes.append(run(case, op))
    assert_close(*outcomes)
    torch._dynamo.reset()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_inductor_compiles_a_loss(gpu, dropout_p):
    """Its numbers are drawn otherwise, so that dropout is compared with itself."""
    torch._dynamo.reset()
    rect = torch.tensor([[3, 5], [1, 2]], dtype=torch.int32, device=gpu)
    tensors = torch.randn(3, 2, 24, 64, device=gpu, dtype=torch.bfloat16)
    compiled = torch.compile(loss, fullgraph=True)
    outcomes = []
    for call in (compiled, compiled if dropout_p else loss):
        leaves = [x.clone().requires_grad_() for x in tensors]
        torch.manual_seed(0)
        total = call(*leaves, rect, 6, dropout_p)
        outcomes.append((total.detach(), torch.autograd.grad(total, leaves)))
    assert_close(*outcomes)


@FUSED
@KINDS
def test_the_fused_path_is_one_op_each_way(device, make):
    case = make(device=device)
    assert ops.backend("attention", *case[:3], **case.padding)[0] == "fused"
    names = dispatched(lambda: run(case))
    assert names.count("detr_fast.attention.default") == 1
    assert names.count("detr_fast.attention_backward.default") == 1
    others = {name.split(".")[1] for name in names if not name.startswith("detr_fast")}
    assert others <= {"detach", "transpose", "unbind"}


def test_sdpa_alone_where_nothing_is_padded(machine):
    case = attention_case(9, dtype=torch.float32, device=machine)
    names = dispatched(lambda: ops.attention(*case[:3]))
    assert len(names) == 1
    assert "scaled_dot_product" in names[0]


REASONS = {
    "float32": ({"dtype": torch.float32}, {}, "dtype torch.float32"),
    "columns": ({"columns": 64}, {}, "head dimensions 64 and 64"),
    "mask": ({}, {"mask": torch.ones(9, 9, dtype=torch.bool)}, "a mask"),
    "dropout": ({}, {"dropout_p": 0.999}, "everything is dropped"),
}


@FUSED
@pytest.mark.parametrize(("options", "arguments", "reason"), REASONS.values(), ids=REASONS)
def test_backend_says_why_not(device, options, arguments, reason):
    case = attention_case(9, device=device, **options)
    arguments = {n: x.to(device) if n == "mask" else x for n, x in arguments.items()}
    path, why = ops.backend("attention", *case[:3], **arguments)
    assert path == "sdpa"
    assert why.startswith(reason)
    names = dispatched(lambda: ops.attention(*case[:3], **arguments))
    assert not any(name.startswith("detr_fast") for name in names)


def test_backend_of_a_device_without_kernels():
    q = attention_case(9).q
    assert ops.backend("attention", q, q, q) == ("sdpa", "no kernel for cpu")
    with ops.use_reference():
        assert ops.backend("attention", q, q, q) == ("reference", "within use_reference()")
    with pytest.raises(ValueError, match=r"expected one of 'attention', .*got 'atention'"):
        ops.backend("atention", q, q, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_on_a_cpu_half_precision_learns_in_float32(dtype):
    """Its gradient is faster there. Values and gradients are those of float32, rounded."""
    wide = attention_case(9)
    case = wide._replace(**{n: getattr(wide, n).to(dtype) for n in ("q", "k", "v")})
    inputs = [x.clone().requires_grad_() for x in case[:3]]
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product" in str(func):
                seen.append({x.dtype for x in args if isinstance(x, torch.Tensor)})
            return func(*args, **(kwargs or {}))

    with Seen():
        out = ops.attention(*inputs)
        gradients = torch.autograd.grad(out.sum(), inputs)
        with torch.no_grad():
            ops.attention(*inputs)
    half = dtype != torch.float64
    learning = {torch.float32 if half else dtype}
    assert seen == [learning, learning, {dtype}]
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    why = ops.backend("attention", *inputs)[1]
    assert why.endswith("; in float32, which has the faster gradient") == half
    with torch.no_grad():
        assert "float32" not in ops.backend("attention", *inputs)[1].partition(";")[2]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = ops.attention(*exact)
    assert_close(out.float(), expected, rtol=1e-2, atol=1e-5)
    for found, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert_close(found.float(), wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 1)], ids=str)
def test_backend_of_a_gpu_goes_by_its_capability(monkeypatch, capability):
    from detr_fast.ops import _library

    if _library._why_no_cuda:
        pytest.skip(_library._why_no_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    _library._why_not_on_gpu.cache_clear()
    try:
        why = _library.why_no_kernel("attention", torch.device("cuda", 0))
    finally:
        _library._why_not_on_gpu.cache_clear()
    below = "compute capability 7.5, compiled for 8.0 and above"
    assert why == ("" if capability >= (8, 0) else below)


@pytest.mark.parametrize("device", ["cpu", "cudasim-forward", "cuda"], indirect=True)
def test_autocast_casts_as_sdpa_does(device):
    case = grid_case([(3, 5), (4, 6)], 4, 6, dtype=torch.float32, device=device)
    wide = case._replace(**{n: getattr(case, n).double() for n in ("q", "k", "v", "grad")})
    mixed = case._replace(q=case.q.half(), v=case.v.bfloat16())
    outcome = run(wide)
    with torch.autocast(device.type, torch.bfloat16):
        path = ops.backend("attention", *case[:3])[0]
        out = ops.attention(*case[:3], **case.padding)
        ours = run(case._replace(grad=case.grad.bfloat16()))
        assert ops.attention(*mixed[:3], **case.padding).dtype == torch.bfloat16
        assert_same_bits(run(wide), outcome)
    half = case._replace(**{n: getattr(case, n).bfloat16() for n in ("q", "k", "v", "grad")})
    assert path == ops.backend("attention", *half[:3])[0]
    assert out.dtype == torch.bfloat16
    assert_same_bits([*ours], [run(half).out, *(x.float() for x in run(half)[1:])])


@FUSED
def test_is_differentiable_once(device):
    case = attention_case(9, device=device)
    q = case.q.requires_grad_()
    out = ops.attention(q, case.k, case.v)
    (grad,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@SIMULATED
def test_sums_and_bits_have_no_gradient(device):
    case = attention_case(9, device=device)
    out, lse, keep = OPS.attention(case.q.requires_grad_(), *raw_arguments(case)[1:])
    assert out.requires_grad
    assert not lse.requires_grad
    assert keep.shape == (2, 2, 9, 0)
    scores = case.q.detach().double() @ case.k.double().mT * 32**-0.5
    assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-2)


@SIMULATED
def test_sums_of_padded_rows_are_of_nothing(device):
    case = grid_case([(3, 5), (0, 0)], 4, 6, device=device)
    lse = OPS.attention(*raw_arguments(case))[1]
    real = case.real()[0][:, None].expand_as(lse)
    assert_same_bits(lse == -torch.inf, ~real)
    q, k = (x.nan_to_num(0, 0, 0).double() for x in case[:2])
    scores = (q @ k.mT * 32**-0.5).masked_fill(~case.real()[1][:, None, None], -torch.inf)
    assert_close(lse[real].double(), scores.logsumexp(-1)[real], rtol=0, atol=1e-2)


def test_inputs_stay_as_they_are(device):
    case = grid_case([(3, 5), (0, 0)], 4, 6, device=device)
    tensors = [*case[:4], case.padding["key_rect"]]
    before = [x.clone() for x in tensors]
    run(case, dropout_p=0.5)
    assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


def test_use_reference_puts_the_reference_in_place():
    case = grid_case([(3, 5), (4, 6)], 4, 6, dtype=torch.float32)
    with ops.use_reference():
        twin = run(case)
        names = dispatched(lambda: ops.attention(*case[:3], **case.padding))
    assert_same_bits(twin, run(case, reference.attention))
    assert not any("scaled_dot_product" in name for name in names)


# ---- weights for pictures


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_those_of_attention(machine, monkeypatch, average):
    """With the identity as values, attention returns its weights; a few queries at a time."""
    module = sys.modules[ops.attention_weights.__module__]
    cases = [
        grid_case([(3, 5), (0, 0), (4, 6)], 4, 6, columns=24, device=machine, dtype=torch.float32),
        attention_case(5, 24, counts=(13, 0), columns=24, device=machine, dtype=torch.float32),
        attention_case(5, 24, columns=24, device=machine, dtype=torch.float32),
    ]
    for case in cases:
        identity = torch.eye(24, device=machine).expand_as(case.k)
        theirs = expected(case._replace(v=identity)).out
        theirs = theirs.mean(1) if average else theirs
        for most in (1 << 24, 700, 1):
            monkeypatch.setattr(module, "_MOST_SCORES", most)
            ours = ops.attention_weights(case.q, case.k, **case.padding, average=average)
            assert_close(ours, theirs.float())
    half = ops.attention_weights(case.q.half(), case.k.half())
    assert half.dtype == torch.float32
    assert not ops.attention_weights(case.q.requires_grad_(), case.k).requires_grad


def test_weights_of_nothing():
    for sizes in ((0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        images, heads, queries, keys = sizes
        case = attention_case(queries, keys, images=images, heads=heads)
        assert ops.attention_weights(*case[:2]).shape == (images, queries, keys)
