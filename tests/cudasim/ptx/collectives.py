# SPDX-License-Identifier: Apache-2.0
"""Instructions of a warp, by opcode.

``MEET[opcode](block, instruction, lanes)`` runs one for the threads `lanes`, which have all come.
"""

import numpy as np

from tests.cudasim.ptx.block import WARP, Block, lane_bits
from tests.cudasim.ptx.memory import PtxError
from tests.cudasim.ptx.program import Instruction


def shuffle(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """shfl.sync.mode.b32 d|p, a, b, c, mask: c holds the clamp and the mask of segments."""
    _, name, (target, source, distance, control, _), _ = instruction
    target, _, in_range = target.partition("|")
    distance, control = (
        block.value(operand, "u32", lanes).astype(np.int64) for operand in (distance, control)
    )
    lane, segment = lanes % WARP, control >> 8 & 31
    first = lane & segment
    last = first | control & 31 & ~segment
    if name[2] == "up":
        wanted, valid = lane - distance, lane - distance >= last
    else:
        wanted = {
            "down": lane + distance,
            "bfly": lane ^ distance,
            "idx": first | distance & 31 & ~segment,
        }[name[2]]
        valid = wanted <= last
    origin = lanes - lane + np.where(valid, wanted, lane)
    if not np.isin(origin, lanes).all():
        raise PtxError("shuffle from a lane that does not take part")
    block.put(target, block.value(source, "b32", origin), lanes)
    if in_range:
        block.put(in_range, valid, lanes)


def vote(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (target, source, _), _ = instruction
    for warp in warps_of(lanes):
        votes = block.value(source, "pred", warp)
        if "ballot" in name:
            result = np.bitwise_or.reduce(lane_bits(warp[votes]), initial=0, dtype=np.uint32)
        else:
            result = votes.any() if "any" in name else votes.all()
        block.put(target, np.full(len(warp), result), warp)


REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def reduce(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (target, source, _), _ = instruction
    for warp in warps_of(lanes):
        values = block.value(source, name[-1], warp)
        result = REDUCE[name[2]].reduce(values, dtype=values.dtype)
        block.put(target, np.full(len(warp), result), warp)


def match(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """The lanes that hold the same value."""
    _, name, (target, source, _), _ = instruction
    for warp in warps_of(lanes):
        values = block.value(source, name[-1], warp)
        bits = np.where(values == values[:, None], lane_bits(warp), np.uint32(0))
        block.put(target, np.bitwise_or.reduce(bits, axis=1), warp)


# Fragments of an 8x8 matrix: lane l holds elements 2 * (l % 4) and + 1 of row l // 4.
ROW, COLUMN = np.arange(WARP) // 4, np.arange(WARP) % 4 * 2
BFLOAT_FRAGMENTS = [np.uint32(0), np.uint32(16)]  # where the two elements stand in a register


def multiply_matrices(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """mma.m16n8k16: (16, 16) @ (16, 8) + (16, 8), bfloat16 to float32 (PTX ISA, fragments)."""
    _, name, (target, *sources), where = instruction
    if name[3:] != ("m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"):
        raise NotImplementedError(where)
    for warp in warps_of(lanes):
        a, b, c = ([block.value(r, "b32", warp) for r in source] for source in sources)
        left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        total = np.zeros((16, 8), np.float32)
        for h, position in enumerate(BFLOAT_FRAGMENTS):
            upper = [(r >> position << np.uint32(16)).view(np.float32) for r in (*a, *b)]
            for i in range(4):
                left[ROW + i % 2 * 8, COLUMN + h + i // 2 * 8] = upper[i]
            for i in range(2):
                right[COLUMN + h + i * 8, ROW] = upper[4 + i]
        for i in range(4):
            total[ROW + i // 2 * 8, COLUMN + i % 2] = c[i].view(np.float32)
        total += left @ right
        for i in range(4):
            block.put(target[i], total[ROW + i // 2 * 8, COLUMN + i % 2], warp)


def load_matrices(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """ldmatrix: the i-th eight lanes name the rows of the i-th 8x8 matrix of 16-bit elements."""
    _, name, (targets, address), _ = instruction
    for warp in warps_of(lanes):
        rows = block.shared.read(block.address(address, warp), 16).view(np.uint16)
        for i, target in enumerate(targets):
            matrix = rows[8 * i : 8 * i + 8].astype(np.uint32)
            matrix = matrix.T if "trans" in name else matrix
            pair = matrix[ROW, COLUMN] | matrix[ROW, COLUMN + 1] << np.uint32(16)
            block.put(target, pair, warp)


def warps_of(lanes: np.ndarray) -> list[np.ndarray]:
    return [lanes[lanes // WARP == warp] for warp in np.unique(lanes // WARP)]


MEET = {
    "shfl": shuffle,
    "vote": vote,
    "redux": reduce,
    "match": match,
    "mma": multiply_matrices,
    "ldmatrix": load_matrices,
}
