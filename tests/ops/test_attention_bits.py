# SPDX-License-Identifier: Apache-2.0
"""Fused attention: an image's bits do not depend on batch, padding, repetition or stream."""

import pytest
import torch

from detr_fast import ops
from tests.ops.attention_cases import (
    FUSED,
    HALVES,
    Case,
    Outcome,
    assert_same_bits,
    attention_case,
    grid_case,
    next_seed,
    run,
)

RECTS = [(3, 5), (9, 2), (9, 15), (0, 3)]


def cut(tensor, rect, width):
    """The real rows of a tensor (1, H, L, D) of a grid that is ``width`` wide."""
    h, w = rect
    return tensor.unflatten(2, (-1, width))[:, :, :h, :w].flatten(2, 3)


def of_image(values, image, rect, width):
    return [cut(x[image : image + 1], rect, width) for x in values]


@FUSED
@HALVES
def test_an_image_is_the_same_alone_and_in_any_batch(device, dtype):
    case = grid_case(RECTS, 9, 15, heads=1, dtype=dtype, device=device)
    ours = run(case)
    for image, rect in enumerate(RECTS):
        size = torch.tensor([rect], dtype=torch.int32, device=device)
        padding = {"query_rect": size, "key_rect": size, "padded_width": max(rect[1], 1)}
        alone = run(Case(*of_image(case[:4], image, rect, 15), padding, 0.0))
        assert_same_bits(list(alone), of_image(ours, image, rect, 15))


@FUSED
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("queries", [7, None])
def test_padding_does_not_matter(device, dropout_p, queries):
    """Nor does it to dropout: its bits belong to real rows."""
    rects, own = [(5, 7), (4, 9)], queries is None
    height, width = 5, 9
    small = attention_case(
        *(height * width if own else queries, height * width),
        **dict(rects=rects, query_rects=own, padded_width=width, heads=1),
        device=device,
        dropout_p=dropout_p,
    )
    big = {"rects": rects, "query_rects": own, "padded_width": 16, "heads": 1}
    big = attention_case(11 * 16 if own else queries, 11 * 16, **big, device=device)
    sides = ("q", "grad") if own else ()
    for name in ("k", "v", *sides):
        cells = getattr(big, name).unflatten(2, (11, 16))
        cells[:, :, :height, :width] = getattr(small, name).unflatten(2, (height, width))
    big = big._replace(dropout_p=dropout_p)
    if not own:
        big = big._replace(q=small.q, grad=small.grad)
    outcomes = []
    for case in (small, big):
        next_seed(device)
        outcomes.append(run(case))
    for name, few, many in zip(Outcome._fields, *outcomes, strict=True):
        if own or name in "kv":
            many = many.unflatten(2, (11, 16))[:, :, :height, :width].flatten(2, 3)
        assert_same_bits(few, many)


@FUSED
def test_counted_keys_are_the_same_as_fewer_keys(device):
    case = attention_case(20, 70, counts=(70, 33, 1), heads=1, device=device)
    ours = run(case)
    for image, count in enumerate((70, 33, 1)):
        one = [x[image : image + 1] for x in case[:4]]
        alone = Case(one[0], one[1][:, :, :count], one[2][:, :, :count], one[3], {}, 0.0)
        for mine, its in zip(run(alone), ours, strict=True):
            assert_same_bits(mine, its[image : image + 1, :, : mine.shape[2]])


@FUSED
def test_every_row_real_is_no_padding(device):
    case = grid_case([(9, 15), (9, 15)], 9, 15, heads=1, device=device)
    assert_same_bits(run(case), run(case._replace(padding={})))


@FUSED
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_is_the_same_every_time(device, dropout_p):
    times, heads = (50, 8) if device.type == "cuda" else (2, 1)
    case = grid_case(RECTS, 9, 15, heads=heads, device=device, dropout_p=dropout_p)
    next_seed(device)
    first = run(case)
    for _ in range(times):
        next_seed(device)
        assert_same_bits(run(case), first)


def test_does_not_depend_on_the_schedule(request, needs_simulator):
    from tests.cudasim import simulated

    outcomes = []
    for schedule in ("forward", "random"):
        with simulated(schedule=schedule):
            next_seed("cpu")
            outcomes.append(run(grid_case([(5, 14), (2, 9)], 5, 15, heads=1, dropout_p=0.1)))
    assert_same_bits(*outcomes)


def step(case):
    """Result and gradients by operations that do not touch the host."""
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    out = ops.attention(*leaves, **case.padding, dropout_p=case.dropout_p)
    return out.detach(), *torch.autograd.grad(out, leaves, case.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_waits_for_nothing_and_replays_in_a_graph(gpu, dtype):
    """Captured once on a stream of its own, for what stands in the tensors when it is replayed."""
    case = grid_case([(20, 30), (25, 34)], 25, 34, heads=8, dtype=dtype, device=gpu)
    step(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case)
        step(case._replace(dropout_p=0.1))
        with torch.cuda.stream(stream):
            step(case)
            with torch.cuda.graph(graph, stream=stream):
                captured = step(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    other = grid_case([(25, 34), (3, 7)], 25, 34, heads=8, dtype=dtype, device=gpu, seed=1)
    case.padding["key_rect"].copy_(other.padding["key_rect"])
    for mine, its in zip(case[:4], other[:4], strict=True):
        mine.copy_(its)
    graph.replay()
    torch.testing.assert_close(captured, step(other), rtol=0, atol=0)


def test_a_graph_draws_other_weights_at_every_replay(gpu):
    case = attention_case(300, heads=8, device=gpu, dropout_p=0.5)
    step(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, *_ = step(case)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(out.clone())
    assert not torch.equal(*replays)


def test_is_the_same_on_a_stream_beside_others(gpu):
    cases = [grid_case(RECTS, 9, 15, heads=8, device=gpu, seed=i) for i in range(8)]
    alone = [run(case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    outcomes = []
    for stream, case in zip(streams, cases, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outcomes.append(run(case))
    torch.cuda.synchronize()
    assert_same_bits(outcomes, alone)


def test_is_deterministic_where_torch_asks_for_it(gpu):
    case = attention_case(200, heads=8, device=gpu)
    ours = run(case)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(run(case), ours)
    finally:
        torch.use_deterministic_algorithms(before)


def test_memory_is_that_of_inputs_and_outputs(gpu):
    """No matrix of scores: 4097 rows of 8 heads would have 268 MB of them."""
    case = attention_case(4097, images=1, heads=8, device=gpu)
    one = case.q.numel() * 2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(case)
    assert torch.cuda.max_memory_allocated() - before < 8 * one
