# SPDX-License-Identifier: Apache-2.0
"""Every function that CUDA gives to kernels, against values computed in numpy."""

import re

import numpy as np
import pytest
import torch

from tests.cudasim import SCHEDULES, load_test_kernels, scheduled
from tests.cudasim.conformance import CASES, SOURCE, WORDS

RANK = np.arange(64)
LANE = RANK % 32
WARP = RANK - LANE  # the first thread of everyone's warp


@pytest.fixture(
    params=[(s, 0) for s in SCHEDULES] + [("random", s) for s in (1, 2, 3)],
    ids=lambda p: f"{p[0]}{p[1]}",
)
def launch(request, needs_simulator):
    load_test_kernels(SOURCE)
    schedule, seed = request.param
    with scheduled(schedule, seed, preemption=0.05 if schedule == "random" else 0) as simulator:
        yield simulator.launch


def filled(launch, name):
    """The rows of what the threads of all blocks got."""
    (out,) = CASES[name].run(name, launch)
    return out


def by_warp(values, fold):
    """What `fold` makes of the values of each warp, for every thread."""
    return np.repeat([fold(values[:32]), fold(values[32:])], 32)


def ballot(predicate, mask=0xFFFFFFFF):
    """Predicates as bits of a word, of the lanes in `mask`."""
    bits = np.where(mask >> LANE & 1, predicate.astype(np.uint64) << LANE.astype(np.uint64), 0)
    return by_warp(bits, np.sum).astype(np.uint32)


def test_shuffles(launch):
    got = filled(launch, "shuffles")
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
    (values,) = CASES["shuffles_of_doubles"].inputs
    got = filled(launch, "shuffles_of_doubles")
    down = values[WARP + np.where(LANE > 24, LANE, LANE + 7)]
    halves = np.where(LANE < 16, LANE ^ 8, np.where(LANE < 31, LANE + 1, LANE))
    np.testing.assert_array_equal(got[[0, 2]], [down, values[WARP + halves]])
    np.testing.assert_allclose(got[1], by_warp(values, np.sum), rtol=1e-14)


def test_votes(launch):
    got = filled(launch, "votes")
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
    (values,) = CASES["reductions"].inputs
    got = filled(launch, "reductions")
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
    got = filled(launch, "partial_warp")
    np.testing.assert_array_equal(got[0], np.tile(np.repeat([0xFFFFFFFF, 0xFF], [32, 8]), 2))


def test_atomics(launch):
    (values,) = CASES["atomics"].inputs
    out = filled(launch, "atomics")
    # an even number of exclusive ors of 0..63 is 0, as is the odd one: they cancel out
    assert out.tolist() == [5 + 3 * values.sum(), 0, 63, 0, -1, 0, 77, 7]


def test_atomics_of_floats(launch):
    (values,) = CASES["atomics_of_floats"].inputs
    out = filled(launch, "atomics_of_floats")
    np.testing.assert_allclose(out, 0.5 + 2 * values.sum(dtype=np.float64), rtol=1e-5)


def test_atomics_of_long_words(launch):
    (values,) = CASES["atomics_of_long_words"].inputs
    out = filled(launch, "atomics_of_long_words")
    assert out.tolist() == [values.min(), values.max()]


def test_atomics_return_what_was_there(launch):
    counter, out = CASES["tickets"].run("tickets", launch)
    assert counter[0] == 64
    np.testing.assert_array_equal(out, RANK)  # in order: a permutation is sorted


def test_shared_memory(launch):
    (values,) = CASES["shared_memory"].inputs
    got = filled(launch, "shared_memory")
    expected = [values[::-1], 2 * values[::-1], values[::-1], values[RANK ^ 31] + 1]
    np.testing.assert_array_equal(got, expected)


def test_built_in_variables(launch):
    block, grid = CASES["built_in_variables"].block, CASES["built_in_variables"].grid
    got = filled(launch, "built_in_variables").reshape(10, 6, 16)
    z, y, x = (axis.ravel() for axis in np.indices(block[::-1]))
    for number, (block_z, block_y, block_x) in enumerate(np.ndindex(grid[::-1])):
        fixed = [np.full(16, v) for v in (block_x, block_y, block_z, 4, 3, 32)]
        expected = [x, y, z, *fixed, 2 ** (np.arange(16) % 4)]
        np.testing.assert_array_equal(got[:, number], expected)


