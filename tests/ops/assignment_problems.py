# SPDX-License-Identifier: Apache-2.0
"""Assignment problems, random and adversarial, and the check of a result against scipy."""

import torch
from scipy.optimize import linear_sum_assignment as scipy_solve


def scale(cost, generator):
    """Each cost by a power of ten of its own between 1e-6 and 1e6."""
    return cost * 10 ** (12 * torch.rand(cost.shape, generator=generator) - 6)


def collapsed(cost, generator):
    """Queries that differ by little: every target wants the same ones."""
    return cost[..., :1, :] * 100 + 1e-2 * torch.rand(cost.shape, generator=generator)


def repeated(cost, _):
    """Each target three times."""
    targets = cost.shape[-1]
    return cost[..., torch.arange(targets) % max(1, (targets + 2) // 3)]


def forbidden(cost, generator):
    """A third of the pairs; those on the diagonal stay, so that there is an assignment."""
    mask = torch.rand(cost.shape, generator=generator) < 1 / 3
    mask.diagonal(0, 1, 2).fill_(False)
    return cost.masked_fill(mask, torch.inf)


KINDS = {
    "random": lambda cost, _: cost,
    "integers": lambda cost, _: (2 * cost).round(),
    "equal": lambda cost, _: torch.full_like(cost, 0.1),
    "repeated": repeated,
    "same targets": lambda cost, _: cost[..., :1].expand_as(cost).clone(),
    "collapsed": collapsed,
    "same queries": lambda cost, _: cost[..., :1, :].expand_as(cost).clone(),
    "small": lambda cost, _: 1e-6 * cost,
    "large": lambda cost, _: 1e6 * cost,
    "mixed": scale,
    "huge": lambda cost, _: 3e38 * cost.clamp(-1, 1),
    "forbidden": forbidden,
}


def problems(kind, problems, queries, targets, seed=0, dtype=torch.float32):
    """Costs (P, Q, T) of a kind."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(problems, queries, targets, generator=generator, dtype=torch.float64)
    return KINDS[kind](cost, generator).to(dtype)


def by_scipy(cost):
    """(Q, T) -> the query of each target, as scipy finds it."""
    query_of_target = torch.full((cost.shape[1],), -1)
    queries, targets = scipy_solve(cost.double().numpy())
    query_of_target[torch.from_numpy(targets)] = torch.from_numpy(queries)
    return query_of_target


def total(cost, query_of_target):
    """Sum of the costs of an assignment in float64, and of their magnitudes."""
    targets = (query_of_target >= 0).nonzero().squeeze(1)
    chosen = cost[query_of_target[targets], targets].double()
    return chosen.sum().item(), chosen.abs().sum().item()


def excess(cost, query_of_target):
    """What an assignment of a problem (Q, T) costs more than scipy's, and scipy's |cost|.

    Fails if it is no assignment, or has other indices than scipy's, the optimum being unique: two
    assignments are both optimal if their costs are equal but for the rounding of the sums.
    """
    expected = by_scipy(cost)
    used = query_of_target[query_of_target >= 0]
    assert len(used) == len(used.unique()) == min(cost.shape)
    assert used.numel() == 0 or used.max() < cost.shape[0]
    (ours, _), (theirs, magnitude) = total(cost, query_of_target), total(cost, expected)
    if not torch.equal(query_of_target, expected):
        assert abs(ours - theirs) <= 1e-12 * magnitude, "not the unique optimum"
    return ours - theirs, magnitude


def needs_augmentation(cost):
    """Whether two rows of (Q, T), the short side, have their first least cost in one column."""
    rows = cost.t() if cost.shape[1] < cost.shape[0] else cost
    if rows.numel() == 0:
        return False
    wishes = rows.argmin(1)
    return len(wishes.unique()) < len(wishes)
