# SPDX-License-Identifier: Apache-2.0
"""linear_sum_assignment against scipy: values, ties, dtypes, layouts, counts, non-finite costs."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from detr_fast import reference
from detr_fast.ops import MatchStatus, linear_sum_assignment
from tests.ops.assignment_problems import KINDS, by_scipy, excess, problems

TIES = ["any", "scipy"]
# queries, targets: of a warp more and fewer, either side longer, as many, none
SHAPES = [(1, 1), (9, 4), (4, 9), (70, 13), (13, 70), (33, 33), (100, 7), (5, 0), (0, 5), (0, 0)]
NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("kind", KINDS)
def test_is_optimal(device, kind, ties):
    for queries, targets in SHAPES:
        cost = problems(kind, 3, queries, targets, seed=queries)
        result = linear_sum_assignment(cost.to(device), ties=ties).cpu()
        assert result.shape == (3, targets)
        assert result.dtype == torch.int64
        for problem, found in zip(cost, result, strict=True):
            more, magnitude = excess(problem, found)
            assert abs(more) <= 1e-12 * magnitude
            if ties == "scipy":
                assert_close(found, by_scipy(problem))


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_takes_dtypes(device, dtype, ties):
    """Those below float32 have many ties."""
    for queries, targets in [(40, 12), (12, 40), (20, 20)]:
        cost = problems("random", 2, queries, targets, dtype=dtype)
        result = linear_sum_assignment(cost.to(device), ties=ties).cpu()
        for problem, found in zip(cost, result, strict=True):
            more, magnitude = excess(problem, found)
            assert abs(more) <= 1e-12 * magnitude
            if ties == "scipy":
                assert_close(found, by_scipy(problem))


def test_float64_is_not_rounded(device):
    """Costs that float32 takes for equal."""
    cost = 1 + 1e-12 * problems("random", 2, 20, 8, dtype=torch.float64)
    for problem, found in zip(cost, linear_sum_assignment(cost.to(device)).cpu(), strict=True):
        assert_close(found, by_scipy(problem))


def shortest_paths(cost, dtype):
    """The column of each row, with duals and path lengths of a dtype; the plainest form."""
    cost, (rows, columns) = cost.astype(dtype), cost.shape
    row_dual, column_dual = np.zeros(rows, dtype), np.zeros(columns, dtype)
    column_of_row, row_of_column = np.full(rows, -1), np.full(columns, -1)
    for start in range(rows):
        length, path = np.full(columns, np.inf, dtype), np.full(columns, -1)
        settled = np.zeros(columns, bool)
        row, reached = start, dtype(0)
        while True:
            over_row = reached + cost[row] - row_dual[row] - column_dual
            shorter = ~settled & (over_row < length)
            length[shorter], path[shorter] = over_row[shorter], row
            column = np.where(settled, np.inf, length).argmin()
            reached, row = length[column], row_of_column[column]
            if row == -1:
                break
            settled[column] = True
        row_dual[start] += reached
        row_dual[row_of_column[settled]] += reached - length[settled]
        column_dual[settled] -= reached - length[settled]
        while row != start:
            row = row_of_column[column] = path[column]
            column_of_row[row], column = column, column_of_row[row]
    return column_of_row


def test_float32_duals_would_not_do(device):
    """Two targets are near to no query but one, so that duals become large beside all others."""
    cost = torch.rand(8, 6, 6, generator=torch.Generator().manual_seed(0))
    cost[:, 1:, :2] += 3e7
    result = linear_sum_assignment(cost.to(device)).cpu()
    losses = {np.float32: [], np.float64: []}
    for problem, found in zip(cost, result, strict=True):
        more, _ = excess(problem, found)
        assert abs(more) < 1e-6  # of an optimum of 3e7
        for dtype, loss in losses.items():
            twin = torch.from_numpy(shortest_paths(problem.t().numpy(), dtype))
            loss.append(excess_of_any(problem, twin))
    assert max(losses[np.float32]) > 0.1
    assert max(losses[np.float64]) < 1e-6


def excess_of_any(cost, query_of_target):
    targets = torch.arange(cost.shape[1])
    ours, best = (cost[q, targets].double().sum().item() for q in (query_of_target, by_scipy(cost)))
    return ours - best


@pytest.mark.parametrize("ties", TIES)
def test_reads_any_layout(device, ties):
    cost = problems("random", 4, 20, 9).to(device)
    count = torch.tensor([9, 0, 4, 7], dtype=torch.int32, device=device)
    plain = linear_sum_assignment(cost, count, ties=ties)
    wide = cost.new_full((4, 41, 30), NAN)
    wide[:, 1::2, 3:30:3] = cost
    layouts = [
        cost.mT.contiguous().mT,
        cost.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        wide[:, 1::2, 3:30:3],
    ]
    for layout in layouts:
        assert not layout.is_contiguous()
        assert_close(linear_sum_assignment(layout, count, ties=ties), plain)
    sparse_count = count.repeat_interleave(2)[::2]
    assert_close(linear_sum_assignment(cost, sparse_count, ties=ties), plain)
    assert_close(linear_sum_assignment(cost, count.long(), ties=ties), plain)
    one = cost[:1].expand(4, -1, -1)
    assert_close(linear_sum_assignment(one, count, ties=ties)[0], plain[0])


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("queries", [4, 20])
def test_does_not_read_padding(device, queries, ties):
    """Counts also beyond both ends."""
    counts = [9, 0, 4, 5, -3, 12]
    cost = problems("random", len(counts), queries, 9)
    expected = torch.full((len(counts), 9), -1)
    for problem, n, row in zip(cost, counts, expected, strict=True):
        n = min(max(n, 0), 9)
        problem[:, n:] = NAN
        row[:n] = by_scipy(problem[:, :n])
    result = linear_sum_assignment(cost.to(device), torch.tensor(counts).to(device), ties=ties)
    assert_close(result.cpu(), expected)


def statuses(cost, device, ties="any", policy=0, replacement=()):
    """Raw results: assignments and status words."""
    count = torch.full(cost.shape[:1], cost.shape[2], dtype=torch.int32, device=device)
    op = torch.ops.detr_fast.linear_sum_assignment.default
    result = op(cost.to(device), count, 0, ties == "scipy", policy, replacement)
    return [r.cpu() for r in result]


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize(("queries", "targets"), [(6, 3), (3, 6), (4, 4)])
def test_status_tells_what_is_wrong(device, queries, targets, ties):
    """And the other problems of the batch do not care."""
    cost = problems("random", 6, queries, targets)
    good = statuses(cost, device, ties)[0]
    cost[1, 0, 1], cost[2, 2, 2] = NAN, -INF
    cost[3], cost[4, 0, 0] = INF, INF
    found, status = statuses(cost, device, ties)
    bad = int(MatchStatus.EXTRA_COST)
    assert status.tolist() == [0, bad, bad, int(MatchStatus.INFEASIBLE), 0, 0]
    assert_close(found[[0, 5]], good[[0, 5]])
    assert found[1:4].eq(-1).all()
    assert_close(found[4], by_scipy(cost[4]))


@pytest.mark.parametrize("ties", TIES)
def test_infinity_forbids_too_many_pairs(device, ties):
    """Three targets and two queries that they may have; one finds out in the last augmentation."""
    cost = torch.full((1, 6, 3), INF)
    cost[0, 1:3] = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    found, status = statuses(cost, device, ties)
    assert status.item() == MatchStatus.INFEASIBLE
    assert found.eq(-1).all()


@pytest.mark.parametrize("policy", ["worst", (1.0, 3.4028234663852886e38, -7.0), (0.5, INF, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_replaces_what_is_not_finite(device, policy, dtype):
    generator = torch.Generator().manual_seed(0)
    for queries, targets in [(20, 7), (7, 20), (9, 9), (40, 35)]:
        cost = problems("random", 4, queries, targets, dtype=dtype)
        for value in (NAN, INF, -INF):
            cost[1:][torch.rand(cost[1:].shape, generator=generator) < 0.03] = value
        cost[2] -= 100  # the worst cost is 1 + 100 + 0
        count = torch.tensor([targets, targets, targets - 2, targets])
        expected = reference.linear_sum_assignment(cost, count, non_finite=policy)
        result = linear_sum_assignment(
            cost.to(device), count.to(device), ties="scipy", non_finite=policy
        )
        assert_close(result.cpu(), expected)


def test_worst_costs_more_than_anything_finite(device):
    cost = torch.tensor([[[NAN, -5.0], [-INF, -6.0], [-1.0, INF]]])
    assert linear_sum_assignment(cost.to(device), non_finite="worst").tolist() == [[2, 1]]


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("policy", [0, 1, 2])
def test_any_bits_come_to_an_end(device, policy, ties):
    """Random bit patterns: NaN, infinity, denormal and huge numbers; the result is one or none."""
    generator = torch.Generator().manual_seed(policy)
    for dtype, width in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        bits = torch.randint(-(2**31), 2**31, (12, 11, 9), generator=generator)
        cost = (bits * 0x100000001).to(width).view(dtype)
        cost[::2] = cost[::2].nan_to_num(0)
        found, status = statuses(cost, device, ties, policy, [0.0, INF, -1.0])
        assert {*status.tolist()} <= {0, 8, 64}
        assert (status == 0).any()
        for row, state in zip(found, status, strict=True):
            used = row[row >= 0]
            assert len(used.unique()) == len(used) == (9 if state == 0 else 0)
            assert (row < 11).all()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "forbidden"])
def test_auction_keeps_its_bound(device, kind):
    for queries, targets in [(30, 7), (7, 30), (20, 20), (33, 30), (1, 1), (5, 0), (0, 3)]:
        cost = problems(kind, 2, queries, targets)
        result = linear_sum_assignment(cost.to(device), algorithm="auction").cpu()
        for problem, found in zip(cost, result, strict=True):
            assert len(found[found >= 0].unique()) == min(queries, targets)
            if problem.numel() == 0:
                continue
            spread = (problem.max().double() - problem.min()).item()
            targets_found = (found >= 0).nonzero().squeeze(1)
            ours = problem[found[targets_found], targets_found].double()
            best = by_scipy(problem)
            best_targets = (best >= 0).nonzero().squeeze(1)
            best = problem[best[best_targets], best_targets].double()
            assert ours.sum() - best.sum() <= min(queries, targets) * 1e-7 * spread + 1e-12 * (
                best.abs().sum()
            )


def test_auction_leaves_what_it_cannot_do_to_the_shortest_path(device):
    """Forbidden pairs, and the price war of three targets for two queries that are far better."""
    forbidden = problems("forbidden", 3, 20, 8)
    war = torch.rand(3, 20, 8, generator=torch.Generator().manual_seed(0))
    war[:, 2:] += 1e5
    for cost in (forbidden, war):
        result = linear_sum_assignment(cost.to(device), algorithm="auction").cpu()
        for problem, found in zip(cost, result, strict=True):
            finite = problem[problem.isfinite()]
            bound = 8 * 1e-7 * (finite.max() - finite.min()).item()
            assert excess_of_any(problem, found) <= bound


def test_batch_does_not_depend_on_the_number_of_threads():
    cost = problems("integers", 200, 30, 9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = linear_sum_assignment(cost)
        torch.set_num_threads(3)
        assert_close(linear_sum_assignment(cost), alone)
    finally:
        torch.set_num_threads(threads)
