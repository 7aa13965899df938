# SPDX-License-Identifier: Apache-2.0
"""Fuzzes the matching kernels: ``python -m tests.ops.fuzz_matcher --minutes 30``.

Draws shapes, dtypes, strides, counts, options and non-finite values, runs the CUDA kernels on the
simulator, under its checker and in random schedules, and compares with the reference twins: status
or error, a valid assignment, its cost, and of ``linear_sum_assignment`` with ``ties="scipy"`` the
very indices.  A failure
prints the seed that repeats it: ``--seed N --cases 1``.  Exits with 1 if a case failed.
"""

import argparse
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.data import Targets
from detr_fast.reference.boxes import at_least_float32
from detr_fast.reference.matcher import matching_cost, matching_cost_terms, replace_non_finite
from tests.cudasim import simulated

DTYPES = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
POLICIES = ["error", "error", "worst", (1.0, 3e38, -3e38), (0.0, 0.0, 0.0)]
SHARED_BYTES = [232448, 8192]  # of an H100, and so few that costs and state go to a workspace
NON_FINITE = [math.nan, math.inf, -math.inf]


class Draw(random.Random):
    """The arguments of one case, all from its seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def size(self, most: int) -> int:
        """Small sizes, and those around the width of a warp, are more likely."""
        return min(most, self.choice([1, 2, 31, 32, 33, self.randint(0, 9), self.randint(0, most)]))

    def values(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Normal numbers, at times huge, tiny, of few values or all 0, in some layout."""
        values = torch.randn(*shape, generator=self.torch, dtype=torch.float64)
        kind = self.choice(["normal", "normal", "grid", "zero", "scaled"])
        values = values.round() if kind == "grid" else values * (kind != "zero")
        return self.layout((values * 10.0 ** (self.randint(-4, 4) * (kind == "scaled"))).to(dtype))

    def layout(self, values: Tensor) -> Tensor:
        """The same shape with gaps, transposed or expanded over its first dimension."""
        kind = self.choice(["dense", "gaps", "transposed", "expanded"])
        if kind == "gaps":
            return torch.stack([values, values.flip(0)], -1)[..., 0]
        if kind == "transposed":
            return values.mT.contiguous().mT
        if kind == "expanded" and len(values) > 0:
            return values[:1].expand_as(values)
        return values

    def spoil(self, values: Tensor, chance: float) -> Tensor:
        """NaN or infinity in a few places."""
        if values.numel() == 0 or self.random() > chance:
            return values
        values = values.clone()
        for _ in range(self.randint(1, 3)):
            values[tuple(map(self.randrange, values.shape))] = self.choice(NON_FINITE)
        return values


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, None for a ValueError."""
    try:
        return call()
    except ValueError:
        return None


def assignment(draw: Draw) -> str:
    """One call of ``linear_sum_assignment``; tells what was drawn."""
    problems, queries, targets = draw.size(4), draw.size(70), draw.size(50)
    dtype, ties = draw.choice(DTYPES), draw.choice(["any", "scipy"])
    cost = draw.spoil(draw.values(problems, queries, targets, dtype=dtype), 0.3)
    counts = [draw.randint(0, targets) for _ in range(problems)]
    count, policy = torch.tensor(counts, dtype=torch.int32), draw.choice(POLICIES)
    algorithm = draw.choice(["auto", "shortest_path"] + ["auction"] * (ties == "any"))
    options = {"ties": ties, "non_finite": policy, "algorithm": algorithm}

    expected = outcome(lambda: reference.linear_sum_assignment(cost, count, **options))
    found = outcome(lambda: ops.linear_sum_assignment(cost, count, **options))
    assert (found is None) == (expected is None), f"refused: {found is None}, by the reference: no"
    if found is None:
        return "assignment refused"
    if ties == "scipy":
        assert_close(found, expected, rtol=0, atol=0)
    for problem, n in enumerate(counts):
        read = replace_non_finite(at_least_float32(cost[problem, :, :n]), policy).double()
        ours, theirs = (pairs_of(f[problem], n, queries) for f in (found, expected))
        allowed = 1e-6 * read[theirs].abs().sum() + 1e-12
        if algorithm == "auction":
            finite = read.nan_to_num(posinf=0).abs().flatten().tolist()
            allowed += 1e-6 * len(theirs[0]) * max(finite, default=0)
        assert (read[ours].sum() - read[theirs].sum()).abs() <= allowed
    return f"assignment {algorithm}, ties {ties}"


def pairs_of(query_of_target: Tensor, n: int, queries: int) -> tuple[Tensor, Tensor]:
    """Queries and targets of one problem, after a check that they are an assignment."""
    targets = (query_of_target >= 0).nonzero().flatten()
    chosen = query_of_target[targets]
    assert (query_of_target[n:] == -1).all()
    assert (chosen < queries).all()
    assert len(chosen.unique()) == len(chosen) == min(n, queries)
    return chosen, targets


def match(draw: Draw) -> str:
    """One call of ``hungarian_match``; tells what was drawn."""
    images, groups, repeat = draw.randint(1, 3), draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2])
    queries = [groups * draw.randint(1, 40) for _ in range(draw.randint(1, 3))]
    columns, dtype = draw.randint(1, 12), draw.choice(DTYPES)
    listed = [
        targets_of(draw, draw.choice([0, draw.randint(0, 12)]), columns) for _ in range(images)
    ]
    targets = Targets.from_list(listed)
    width, spoilt = targets.labels.shape[1], draw.choice([0.0, 0.0, 0.3])
    for image, n in enumerate(targets.count_host):  # padding is not read
        targets.boxes[image, n:] = math.nan
        targets.labels[image, n:] = 10**9
    logits = [draw.spoil(draw.values(images, q, columns, dtype=dtype), spoilt) for q in queries]
    boxes = [
        draw.spoil(draw.layout(torch.rand(images, q, 4, generator=draw.torch).to(dtype)), spoilt)
        for q in queries
    ]
    extra = [draw.spoil(draw.values(images, q, width, dtype=dtype), spoilt) for q in queries]
    weights = ops.CostWeights(*(draw.choice([0, 1, 2.5]) for _ in range(3)))
    kind = draw.choice(["softmax", "focal", "focal_logits", "iou_aware"])
    with_extra = not any(weights) or draw.random() < 0.3
    ties = draw.choice(["any", "scipy"])
    options = {
        "groups": groups,
        "repeat": repeat,
        "extra_cost": extra if with_extra else None,
        "ties": ties,
        "non_finite": draw.choice(POLICIES),
    }
    class_cost = ops.ClassCost(kind, gamma=draw.choice([2.0, 1.5]))
    arguments = logits, boxes, targets, weights, class_cost

    expected = outcome(lambda: reference.hungarian_match(*arguments, **options))
    found = outcome(lambda: ops.hungarian_match(*arguments, **options))
    assert (found is None) == (expected is None or bool(expected.status.any() and refuses(options)))
    if found is None:
        return "match refused"
    assert_close(found.status, expected.status, rtol=0, atol=0)
    check_indices(found, width)
    assert (found.query_of_target >= 0).sum() == (expected.query_of_target >= 0).sum()
    for layer, (x, b, e) in enumerate(zip(logits, boxes, extra, strict=True)):
        terms = matching_cost_terms(x, b, targets.labels, targets.boxes, weights, class_cost)
        cost = matching_cost(terms, weights, e.to(found.cost.dtype) if with_extra else None)
        check_costs(cost, layer, found, expected, options["non_finite"])
    return f"match {kind}, ties {ties}"


def check_indices(match: ops.Match, width: int) -> None:
    """Each target has queries of its own, in its group; both maps tell the same."""
    counts, queries, groups, repeat = match.sizes
    for (layer, size), (image, n) in product(enumerate(queries), enumerate(counts)):
        of_targets = match.query_of_target[layer, image].view(groups, repeat, width)
        assert (of_targets[..., n:] == -1).all()
        of_queries = torch.full_like(match.target_of_query[layer, image], -1)
        for group, part in enumerate(of_targets):
            _, target = (part >= 0).nonzero(as_tuple=True)
            chosen = part[part >= 0]
            assert (chosen // (size // groups) == group).all()
            assert len(chosen.unique()) == len(chosen)
            of_queries[chosen] = target
        assert_close(match.target_of_query[layer, image], of_queries, rtol=0, atol=0)


def check_costs(
    cost: Tensor, layer: int, found: ops.Match, expected: ops.Match, policy: Any
) -> None:
    """The pairs cost what the match says, and as much as those of the reference."""
    counts, queries, groups, _ = found.sizes
    size = queries[layer] // groups
    for (image, n), group in product(enumerate(counts), range(groups)):
        part = slice(group * size, (group + 1) * size)
        read = replace_non_finite(cost[image, part, :n], policy).double()
        target = found.target_of_query[layer, image, part]
        pairs = read[target >= 0, target[target >= 0]]
        near = {"rtol": 1e-5, "atol": 1e-5 * (1 + pairs.abs().sum().item())}
        for match in (found, expected):  # a sum of huge replacements is infinite in float32
            total = match.cost[layer, image, group]
            assert_close(total, pairs.sum().to(total.dtype), **near)


def refuses(options: dict[str, Any]) -> bool:
    """Whether a status that is not 0 is raised at once."""
    return options["non_finite"] == "error"


def targets_of(draw: Draw, n: int, columns: int) -> dict[str, Tensor]:
    """Targets of an image; at times two are equal or a label is out of range."""
    labels = torch.randint(columns + (draw.random() < 0.05), (n,), generator=draw.torch)
    boxes = torch.rand(n, 4, generator=draw.torch)
    if n > 1 and draw.random() < 0.3:
        labels[1], boxes[1] = labels[0], boxes[0]
    return {"labels": labels, "boxes": boxes}


def run(seed: int) -> str:
    """One case, in a random schedule and on a device of its own."""
    draw = Draw(seed)
    with simulated(schedule="random", seed=seed, max_shared_bytes=draw.choice(SHARED_BYTES)):
        return draw.choice([assignment, match])(draw)


def main() -> int:
    """Run cases until the time or their number is up; prints the progress once a minute."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--cases", type=int, default=None, help="default: until the time is up")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seen: Counter[str] = Counter()
    failed, seed, start = [], options.seed, time.monotonic()
    told = start
    while (now := time.monotonic()) - start < 60 * options.minutes:
        if options.cases is not None and seed - options.seed >= options.cases:
            break
        try:
            seen[run(seed)] += 1
        except Exception:
            failed.append(seed)
            print(f"seed {seed}:", traceback.format_exc(), file=sys.stderr)
        seed += 1
        if now - told > 60:
            told = now
            done = (now - start) / 60
            print(
                f"{done:.0f} of {options.minutes:.0f} min, {seed - options.seed} cases, "
                f"{len(failed)} failed",
                flush=True,
            )
    for name, count in sorted(seen.items()):
        print(f"{count:8} {name}")
    print(f"{seed - options.seed} cases, failed: {failed or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
