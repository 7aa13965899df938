# SPDX-License-Identifier: Apache-2.0
"""Instructions that each thread runs for itself, by opcode.

``EXECUTE[opcode](block, instruction, lanes)`` runs one for the threads `lanes`.
"""

import operator

import numpy as np

from tests.cudasim.ptx.block import TYPES, Block, Copy
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
    "sqrt": np.sqrt,
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "cvta": lambda x: x,
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
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        block.put(target, half_arithmetic(block, function, kind, sources, lanes), lanes)
        return
    values = [block.value(source, kind, lanes) for source in sources]
    if name[1] in ("wide", "hi"):
        wide = TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
        values[:2] = [value.astype(wide) for value in values[:2]]
        if name[1] == "wide" and len(values) == 3:
            values[2] = block.value(sources[2], f"{kind[0]}{2 * int(kind[1:])}", lanes)
        if name[1] == "hi":
            values = [(values[0] * values[1] >> wide.type(int(kind[1:]))).astype(TYPES[kind])]
            function = operator.pos
    block.put(target, function(*values), lanes)


def half_arithmetic(block, function, kind, sources, lanes) -> np.ndarray:
    """In float32, then rounded; x2: of the lower and the upper half of 32 bits."""
    half = kind.removesuffix("x2")
    parts = [np.uint32(0)] if kind == half else [np.uint32(0), np.uint32(16)]
    bits = [block.value(source, "b32", lanes) for source in sources]
    out = np.zeros(len(lanes), np.uint32)
    for part in parts:
        values = [from_half((b >> part).astype(np.uint16), half) for b in bits]
        out |= to_half(function(*values), half).astype(np.uint32) << part
    return out


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
    to, source = name[-2:]
    if to in ("f16x2", "bf16x2"):  # upper half first
        high, low = (to_half(block.value(s, "f32", lanes), to[:-2]) for s in sources)
        block.put(target, low | high.astype(np.uint32) << np.uint32(16), lanes)
        return
    if source in ("f16", "bf16"):
        value = from_half(block.value(sources[0], "b16", lanes), source)
    else:
        value = block.value(sources[0], source, lanes)
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
    """One thread after the other; red is atom without a result."""
    _, name, operands, _ = instruction
    address, *sources = operands[1:] if name[0] == "atom" else operands
    combine = next(COMBINE[part] for part in name if part in COMBINE)
    dtype = np.dtype(TYPES[name[-1]])
    for lane in lanes.reshape(-1, 1):
        old = block.load(name, address, dtype.itemsize, lane).view(dtype)[0]
        new = combine(old, *(block.value(source, name[-1], lane) for source in sources))
        block.store(name, address, np.array(new, dtype).reshape(1, 1).view(np.uint8), lane)
        if name[0] == "atom":
            block.put(operands[0], old, lane)


def copy_async(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """What is copied arrives with the wait, until then its place reads as NaN."""
    _, name, operands, _ = instruction
    if "commit_group" in name:
        block.copies.append([])
    elif "wait_group" in name:
        keep = int(operands[0]) + 1  # and the open group
        arriving = block.copies[:-keep]
        block.copies = block.copies[-keep:]
        for copy in (copy for group in arriving for copy in group):
            for target, source, read in zip(copy.target, copy.source, copy.read, strict=True):
                data = np.zeros((1, copy.size), np.uint8)
                if read:
                    data[:, :read] = block.memory.read(source.reshape(1), int(read))
                block.shared.write(target.reshape(1), data)
    else:
        size = int(operands[2])
        read = block.value(operands[3] if len(operands) > 3 else operands[2], "u32", lanes)
        target, source = (block.address(operand, lanes) for operand in operands[:2])
        block.shared.write(target, np.full((len(lanes), size), 0xFF, np.uint8))
        block.copies[-1].append(Copy(lanes, target, source, size, read))


def insert_bits(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    target, bits, into, start, length = instruction.operands
    mask = np.uint32((1 << int(length)) - 1 << int(start))
    bits, into = (block.value(operand, "b32", lanes) for operand in (bits, into))
    block.put(target, into & ~mask | bits << np.uint32(start) & mask, lanes)


def highest_bit(number: int, by_shift: bool) -> int:
    """Position of the highest bit that is set, or how far it has to go left; -1 for 0."""
    if number == 0:
        return 0xFFFFFFFF
    return 32 - number.bit_length() if by_shift else number.bit_length() - 1


BITS = {
    "popc": lambda x, name: x.bit_count(),
    "clz": lambda x, name: int(name[-1][1:]) - x.bit_length(),
    "brev": lambda x, name: int(f"{x:0{name[-1][1:]}b}"[::-1], 2),
    "bfind": lambda x, name: highest_bit(x, "shiftamt" in name),
}


def count_bits(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    _, name, (target, source), _ = instruction
    values = block.value(source, name[-1].replace("s", "u"), lanes)
    results = [BITS[name[0]](int(value), name) for value in values]
    block.put(target, np.array(results, values.dtype), lanes)


def no_effect(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """Fences: threads see each other's writes at once here."""


EXECUTE = {
    **dict.fromkeys(ARITHMETIC, arithmetic),
    **dict.fromkeys(BITS, count_bits),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(("atom", "red"), atomic),
    "membar": no_effect,
    "shf": funnel_shift,
    "setp": set_predicate,
    "selp": select,
    "cvt": convert,
    "mov": move,
    "ld": load,
    "st": store,
    "cp": copy_async,
    "bfi": insert_bits,
}
