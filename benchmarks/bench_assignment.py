# SPDX-License-Identifier: Apache-2.0
"""The assignment alone: all solvers on the same costs, in one call or problem by problem.

Ragged problems are those of six layers and 16 images, at the sizes of DETR, Deformable DETR and
DINO; uniform ones have no padding, some as many targets as queries, where an auction might win.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Missing, Setup, optional, within
from benchmarks.problems import random_batch, scipy_solver, total_costs
from detr_fast import ops, reference

SIZES = [(100, 7), (300, 20), (900, 50)]
KINDS = ["fresh", "collapsed"]
RANDOM = [(1, 100, 7), (208, 300, 100), (8, 100, 100), (8, 300, 300)]
MOST_ON_CPU = 32  # problems: some peers take a second for more
TOTALS = within(rtol=1e-6, atol=1e-5)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases; with `quick` the smallest of each kind."""
    result = []
    for queries, targets in SIZES[:1] if quick else SIZES:
        for kind in KINDS[:1] if quick else KINDS:
            build = functools.partial(ragged, device, queries, targets, kind)
            result.append(Case(f"96 problems {queries}x{targets}, {kind}", build, TOTALS))
    for problems, queries, targets in RANDOM[:1] if quick else RANDOM:
        problems = min(problems, MOST_ON_CPU) if device.type == "cpu" else problems
        build = functools.partial(uniform, device, problems, queries, targets)
        result.append(Case(f"{problems} problems {queries}x{targets}, random", build, TOTALS))
    return result


def test_assignment(case, bench):
    bench(case)


def ragged(device: torch.device, queries: int, targets: int, kind: str) -> Setup:
    """The matching costs of a batch."""
    batch = random_batch(device, 6, 16, queries, targets, kind)
    return solvers(batch.costs(), batch.counts())


def uniform(device: torch.device, problems: int, queries: int, targets: int) -> Setup:
    """Costs that are uniform in [0, 1), of one size."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(problems, queries, targets, generator=generator).to(device)
    return solvers(cost, torch.full((problems,), targets, dtype=torch.int32, device=device))


def solvers(cost: Tensor, count: Tensor) -> Setup:
    """(P, Q, T), (P,) -> (P, T); the totals have to agree, as optima may differ at ties."""

    def contender(solve: Callable | Missing, **options: Any) -> Contender | Missing:
        if isinstance(solve, Missing):
            return solve
        run = functools.partial(solve, cost, count)
        return Contender(run, lambda: total_costs(cost, run()), **options)

    ours = ops.linear_sum_assignment
    return Setup(
        expected=lambda: total_costs(cost, reference.linear_sum_assignment(cost, count)),
        contenders={
            "detr_fast": contender(ours),
            "scipy's ties": contender(functools.partial(ours, ties="scipy")),
            "auction": contender(functools.partial(ours, algorithm="auction")),
            "scipy": contender(one_by_one(scipy_solver()), waits=True),
            "lapx": contender(one_by_one(lapx_solver()), waits=True),
            "torch-linear-assignment": contender(torch_linear_assignment(), waits=True),
        },
    )


def one_by_one(solve: Callable | Missing) -> Callable | Missing:
    """One copy to the host, then a solver of one numpy problem (Q, n) -> queries, targets."""
    if isinstance(solve, Missing):
        return solve

    def run(cost: Tensor, count: Tensor) -> Tensor:
        host = cost.cpu().numpy()
        found = torch.full((cost.shape[0], cost.shape[2]), -1)
        for problem, n in enumerate(count.tolist()):
            queries, targets = solve(host[problem, :, :n])
            found[problem, torch.as_tensor(targets)] = torch.as_tensor(queries)
        return found.to(cost.device)

    return run


def lapx_solver() -> Callable | Missing:
    lap = optional("lap")
    if isinstance(lap, Missing):
        return lap

    def solve(cost: Any) -> tuple[Any, Any]:
        _, target_of_query, _ = lap.lapjv(cost.astype("float64"), extend_cost=True)
        queries = (target_of_query >= 0).nonzero()[0]
        return queries, target_of_query[queries].astype("int64")

    return solve


def torch_linear_assignment() -> Callable | Missing:
    module = optional("torch_linear_assignment")
    if isinstance(module, Missing):
        return module

    def run(cost: Tensor, count: Tensor) -> Tensor:  # problems of one size at a time
        found = torch.full((cost.shape[0], cost.shape[2]), -1, device=cost.device)
        counts = count.tolist()
        for n in sorted(set(counts)):
            rows = torch.tensor([p for p, c in enumerate(counts) if c == n], device=cost.device)
            part = cost[rows, :, :n].transpose(1, 2).contiguous()
            found[rows, :n] = module.batch_linear_assignment(part)
        return found

    return run