def test_integer_functions(launch):
    (values,) = CASES["integer_functions"].inputs
    got = filled(launch, "integer_functions")
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
    (values,) = CASES["float_functions"].inputs
    got = filled(launch, "float_functions")
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
    packed = torch.from_numpy(CASES["narrow_floats"].inputs[0].copy())
    got = filled(launch, "narrow_floats")
    halves, brains = packed[:, :1].view(torch.half), packed[:, 1:2].view(torch.bfloat16)
    rounded = [halves, brains, packed[:, 2:3].half(), packed[:, 3:].bfloat16()]
    np.testing.assert_array_equal(got, torch.cat([r.float() for r in rounded], 1).T)


def numbers(bits, kind):
    """Bits of halves or bfloat16 numbers as float64."""
    return torch.from_numpy(bits.copy()).view(kind).double().numpy()


def test_matrix_products(launch):
    halves, brains, c = CASES["matrix_products"].inputs
    got = filled(launch, "matrix_products").reshape(2, 2, 16, 8)
    for bits, kind, products in (
        (halves, torch.half, got[0]),
        (brains, torch.bfloat16, got[1]),
    ):
        factors = numbers(bits, kind).reshape(2, 384)
        a, b = factors[:, :256].reshape(2, 16, 16), factors[:, 256:].reshape(2, 16, 8)
        rounding = (np.abs(a) @ np.abs(b) + np.abs(c)) * 2.0**-20
        assert (np.abs(products - (a @ b + c)) <= rounding).all()


def test_matrix_loads(launch):
    (elements,) = CASES["matrix_loads"].inputs
    got = filled(launch, "matrix_loads").reshape(2, 4, 2, 32)  # which, register, warp, lane
    matrices = elements.reshape(2, 4, 2, 8, 8)  # warp, register, which, row, column
    got = np.ascontiguousarray(got.transpose(2, 1, 0, 3)).view(np.int16).reshape(2, 4, 2, 8, 8)
    np.testing.assert_array_equal(got[:, :, 0], matrices[:, :, 1])
    np.testing.assert_array_equal(got[:, :, 1], matrices[:, :, 0].swapaxes(2, 3))


def test_asynchronous_copies(launch):
    (values,) = CASES["asynchronous_copies"].inputs
    first, second = values[:64], np.where(RANK[:, None] % 2 == 0, values[64:], 0)
    expected = [first[:, 0], first[:, 1], second[:, 2], first[RANK ^ 33, 3], second[RANK ^ 33, 0]]
    np.testing.assert_array_equal(filled(launch, "asynchronous_copies"), expected)


def test_powers_of_two(launch):
    (values,) = CASES["powers_of_two"].inputs
    expected = 2 ** values.astype(np.float64)
    expected[expected < 2.0**-126] = 0
    expected[expected >= 2.0**128] = np.inf
    np.testing.assert_allclose(filled(launch, "powers_of_two")[0], expected, rtol=2.0**-22)


def test_packed_values(launch):
    (values,) = CASES["packed_values"].inputs
    halves, brains, *masks, half_ones, brain_ones = filled(launch, "packed_values")
    kinds = ((halves, half_ones, torch.half), (brains, brain_ones, torch.bfloat16))
    for bits, ones, kind in kinds:
        assert (ones.view(np.int16) == torch.ones(1).to(kind).view(torch.int16).item()).all()
        rounded = torch.from_numpy(values.copy()).to(kind).view(torch.int32)[:, 0]
        np.testing.assert_array_equal(bits.view(np.int32), rounded)
    signs = values.view(np.int8) < 0  # of eight bytes
    chosen = [
        np.tile([0, 1, 2, 3], (64, 1)),
        np.tile([5, 6, 7, 4], (64, 1)),
        np.stack([0 * RANK, RANK % 8, 0 * RANK, 0 * RANK], axis=1),
    ]
    expected = [np.take_along_axis(signs, bytes_of, axis=1) for bytes_of in chosen]
    spread = np.where(expected, np.uint8(255), np.uint8(0)).view(np.uint32)[..., 0]
    np.testing.assert_array_equal(masks, spread)


def test_every_kernel_has_a_case():
    assert {*CASES} == {*re.findall(r"CUDASIM_TEST_KERNEL\((\w+)\)", SOURCE.read_text())}
