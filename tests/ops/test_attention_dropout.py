# SPDX-License-Identifier: Apache-2.0
"""Dropout of attention: which weights it keeps, the same ones forward and backward."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.reference.attention import KEEP_LEVELS, kept_levels
from tests.ops.attention_cases import (
    FUSED,
    HALVES,
    assert_as_exact_as_torch,
    assert_padding_is_zero,
    assert_same_bits,
    attention_case,
    grid_case,
    next_seed,
    raw_arguments,
    rebuilt_mask,
    run,
)

OPS = torch.ops.detr_fast
CASES = {
    "dense": lambda **o: attention_case(70, heads=1, **o),
    "few queries": lambda **o: attention_case(9, 150, heads=2, **o),
    "rect": lambda **o: grid_case([(3, 5), (5, 13), (0, 4)], 5, 14, heads=2, **o),
    "rect of keys": lambda **o: attention_case(
        130, 70, rects=[(3, 5), (5, 13)], query_rects=False, padded_width=14, heads=1, **o
    ),
    "count": lambda **o: attention_case(20, 40, counts=(40, 0, 33), heads=2, **o),
}
KINDS = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def test_probabilities_are_quantised():
    assert [kept_levels(p) for p in (0, 0.001, 0.1, 0.5, 0.999, 1)] == [256, 256, 230, 128, 0, 0]


@FUSED
@KINDS
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 255 / 256])
def test_the_mask_can_be_rebuilt(device, make, dropout_p):
    """Bits of positions are stored for real rows, in the order of dropout.h; the others are 0."""
    case = make(device=device, dropout_p=dropout_p)
    seed = torch.tensor(-(2**62) + 12345, device=device)
    _, _, keep = OPS.attention(*raw_arguments(case, seed))
    mask = rebuilt_mask(case, int(seed))
    images, _, queries, words = keep.shape
    assert (queries, words % 4) == (case.q.shape[2], 0)
    bits = (keep[..., None] >> torch.arange(32, device=device)) & 1
    stored = bits[..., torch.arange(32, device=device) ^ 7].flatten(3).bool()
    numbers = [
        rows.numbers(images, x.shape[2])
        for rows, x in zip(case.rows, (case.q, case.k), strict=True)
    ]
    for image in range(images):
        (at_queries, at_keys) = (torch.nonzero(n[image] >= 0).flatten().to(device) for n in numbers)
        expected = mask[image][:, at_queries][:, :, at_keys]
        assert_same_bits(stored[image, :, : len(at_queries), : len(at_keys)], expected)


@FUSED
@KINDS
@HALVES
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_equals_reference_with_that_mask(device, make, dtype, dropout_p):
    """Values and gradients: forward and backward keep the same weights."""
    case = make(dtype=dtype, device=device, dropout_p=dropout_p)
    seed = next_seed(device)
    ours = run(case)
    assert_as_exact_as_torch(case, ours, rebuilt_mask(case, seed))
    assert_padding_is_zero(case, ours)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_keep_rate_and_independence(dropout_p):
    """Of 2 million weights, within four standard deviations; as are pairs of neighbours."""
    case = attention_case(512, images=2, heads=4, dropout_p=dropout_p)
    mask = rebuilt_mask(case, 3).double()
    p = kept_levels(dropout_p) / KEEP_LEVELS
    neighbours = [mask[..., 1:] * mask[..., :-1], mask[:, :, 1:] * mask[:, :, :-1]]
    neighbours += [mask[:, 1:] * mask[:, :-1], mask[1:] * mask[:-1]]
    for sample, rate in ((mask, p), *((n, p * p) for n in neighbours)):
        # of pairs that overlap in one of two: variance p^2 (1 - p) (1 + 3 p) at most
        variance = rate * (1 - rate) if rate == p else p * p * (1 - p) * (1 + 3 * p)
        assert abs(sample.mean() - rate) < 4 * (variance / sample.numel()) ** 0.5


def test_the_mean_is_that_without_dropout(device):
    """Over 64 heads of the same numbers; the scale fits the quantised probability."""
    case = attention_case(6, 40, images=1, heads=64, dtype=torch.float16, device=device)
    same = [x[:, :1].expand_as(x) for x in case[:2]]
    torch.manual_seed(0)
    out = ops.attention(*same, torch.ones_like(case.v), dropout_p=0.3).double()
    deviation = out[..., 0].std() / out[..., 0].numel() ** 0.5
    assert abs(out.mean() - 1) < 4 * deviation


def test_manual_seed_reproduces(device):
    case = attention_case(33, heads=1, device=device, dropout_p=0.5)
    next_seed(device)
    first, second = run(case), run(case)
    next_seed(device)
    assert_same_bits(run(case), first)
    assert not torch.equal(first.out, second.out)


def test_images_and_heads_drop_other_weights(device):
    case = attention_case(40, images=2, heads=2, device=device)
    same = [x[:1, :1].expand_as(x) for x in case[:3]]
    out = ops.attention(*same, dropout_p=0.5).flatten(0, 1)
    assert all(not torch.equal(out[i], out[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("dropout_p", [0.0, 0.0019])
def test_no_dropout_draws_nothing(device, dropout_p):
    """Less than 1 / 512 is none."""
    case = attention_case(33, heads=1, device=device)
    state = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
    before = state()
    assert_same_bits(run(case, dropout_p=dropout_p), run(case))
    assert torch.equal(state(), before)


@pytest.mark.parametrize("op", [ops.attention, reference.attention])
def test_all_can_be_dropped(device, op):
    ours = run(attention_case(9, heads=1, device=device, dropout_p=1.0), op)
    assert not any(x.any() for x in ours)


def test_sdpa_scales_by_the_quantised_probability(machine):
    """Every weight that is kept is 1 / 0.8984375 times as large: ones stay multiples of that."""
    case = attention_case(8, 1, dtype=torch.float64, device=machine, dropout_p=0.1)
    out = ops.attention(case.q, case.k, torch.ones_like(case.v), dropout_p=0.1)
    found = out.unique()
    assert_close(found, found.new_tensor([0, 256 / 230][-len(found) :]))
