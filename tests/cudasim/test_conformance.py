# SPDX-License-Identifier: Apache-2.0
"""Every function that CUDA gives to kernels, against values computed in numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cudasim import SCHEDULES, load_test_kernels, scheduled

SOURCE = Path(__file__).parent / "kernels/conformance.cu"
RANK = np.arange(64)
LANE = RANK % 32
WARP = RANK - LANE  # the first thread of everyone's warp
RANDOM = np.random.default_rng(0)
WORDS = RANDOM.permutation(64).astype(np.int32)  # contains 40 and 63, so votes differ


@pytest.fixture(
    params=[(s, 0) for s in SCHEDULES] + [("random", s) for s in (1, 2, 3)],
    ids=lambda p: f"{p[0]}{p[1]}",
)
def launch(request, needs_simulator):
    load_test_kernels(SOURCE)
    schedule, seed = request.param
    with scheduled(schedule, seed, preemption=0.05 if schedule == "random" else 0) as simulator:
        yield simulator.launch


def filled(launch, name, *inputs, rows, dtype, block=(64, 1, 1), grid=(1, 1, 1), **options):
    """Rows of what the threads of all blocks got."""
    out = np.empty((rows, np.prod(grid) * np.prod(block)), dtype)
    launch(name, grid, block, *inputs, out, **options)
    return out


def by_warp(values, fold):
    """What `fold` makes of the values of each warp, for every thread."""
    return np.repeat([fold(values[:32]), fold(values[32:])], 32)


def ballot(predicate, mask=0xFFFFFFFF):
    """Predicates as bits of a word, of the lanes in `mask`."""
    bits = np.where(mask >> LANE & 1, predicate.astype(np.uint64) << LANE.astype(np.uint64), 0)
    return by_warp(bits, np.sum).astype(np.uint32)


def test_shuffles(launch):
    got = filled(launch, "shuffles", WORDS, rows=8, dtype=np.int32)
    in8, in16 = LANE % 8, LANE % 16
    sources = [
        5 + 0 * LANE,
        LANE - in8 + (LANE + 3) % 8,
        np.where(LANE < 2, LANE, LANE - 2),
        np.where(in8 < 3, LANE, LANE - 3),
        np.where(LANE > 29, LANE, LANE + 2),
        np.where(in16 > 12, LANE, LANE + 3),
        LANE ^ 1,
        np.where(LANE - in8 + 8 > (LANE ^ 9), LANE ^ 9, LANE),
    ]
    np.testing.assert_array_equal(got, [WORDS[WARP + source] for source in sources])


def test_shuffles_of_doubles(launch):
    values = RANDOM.random(64)
    got = filled(launch, "shuffles_of_doubles", values, rows=3, dtype=np.float64)
    down = values[WARP + np.where(LANE > 24, LANE, LANE + 7)]
    halves = np.where(LANE < 16, LANE ^ 8, np.where(LANE < 31, LANE + 1, LANE))
    np.testing.assert_array_equal(got[[0, 2]], [down, values[WARP + halves]])
    np.testing.assert_allclose(got[1], by_warp(values, np.sum), rtol=1e-14)


def test_votes(launch):
    got = filled(launch, "votes", WORDS, rows=8, dtype=np.uint32)
    low, high = 0x0000FFFF, 0xFFFF0000
    classes = [ballot((WORDS - rest) % 5 == 0) for rest in range(5)]
    expected = [
        ballot(WORDS % 3 == 0),
        by_warp(WORDS == 40, np.any),
        by_warp(WORDS < 40, np.all),
        np.choose(WORDS % 5, classes),
        np.where(LANE < 16, ballot(WORDS & 1, low), ballot(WORDS >> 1 & 1, high)),
        np.full(64, np.sum(WORDS % 3 == 0)),
        np.full(64, 0),
        np.full(64, 1),
    ]
    np.testing.assert_array_equal(got, expected)


def test_reductions(launch):
    values = RANDOM.integers(-(2**31), 2**31, 64).astype(np.int32)
    got = filled(launch, "reductions", values, rows=9, dtype=np.int32)
    bits = values.view(np.uint32)
    folds = [
        (values, lambda v: v.sum(dtype=np.int32)),
        (values, np.min),
        (values, np.max),
        (bits, lambda v: v.sum(dtype=np.uint32)),
        (bits, np.min),
        (bits, np.max),
        (bits, np.bitwise_and.reduce),
        (bits, np.bitwise_or.reduce),
        (bits, np.bitwise_xor.reduce),
    ]
    expected = [by_warp(source, fold).astype(np.uint32).view(np.int32) for source, fold in folds]
    np.testing.assert_array_equal(got, expected)


def test_partial_warp(launch):
    got = filled(launch, "partial_warp", rows=1, dtype=np.uint32, block=(40, 1, 1), grid=(2, 1, 1))
    np.testing.assert_array_equal(got[0], np.tile(np.repeat([0xFFFFFFFF, 0xFF], [32, 8]), 2))


def test_atomics(launch):
    values = RANDOM.permutation(64).astype(np.int32)
    out = np.array([5, 99, -99, -1, 0, 0, 0, 0], np.int32)
    launch("atomics", (3, 1, 1), (8, 4, 2), values, out, updates=True)
    # an even number of exclusive ors of 0..63 is 0, as is the odd one: they cancel out
    assert out.tolist() == [5 + 3 * values.sum(), 0, 63, 0, -1, 0, 77, 7]


def test_atomics_of_floats(launch):
    values = RANDOM.random(64).astype(np.float32)
    out = np.array([0.5], np.float32)
    launch("atomics_of_floats", (2, 1, 1), (64, 1, 1), values, out, updates=True)
    np.testing.assert_allclose(out, 0.5 + 2 * values.sum(dtype=np.float64), rtol=1e-5)


def test_atomics_of_long_words(launch):
    values = RANDOM.integers(0, 2**64, 64, dtype=np.uint64)
    out = np.array([2**64 - 1, 0], np.uint64)
    launch("atomics_of_long_words", (2, 1, 1), (64, 1, 1), values, out, updates=True)
    assert out.tolist() == [values.min(), values.max()]


def test_atomics_return_what_was_there(launch):
    counter, out = np.zeros(1, np.int32), np.full(64, -1, np.int32)
    launch("tickets", (1, 1, 1), (64, 1, 1), counter, out, updates=True)
    assert counter[0] == 64
    np.testing.assert_array_equal(np.sort(out), RANK)


def test_shared_memory(launch):
    values = RANDOM.integers(0, 2048, 64).astype(np.float32)  # exact in half precision
    options = {"rows": 4, "dtype": np.float32, "block": (8, 4, 2), "shared_bytes": 256}
    got = filled(launch, "shared_memory", values, **options)
    expected = [values[::-1], 2 * values[::-1], values[::-1], values[RANK ^ 31] + 1]
    np.testing.assert_array_equal(got, expected)


def test_built_in_variables(launch):
    block, grid = (4, 2, 2), (3, 2, 1)
    got = filled(
        launch, "built_in_variables", rows=10, dtype=np.int32, block=block, grid=grid
    ).reshape(10, 6, 16)
    z, y, x = (axis.ravel() for axis in np.indices(block[::-1]))
    for number, (block_z, block_y, block_x) in enumerate(np.ndindex(grid[::-1])):
        fixed = [np.full(16, v) for v in (block_x, block_y, block_z, 4, 3, 32)]
        expected = [x, y, z, *fixed, 2 ** (np.arange(16) % 4)]
        np.testing.assert_array_equal(got[:, number], expected)


def test_integer_functions(launch):
    values = RANDOM.integers(-(2**31), 2**31, 64).astype(np.int32)
    values[:4] = 0, 1, -1, 1 << 20
    got = filled(launch, "integer_functions", values, rows=10, dtype=np.int32)
    words = [f"{v:032b}" for v in values.view(np.uint32).tolist()]
    expected = [
        [w.count("1") for w in words],
        [w.count("1") + 1 for w in words],
        [(w + "1").index("1") for w in words],
        [w[::-1].find("1") + 1 for w in words],
        np.array([int(w[::-1], 2) for w in words], np.uint32).view(np.int32),
        np.minimum(values, 3),
        np.maximum(values, 3),
        values,
        values,
        values,
    ]
    np.testing.assert_array_equal(got, expected)


def test_float_functions(launch):
    values = RANDOM.uniform(0.01, 3, 64).astype(np.float32)
    values[:2] = 1, np.inf
    got = filled(launch, "float_functions", values, rows=14, dtype=np.float32)
    wide, tenth = values.astype(np.float64), np.float32(0.1)
    approximate = [np.exp(wide), np.log(wide), 1.5 / wide]
    np.testing.assert_allclose(got[:3], approximate, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[10], 1 / np.sqrt(wide), rtol=1e-6)
    rounded = [
        1 / values,
        values + tenth,
        values - tenth,
        values * tenth,
        values / np.float32(3),
        (wide * wide - wide.dtype.type(tenth)).astype(np.float32),
        np.clip(values - 1, 0, 1),
    ]
    np.testing.assert_array_equal(got[3:10], rounded)
    np.testing.assert_array_equal(got[11:], [~np.isfinite(values), values, values])


def test_narrow_floats(launch):
    wide = torch.from_numpy(RANDOM.standard_normal((64, 6)).astype(np.float32))
    halves, brains = wide[:, :2].half(), wide[:, 2:4].bfloat16()
    columns = [halves.view(torch.float32), brains.view(torch.float32), wide[:, 4:]]
    packed = torch.cat(columns, 1).contiguous().numpy()
    got = filled(launch, "narrow_floats", packed, rows=6, dtype=np.float32)
    rounded = [halves, brains, wide[:, 4:5].half(), wide[:, 5:].bfloat16()]
    np.testing.assert_array_equal(got, torch.cat([r.float() for r in rounded], 1).T)
