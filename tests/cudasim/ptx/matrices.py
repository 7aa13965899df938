# SPDX-License-Identifier: Apache-2.0
"""Tensor cores: mma.m16n8k16 and ldmatrix, for all warps that have come.

Fragments as in the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
"""

import numpy as np

from tests.cudasim.ptx.block import WARP, Block
from tests.cudasim.ptx.memory import PtxError
from tests.cudasim.ptx.opcodes import from_half
from tests.cudasim.ptx.program import Instruction

GROUP, PAIR = np.arange(WARP) // 4, np.arange(WARP) % 4 * 2
Place = tuple[slice, np.ndarray, np.ndarray]  # (warps, rows, columns)


def place_in_a(i: int) -> Place:
    """Row and column of element i of each lane, in (warps, 16, 16)."""
    return slice(None), GROUP + i // 2 % 2 * 8, PAIR + i % 2 + i // 4 * 8


def place_in_b(i: int) -> Place:
    return slice(None), PAIR + i % 2 + i // 2 * 8, GROUP


def place_in_d(i: int) -> Place:
    return slice(None), GROUP + i // 2 * 8, PAIR + i % 2


def multiply(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """mma d, a, b, c: d = a * b + c, rounded once."""
    _, name, (target, *sources), where = instruction
    shape, types = name[3:6], name[6:]
    if shape != ("m16n8k16", "row", "col") or types[0] != "f32" or types[3] != "f32":
        raise NotImplementedError(where)
    require_whole_warps(lanes)
    a = np.empty((len(lanes) // WARP, 16, 16))
    b, d = np.empty((2, len(a), 16, 8))
    for matrix, place, registers, kind in (
        (a, place_in_a, sources[0], types[1]),
        (b, place_in_b, sources[1], types[2]),
    ):
        for i in range(2 * len(registers)):
            both = block.value(registers[i // 2], "b32", lanes)
            element = (both >> np.uint32(16 * (i % 2))).astype(np.uint16)
            matrix[place(i)] = from_half(element, kind).reshape(-1, WARP)
    for i, register in enumerate(sources[2]):
        d[place_in_d(i)] = block.value(register, "f32", lanes).reshape(-1, WARP)
    d = (a @ b + d).astype(np.float32)
    for i, register in enumerate(target):
        block.put(register, d[place_in_d(i)].ravel(), lanes)


def load(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """ldmatrix.m8n8: lane 8 * i + j has the address of row j of matrix i."""
    _, name, (targets, address), where = instruction
    if name[3] != "m8n8" or name[-2:] != ("shared", "b16"):
        raise NotImplementedError(where)
    require_whole_warps(lanes)
    addressed = lanes[lanes % WARP < 8 * len(targets)]
    rows = block.load(name, address, 16, addressed).view(np.uint16)
    matrices = rows.reshape(-1, len(targets), 8, 8)
    if "trans" in name:
        matrices = matrices.swapaxes(2, 3)
    pairs = np.ascontiguousarray(matrices).view(np.uint32)
    for i, target in enumerate(targets):
        block.put(target, pairs[:, i].ravel(), lanes)


def require_whole_warps(lanes: np.ndarray) -> None:
    if len(lanes) % WARP:
        raise PtxError("a lane of the warp has exited")
