# SPDX-License-Identifier: Apache-2.0
"""Instructions that each thread runs for itself, by opcode.

``EXECUTE[opcode](block, instruction, lanes)`` runs one for the threads `lanes`.
"""

import operator

import numpy as np

from tests.cudasim.ptx.block import SHARED_WINDOW, TYPES, Block
from tests.cudasim.ptx.memory import PtxError
from tests.cudasim.ptx.program import Instruction


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z, rounded once for float32, and in 64 bits of mantissa first for float64."""
    wide = np.longdouble if x.dtype == np.float64 else np.float64
    return (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(x.dtype)


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Integers are cut towards 0."""
    if x.dtype.kind == "f":
        return x / y
    if (y == 0).any():
        raise PtxError("integer division by 0")
    quotient = x // y
    return quotient + ((x % y != 0) & ((x < 0) != (y < 0))).astype(x.dtype)


def remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x - divide(x, y) * y


def smaller(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.fmin(x, y)  # of a number and a NaN, the number


def larger(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.fmax(x, y)


ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": divide,
    "rem": remainder,
    "min": smaller,
    "max": larger,
    "neg": operator.neg,
    "abs": operator.abs,
    "mad": lambda x, y, z: x * y + z,
    "fma": fused,
    "rcp": lambda x: x.dtype.type(1) / x,
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
}


def from_half(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 bits of f16 or bf16 as float32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_half(value: np.ndarray, kind: str) -> np.ndarray:
    """float32 as the bits of f16 or bf16, rounded to nearest, ties to even."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def arithmetic(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (target, *sources), _ = instruction
    kind = name[-1]
    function = ARITHMETIC[name[0]]
    values = [block.value(source, kind, lanes) for source in sources]
    if name[1] in ("wide", "hi"):
        wide = TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
        values[:2] = [value.astype(wide) for value in values[:2]]
        if name[1] == "wide" and len(values) == 3:
            values[2] = block.value(sources[2], f"{kind[0]}{2 * int(kind[1:])}", lanes)
        if name[1] == "hi":
            values = [(values[0] * values[1] >> wide.type(int(kind[1:]))).astype(TYPES[kind])]
            function = operator.pos
    if "ftz" in name:
        block.put(target, flushed(function(*map(flushed, values))), lanes)
    else:
        block.put(target, function(*values), lanes)


def flushed(value: np.ndarray) -> np.ndarray:
    """Subnormal numbers become 0 of their sign."""
    return np.where(np.abs(value) < np.finfo(value.dtype).tiny, value * 0, value)


def shift(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """By the width or more: 0, or all sign bits."""
    _, name, (target, source, distance), _ = instruction
    value = block.value(source, name[-1], lanes)
    distance = block.value(distance, "u32", lanes)
    width = 8 * value.dtype.itemsize
    step = np.minimum(distance, width - 1).astype(value.dtype)
    shifted = value << step if name[0] == "shl" else value >> step
    keeps_sign = name[0] == "shr" and name[-1][0] == "s"
    zero = (distance >= width) & (not keeps_sign)
    block.put(target, np.where(zero, value.dtype.type(0), shifted), lanes)


def funnel_shift(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """shf.l: the upper half of 64 bits, the second operand above the first; shf.r: the lower."""
    _, name, (target, *sources, distance), where = instruction
    if name[2] != "wrap":
        raise NotImplementedError(where)
    low, high = (block.value(source, "u32", lanes).astype(np.uint64) for source in sources)
    distance = block.value(distance, "u32", lanes).astype(np.uint64) % np.uint64(32)
    if name[1] == "l":
        distance = np.uint64(32) - distance
    block.put(target, (high << np.uint64(32) | low) >> distance, lanes)


def set_predicate(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """setp.lt.and.f32 p, x, y, q; `u` after a comparison of floats: true where one is NaN."""
    _, name, (target, *sources), _ = instruction
    x, y = (block.value(source, name[-1], lanes) for source in sources[:2])
    comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name[1], name[1])
    nan = (x != x) | (y != y)
    if comparison in ("num", "nan"):
        result = nan == (comparison == "nan")
    elif comparison.endswith("u"):
        result = nan | getattr(operator, comparison[:-1])(x, y)
    else:
        result = ~nan & getattr(operator, comparison)(x, y)
    if len(sources) > 2:
        combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[name[2]]
        result = combine(result, block.value(sources[2], "pred", lanes))
    block.put(target, result, lanes)


def select(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (target, yes, no, predicate), _ = instruction
    values = [block.value(source, name[-1], lanes) for source in (yes, no)]
    block.put(target, np.where(block.value(predicate, "pred", lanes), *values), lanes)


def convert(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (target, *sources), _ = instruction
    to, kind = name[-2:]
    if to in ("f16x2", "bf16x2"):  # the first source becomes the upper half
        upper, lower = (to_half(block.value(s, kind, lanes), to[:-2]) for s in sources)
        block.put(target, upper.astype(np.uint32) << np.uint32(16) | lower, lanes)
        return
    (source,) = sources
    if kind in ("f16", "bf16"):
        value = from_half(block.value(source, "b16", lanes), kind)
    else:
        value = block.value(source, kind, lanes)
    if "sat" in name:
        value = np.clip(np.nan_to_num(value), 0, 1)
    if to in ("f16", "bf16"):
        value = to_half(value.astype(np.float32), to)
    elif value.dtype.kind == "f" and to[0] in "su":
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        value = next(function(value) for mode, function in rounding.items() if mode in name)
        limits = np.iinfo(TYPES[to])
        value = np.clip(np.nan_to_num(value), limits.min, limits.max).astype(TYPES[to])
    else:
        value = value.astype(TYPES[to])
    block.put(target, value, lanes)


def move(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """Also packs and unpacks: mov.b64 {low, high}, x."""
    _, name, (target, source), _ = instruction
    width = TYPES[name[-1]] if name[-1] == "pred" else np.dtype(f"u{int(name[-1][1:]) // 8}")
    if isinstance(target, tuple):
        value = block.value(source, name[-1], lanes)
        size = 8 * width.itemsize // len(target)
        for i, part in enumerate(target):
            block.put(part, (value >> width.type(size * i)).astype(f"u{size // 8}"), lanes)
    elif isinstance(source, tuple):
        size = 8 * width.itemsize // len(source)
        value = np.zeros(len(lanes), width)
        for i, part in enumerate(source):
            bits = block.value(part, f"b{size}", lanes).astype(width)
            value |= bits << width.type(size * i)
        block.put(target, value, lanes)
    else:
        block.put(target, block.value(source, name[-1], lanes), lanes)


def load(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (targets, address), _ = instruction
    targets = targets if isinstance(targets, tuple) else (targets,)
    dtype = np.dtype(TYPES[name[-1]])
    data = block.load(name, address, dtype.itemsize * len(targets), lanes).view(dtype)
    for target, value in zip(targets, data.T, strict=True):
        block.put(target, value, lanes)


def store(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (address, sources), _ = instruction
    sources = sources if isinstance(sources, tuple) else (sources,)
    values = [block.value(source, name[-1], lanes) for source in sources]
    block.store(name, address, np.stack(values, axis=1).view(np.uint8), lanes)


COMBINE = {
    "add": operator.add,
    "min": smaller,
    "max": larger,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
}


def atomic(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """One thread after the other."""
    _, name, (target, address, *sources), _ = instruction
    combine = next(COMBINE[part] for part in name if part in COMBINE)
    dtype = np.dtype(TYPES[name[-1]])
    for lane in lanes.reshape(-1, 1):
        old = block.load(name, address, dtype.itemsize, lane).view(dtype)[0]
        new = combine(old, *(block.value(source, name[-1], lane) for source in sources))
        block.store(name, address, np.array(new, dtype).reshape(1, 1).view(np.uint8), lane)
        block.put(target, old, lane)


def insert_bits(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (target, bits, into, start, length), _ = instruction
    bits, into = (block.value(operand, name[-1], lanes) for operand in (bits, into))
    mask = bits.dtype.type((1 << int(length)) - 1 << int(start))
    block.put(target, into & ~mask | bits << bits.dtype.type(start) & mask, lanes)


def convert_address(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """cvta.space: to a generic address; cvta.to.space: back. Those of global memory are alike."""
    _, name, (target, source), where = instruction
    if name[-2] not in ("global", "shared"):
        raise NotImplementedError(where)
    address = block.value(source, name[-1], lanes)
    window = address.dtype.type(SHARED_WINDOW if name[-2] == "shared" else 0)
    block.put(target, address - window if "to" in name else address + window, lanes)


def permute_bytes(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """prmt.b32 d, a, b, c: a nibble of c selects one of 8 bytes, or but its sign."""
    _, name, (target, *operands), where = instruction
    if len(name) > 2:
        raise NotImplementedError(where)
    low, high, selector = (block.value(operand, "u32", lanes) for operand in operands)
    octets = np.stack([low, high], axis=1).view(np.uint8)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, np.uint32)
    chosen = np.take_along_axis(octets, (nibbles & 7).astype(np.int64), axis=1)
    signs = (chosen.view(np.int8) >> 7).view(np.uint8)
    octets = np.ascontiguousarray(np.where(nibbles & 8, signs, chosen))
    block.put(target, octets.view(np.uint32)[:, 0], lanes)


def copy_async(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """cp.async: what is to come cannot be read before the thread has waited for it."""
    _, name, operands, where = instruction
    if name[2] == "commit_group":
        block.copies.commit(lanes)
    elif name[2] == "wait_group":
        for target, data in block.copies.land(lanes, int(operands[0])):
            block.shared.write(target, data)
    elif name[2] in ("ca", "cg") and len(operands) == 4:
        target, source, size, read = operands
        data = np.zeros((len(lanes), int(size)), np.uint8)
        read = block.value(read, "u32", lanes)
        if not np.isin(read, (0, int(size))).all():
            raise NotImplementedError(where)
        full = read > 0
        data[full] = block.load(("global",), source, int(size), lanes[full])
        address = block.address(target, lanes)
        block.shared.write(address, np.full_like(data, 0xFF))
        block.copies.start(lanes, address, data)
    else:
        raise NotImplementedError(where)


BITS = {
    "popc": lambda x, name: x.bit_count(),
    "clz": lambda x, name: int(name[-1][1:]) - x.bit_length(),
    "brev": lambda x, name: int(f"{x:0{name[-1][1:]}b}"[::-1], 2),
    # how far the highest bit that is set has to go left
    "bfind": lambda x, name: 32 - x.bit_length() if x else 0xFFFFFFFF,
}


def count_bits(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (target, source), where = instruction
    if name[0] == "bfind" and name[1:] != ("shiftamt", "u32"):
        raise NotImplementedError(where)
    values = block.value(source, name[-1].replace("s", "u"), lanes)
    results = [BITS[name[0]](int(value), name) for value in values]
    block.put(target, np.array(results, values.dtype), lanes)


EXECUTE = {
    **dict.fromkeys(ARITHMETIC, arithmetic),
    **dict.fromkeys(BITS, count_bits),
    **dict.fromkeys(("shl", "shr"), shift),
    "atom": atomic,
    "shf": funnel_shift,
    "setp": set_predicate,
    "selp": select,
    "cvt": convert,
    "mov": move,
    "cvta": convert_address,
    "ld": load,
    "st": store,
    "bfi": insert_bits,
    "prmt": permute_bytes,
    "cp": copy_async,
}
