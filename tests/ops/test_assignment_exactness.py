# SPDX-License-Identifier: Apache-2.0
"""Many problems against scipy, whose figures are printed: `pytest -m long -s` takes minutes."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from detr_fast.ops import linear_sum_assignment
from tests.ops.assignment_problems import KINDS, by_scipy, excess, needs_augmentation, problems

BATCH = 4
LARGE = [(900, 100), (300, 300), (100, 300)]


def compare(device, batches, largest=(64, 128)):
    """Solve random problems of every kind, both ways; the figures of the comparison."""
    generator = torch.Generator().manual_seed(1)
    count = augmented = 0
    worst = 0.0
    for seed, kind in zip(range(batches), itertools.cycle(KINDS), strict=False):
        sizes = [int(torch.randint(0, most + 1, (), generator=generator)) for most in largest]
        if seed % 2:
            sizes.reverse()  # as many queries as targets and more are what a matcher meets
        if seed % 1000 == 500:
            sizes = LARGE[seed // 1000 % len(LARGE)]
        cost = problems(kind, BATCH, *sizes, seed=seed)
        assigned = linear_sum_assignment(cost.to(device)).cpu()
        as_scipy = linear_sum_assignment(cost.to(device), ties="scipy").cpu()
        for problem, found, same in zip(cost, assigned, as_scipy, strict=True):
            more, magnitude = excess(problem, found)
            assert abs(more) <= 1e-6 * magnitude
            worst = max(worst, abs(more) / (magnitude or 1))
            assert_close(same, by_scipy(problem), rtol=0, atol=0)
            count += 1
            augmented += needs_augmentation(problem)
    print(f"\n{count} problems, {augmented} augmented, largest relative difference {worst:.1e}")
    return count, augmented


def test_sample_is_exact():
    count, augmented = compare(torch.device("cpu"), 500)
    assert count == 2000
    assert augmented > 1000


def test_simulated_sample_is_exact(device):
    compare(device, 50, largest=(20, 40))


@pytest.mark.long
def test_100000_problems_are_exact():
    count, augmented = compare(torch.device("cpu"), 25_000)
    assert count == 100_000
    assert augmented > 20_000
