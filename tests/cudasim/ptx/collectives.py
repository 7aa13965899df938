# SPDX-License-Identifier: Apache-2.0
"""Instructions of a warp, by opcode.

``MEET[opcode](block, instruction, lanes)`` runs one for the threads `lanes`, which have all come.
"""

import numpy as np

from tests.cudasim.ptx import matrices
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


def warps_of(lanes: np.ndarray) -> list[np.ndarray]:
    return [lanes[lanes // WARP == warp] for warp in np.unique(lanes // WARP)]


MEET = {
    "shfl": shuffle,
    "vote": vote,
    "redux": reduce,
    "match": match,
    "mma": matrices.multiply,
    "ldmatrix": matrices.load,
}
