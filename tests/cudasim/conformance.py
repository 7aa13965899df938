# SPDX-License-Identifier: Apache-2.0
"""The launches of kernels/conformance.cu, the same for the simulator, for PTX and for GPUs."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SOURCE = Path(__file__).parent / "kernels/conformance.cu"
RANDOM = np.random.default_rng(0)
# GPUs are up to 5 units in the last place off (CUDA C++ Programming Guide, intrinsic functions),
# and 2^-21.4 near the zero of the logarithm; the interpreter rounds the intermediate result
APPROXIMATE = (2e-6, 5e-7)

Size = tuple[int, int, int]
Launch = Callable[..., None]


class Case(NamedTuple):
    """A launch of the kernel of the same name."""

    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]  # what they hold before
    block: Size = (64, 1, 1)
    grid: Size = (1, 1, 1)
    shared_bytes: int = 0
    updates: bool = False  # the kernel reads its outputs, too
    unordered: bool = False  # of the last output only the set of values is defined
    tolerance: dict[int, tuple[float, float]] = {}  # noqa: RUF012 (row: relative, absolute)

    def run(self, name: str, launch: Launch) -> list[np.ndarray]:
        """What the outputs hold after a launch."""
        outputs = [output.copy() for output in self.outputs]
        options = {"shared_bytes": self.shared_bytes, "updates": self.updates}
        launch(name, self.grid, self.block, *self.inputs, *outputs, **options)
        if self.unordered:
            outputs[-1].sort()
        return outputs


def rows(count: int, dtype: type, threads: int = 64) -> tuple[np.ndarray]:
    return (np.zeros((count, threads), dtype),)


def integers(low: int, high: int) -> np.ndarray:
    return RANDOM.integers(low, high, 64).astype(np.int32)


def bit_patterns() -> np.ndarray:
    values = integers(-(2**31), 2**31)
    values[:4] = 0, 1, -1, 1 << 20
    return values


def positive() -> np.ndarray:
    values = RANDOM.uniform(0.01, 3, 64).astype(np.float32)
    values[:2] = 1, np.inf
    return values


def packed() -> np.ndarray:
    """Two halves, two bfloat16 numbers, two floats to be rounded, of 64 threads."""
    wide = torch.from_numpy(RANDOM.standard_normal((64, 6)).astype(np.float32))
    halves, brains = wide[:, :2].half(), wide[:, 2:4].bfloat16()
    columns = [halves.view(torch.float32), brains.view(torch.float32), wide[:, 4:]]
    return torch.cat(columns, 1).contiguous().numpy()


def halves_and_brains(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The same numbers as bits of halves, some of them subnormal, and of bfloat16 numbers."""
    wide = torch.from_numpy(RANDOM.standard_normal(shape).astype(np.float32))
    wide[..., 3, :] *= 2.0**-18
    return tuple(wide.to(t).view(torch.int16).numpy() for t in (torch.half, torch.bfloat16))


def summands(shape: tuple[int, ...]) -> np.ndarray:
    values = RANDOM.standard_normal(shape).astype(np.float32)
    values[:, 3] = 0  # so that the products of subnormal numbers can be seen
    return values


def exponents() -> np.ndarray:
    values = RANDOM.uniform(-20, 20, 64).astype(np.float32)
    values[:8] = 0, -0.0, 1, -126, -126.5, -np.inf, np.inf, 128
    return values


def pairs_to_pack() -> np.ndarray:
    values = RANDOM.standard_normal((64, 2)).astype(np.float32)
    halfway = 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8  # to even
    values[:4] = halfway[:2], halfway[2:], (np.inf, -1e30), (1, 1)
    return values


# A new case goes to the end: RANDOM gives the others what golden files were written with.
WORDS = RANDOM.permutation(64).astype(np.int32)  # contains 40 and 63, so votes differ
CASES = {
    "shuffles": Case((WORDS,), rows(8, np.int32)),
    "shuffles_of_doubles": Case((RANDOM.random(64),), rows(3, np.float64)),
    "votes": Case((WORDS,), rows(8, np.uint32)),
    "reductions": Case((integers(-(2**31), 2**31),), rows(9, np.int32)),
    "partial_warp": Case((), rows(1, np.uint32, 80), block=(40, 1, 1), grid=(2, 1, 1)),
    "atomics": Case(
        (RANDOM.permutation(64).astype(np.int32),),
        (np.array([5, 99, -99, -1, 0, 0, 0, 0], np.int32),),
        block=(8, 4, 2),
        grid=(3, 1, 1),
        updates=True,
    ),
    "atomics_of_floats": Case(
        (RANDOM.random(64).astype(np.float32),),
        (np.array([0.5], np.float32),),
        grid=(2, 1, 1),
        updates=True,
        tolerance={0: (1e-5, 0)},  # 128 additions in any order
    ),
    "atomics_of_long_words": Case(
        (RANDOM.integers(0, 2**64, 64, dtype=np.uint64),),
        (np.array([2**64 - 1, 0], np.uint64),),
        grid=(2, 1, 1),
        updates=True,
    ),
    "tickets": Case(
        (), (np.zeros(1, np.int32), np.full(64, -1, np.int32)), updates=True, unordered=True
    ),
    "shared_memory": Case(
        (integers(0, 2048).astype(np.float32),),  # exact in half precision
        rows(4, np.float32),
        block=(8, 4, 2),
        shared_bytes=256,
    ),
    "built_in_variables": Case((), rows(10, np.int32, 96), block=(4, 2, 2), grid=(3, 2, 1)),
    "integer_functions": Case((bit_patterns(),), rows(10, np.int32)),
    "float_functions": Case(
        (positive(),),
        rows(14, np.float32),
        tolerance=dict.fromkeys((0, 1, 2, 10), APPROXIMATE),  # exp, log, divide, rsqrt
    ),
    "narrow_floats": Case((packed(),), rows(6, np.float32)),
    "matrix_products": Case(
        (*halves_and_brains((2, 24, 16)), summands((2, 16, 8))),
        (np.zeros((2, 2 * 16 * 8), np.float32),),
        tolerance=dict.fromkeys((0, 1), (1e-5, 1e-5)),  # sums of 16 products in any order
    ),
    "matrix_loads": Case((RANDOM.permutation(1024).astype(np.int16),), rows(8, np.uint32)),
    "asynchronous_copies": Case(
        (RANDOM.integers(0, 2**32, (128, 4), dtype=np.uint32),), rows(5, np.uint32)
    ),
    "powers_of_two": Case(
        (exponents(),),
        rows(1, np.float32),
        tolerance={0: (2.0**-22, 0)},  # 2 ulp
    ),
    "packed_values": Case((pairs_to_pack(),), rows(7, np.uint32)),
}
for case in CASES.values():
    for array in case.inputs:
        array.setflags(write=False)
