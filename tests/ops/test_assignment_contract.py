# SPDX-License-Identifier: Apache-2.0
"""What linear_sum_assignment promises to torch: opcheck, compile, capture, no sync, its errors."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.ops import linear_sum_assignment
from tests.ops.assignment_problems import by_scipy, problems


@pytest.fixture
def simulated():
    from tests.cudasim import simulated

    return simulated


OPTIONS = [(0, False, 0, []), (1, True, 1, []), (2, False, 2, [0.0, 1.0, 2.0])]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_passes_opcheck(machine, options):
    cost = problems("random", 2, 9, 4).to(machine)
    count = torch.tensor([4, 2], dtype=torch.int32, device=machine)
    op = torch.ops.detr_fast.linear_sum_assignment.default
    torch.library.opcheck(op, (cost, count, *options))
    torch.library.opcheck(op, (cost, None, *options))
    torch.library.opcheck(op, (cost.double()[:0], count[:0], *options))


def test_compiles_once_for_all_target_counts(machine):
    """In the graph of a loss over the assigned pairs; neither T nor the counts recompile it."""

    def loss(cost, count):
        query_of_target = linear_sum_assignment(cost, count, ties="scipy")
        chosen = cost.gather(1, query_of_target.clamp(min=0)[:, None]).squeeze(1)
        return chosen.where(query_of_target >= 0, 0).sum(-1)

    compiled = torch.compile(loss, fullgraph=True)
    for i, targets in enumerate((7, 8, 5, 12)):
        cost = problems("random", 3, 20, targets, seed=i).to(machine).requires_grad_()
        count = torch.tensor([targets, 2, targets - 1], device=machine)
        expected = loss(cost, count)
        torch._dynamo.mark_dynamic(cost, 2)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            assert_close(compiled(cost, count), expected)
        expected.sum().backward()
        assert cost.grad.count_nonzero() == count.sum()


def test_is_one_launch(simulated):
    with simulated() as simulator:
        for options in ({}, {"ties": "scipy"}, {"algorithm": "auction"}):
            before = simulator.counts()["launches"]
            linear_sum_assignment(problems("random", 5, 12, 4), **options)
            assert simulator.counts()["launches"] == before + 1


@pytest.mark.parametrize("options", [{}, {"ties": "scipy"}, {"algorithm": "auction"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_workspace_takes_what_shared_memory_cannot(simulated, options, dtype):
    """Blocks with all in shared memory, with costs in the workspace, with the state as well."""
    counts = [2, 25, 0, 40]
    for queries, targets in ((60, 40), (30, 40)):
        cost = problems("integers", 4, queries, targets, dtype=dtype)
        count = torch.tensor(counts)
        expected = linear_sum_assignment(cost, count, **options)
        for most in (5000, 3000, 1000):
            with simulated(schedule="random", max_shared_bytes=most):
                assert_close(linear_sum_assignment(cost, count, **options), expected)


@pytest.mark.parametrize("queries", [350, 430])
def test_shared_memory_beyond_48_kib(simulated, queries):
    cost = problems("random", 1, queries, 40)
    with simulated():
        assert_close(linear_sum_assignment(cost)[0], by_scipy(cost[0]))


def test_simulator_gives_the_answers_of_the_cpu_twin(simulated):
    """Not one optimum of several, but the same."""
    for queries, targets in ((50, 20), (20, 50), (36, 36)):
        cost = problems("integers", 3, queries, targets)
        expected = linear_sum_assignment(cost)
        with simulated(schedule="random"):
            assert_close(linear_sum_assignment(cost), expected)


def test_is_no_part_of_a_graph(device):
    cost = problems("random", 2, 9, 4).to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        result = linear_sum_assignment(cost)
    assert not result.requires_grad
    assert_close(result, linear_sum_assignment(cost.detach()))


def test_equals_the_reference(device):
    cost, count = problems("random", 3, 9, 6).to(device), torch.tensor([6, 0, 3], device=device)
    assert_close(linear_sum_assignment(cost, count), reference.linear_sum_assignment(cost, count))
    with ops.use_reference():
        assert_close(
            linear_sum_assignment(cost), reference.linear_sum_assignment(cost, ties="scipy")
        )


BAD_OPTIONS = {
    "algorithm": ({"algorithm": "hungarian"}, "algorithm: expected one of 'auto', .*'hungarian'"),
    "ties": ({"ties": "lapjv"}, "ties: expected one of 'any', 'scipy', got 'lapjv'"),
    "non_finite": ({"non_finite": "zero"}, "non_finite: expected one of .*, got 'zero'"),
    "both": ({"algorithm": "auction", "ties": "scipy"}, 'does not know .* use "shortest_path"'),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_names_a_bad_option(options, message):
    with pytest.raises(ValueError, match=message):
        linear_sum_assignment(torch.zeros(1, 2, 2), **options)


COST, COUNT = torch.zeros(2, 3, 4), torch.zeros(2)
BAD = {
    "dims": (COST[0], COUNT, {}, r"cost: expected shape \(\*, \*, \*\), got \(3, 4\)"),
    "integer": (COST.int(), COUNT, {}, r"cost: expected dtype Float or Double, got Int; call"),
    "count": (COST, COUNT[:1], {}, r"count: expected shape \(2,\), got \(1,\)"),
    "nan": (COST, COUNT, {"non_finite": (torch.nan, 0.0, 0.0)}, "numbers of float32 or inf, got"),
    "low": (COST, COUNT, {"non_finite": (0.0, 0.0, -1e39)}, "numbers of float32 or inf, got -1e"),
    "few": (COST, COUNT, {"non_finite": (0.0, 0.0)}, "what replaces NaN, .inf and -inf, got 2"),
}


@pytest.mark.parametrize(("cost", "count", "options", "message"), BAD.values(), ids=BAD)
def test_names_bad_input(device, cost, count, options, message):
    with pytest.raises(RuntimeError, match=message):
        linear_sum_assignment(cost.to(device), count.to(device), **options)


@pytest.mark.parametrize("ties", ["any", "scipy"])
def test_names_the_problem_without_a_result(ties):
    cost = torch.rand(4, 3, 2)
    cost[2, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="problem 2 of 4: matching cost not finite"):
        linear_sum_assignment(cost, ties=ties)
    cost[2, :, 1] = torch.inf
    with pytest.raises(ValueError, match="problem 2 of 4: no assignment has a finite cost"):
        linear_sum_assignment(cost, ties=ties)


def test_does_not_wait_for_the_gpu(gpu):
    cost, count = problems("random", 4, 900, 60).to(gpu), torch.tensor([60, 3, 0, 9]).to(gpu)
    linear_sum_assignment(cost, count)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, {"ties": "scipy"}, {"algorithm": "auction"}):
            linear_sum_assignment(cost, count, **options)
        linear_sum_assignment(cost)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_is_captured_in_a_graph(gpu):
    """Replays follow the costs and the counts."""
    cost, count = problems("random", 4, 100, 20).to(gpu), torch.tensor([20, 3, 0, 9]).to(gpu)
    count = count.int()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        linear_sum_assignment(cost, count)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = linear_sum_assignment(cost, count)
    torch.cuda.current_stream().wait_stream(stream)
    for seed in (1, 2):
        cost.copy_(problems("random", 4, 100, 20, seed=seed))
        count.copy_(count.flip(0))
        graph.replay()
        assert_close(captured, linear_sum_assignment(cost, count))
