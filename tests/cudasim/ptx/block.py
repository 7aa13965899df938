# SPDX-License-Identifier: Apache-2.0
"""Runs the threads of one block: every register is a numpy array with one element per thread.

The threads at the lowest program counter go first, so that threads that went different ways meet
again.  A warp instruction waits for the lanes of its mask, a barrier for all threads.
"""

from typing import NamedTuple

import numpy as np

from tests.cudasim.ptx.copies import Copies
from tests.cudasim.ptx.memory import Memory, PtxError
from tests.cudasim.ptx.program import Address, Instruction, Kernel, Operand

WARP = 32
WHOLE_WARP = ("mma", "ldmatrix")  # instructions without a mask
SHARED_WINDOW = 1 << 60  # where generic addresses find shared memory, beyond any of the host
TYPES = {
    "pred": np.bool_,
    **{f"b{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{f"u{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
}


class Launch(NamedTuple):
    """A kernel and what it was started with."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: np.ndarray  # uint8
    memory: Memory


class Block:
    """The state of one block."""

    def __init__(self, launch: Launch, index: tuple[int, int, int]):
        kernel = self.kernel = launch.kernel
        x, y, z = launch.block
        self.count = count = x * y * z
        self.threads = np.arange(count)
        self.registers = {
            name: np.zeros(count, TYPES["b" + kind[1:] if kind != "pred" else kind])
            for name, kind in kernel.registers.items()
        }
        own = (self.threads % x, self.threads // x % y, self.threads // (x * y))
        for axis, *values in zip("xyz", own, index, launch.block, launch.grid, strict=True):
            for name, value in zip(("tid", "ctaid", "ntid", "nctaid"), values, strict=True):
                full = np.broadcast_to(value, count).astype(np.uint32)
                self.registers[f"%{name}.{axis}"] = full
        # what nobody has written reads as NaN
        shared = np.full(kernel.shared.size + launch.shared_bytes, 0xFF, np.uint8)
        local = np.full(count * kernel.local.size, 0xFF, np.uint8)
        self.shared, self.local, self.parameters = Memory(), Memory(), Memory()
        self.shared.add(shared, "shared memory", writable=True, start=0)
        self.memory = Memory([*launch.memory.regions])  # what generic addresses reach
        self.memory.add(shared, "shared memory", writable=True, start=SHARED_WINDOW)
        self.local.add(local, "local memory", writable=True, start=0)
        self.parameters.add(launch.parameters, "the parameters", writable=False, start=0)
        parameters = {parameter.name: parameter.start for parameter in kernel.parameters}
        places = (kernel.module.symbols, kernel.shared.symbols, kernel.local.symbols, parameters)
        self.symbols = {name: at for place in places for name, at in place.items()}
        self.at = np.zeros(count, np.int64)  # program counters
        self.waits, self.done = np.zeros((2, count), bool)
        self.copies = Copies(count)

    # ---- operands

    def value(self, operand: Operand, kind: str, lanes: np.ndarray) -> np.ndarray:
        """The operand in the threads `lanes`, read as `kind` (``s32``, ``f64``, ``pred`` ...)."""
        dtype = np.dtype(TYPES[kind])
        if operand in self.registers:
            bits = self.registers[operand][lanes]
            if kind == "pred":
                return bits
            return bits.astype(f"u{dtype.itemsize}", copy=False).view(dtype)
        if operand.startswith("!"):
            return ~self.value(operand[1:], kind, lanes)
        if operand == "WARP_SZ":
            number = WARP
        elif operand in self.symbols:
            number = self.symbols[operand]
        elif operand[:2] in ("0f", "0d"):  # the bits of a float, of a double
            number = int(operand[2:], 16)
        else:
            number = int(operand.removesuffix("U"), 0)
        bits = np.array(number % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}")
        return np.full(len(lanes), bits.view(dtype))

    def put(self, register: Operand, value: np.ndarray, lanes: np.ndarray) -> None:
        """Set a register; narrower signed integers are extended, wider ones cut."""
        if register == "_":
            return
        target = self.registers[register]
        if value.dtype.kind == "f":
            value = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
        target[lanes] = value.astype(target.dtype, copy=False)

    def address(self, operand: Address, lanes: np.ndarray) -> np.ndarray:
        return self.value(operand.base, "s64", lanes) + operand.offset

    # ---- memory

    def space(self, name: tuple[str, ...], lanes: np.ndarray) -> tuple[Memory, np.ndarray | int]:
        """The memory that a load or store names, and what each thread adds to its addresses."""
        if "shared" in name:
            return self.shared, 0
        if "local" in name:
            return self.local, lanes * self.kernel.local.size
        if "param" in name:
            return self.parameters, 0
        return self.memory, 0

    def load(self, name: tuple[str, ...], address: Address, size: int, lanes: np.ndarray):
        memory, base = self.space(name, lanes)
        return memory.read(self.address(address, lanes) + base, size)

    def store(self, name: tuple[str, ...], address: Address, data, lanes: np.ndarray) -> None:
        memory, base = self.space(name, lanes)
        memory.write(self.address(address, lanes) + base, data)

    # ---- threads

    def run(self, execute, meet, limit: int) -> set[str]:
        """Run all threads to their end; the opcodes that were met.

        Args:
            execute: runs an instruction that each thread runs for itself
            meet: runs an instruction of a warp
            limit: most steps
        """
        met = set()
        for _ in range(limit):
            running = ~(self.done | self.waits)
            if not running.any():
                if self.done.all():
                    return met
                self._release_barrier()
                continue
            at = int(self.at[running].min())
            lanes = np.flatnonzero(running & (self.at == at))
            instruction = self.kernel.code[at]
            try:
                self._step(instruction, at, lanes, execute, meet)
            except PtxError as error:
                raise PtxError(f"{error}, at {instruction.where}") from None
            met.add(instruction.name[0])
        raise PtxError(f"no end after {limit} steps")

    def _step(self, instruction: Instruction, at: int, lanes: np.ndarray, execute, meet) -> None:
        guard, name, operands, _ = instruction
        self.at[lanes] = at + 1
        if guard:
            lanes = lanes[self.value(guard, "pred", lanes)]
        if not len(lanes):
            return
        if name[0] == "bra":
            self.at[lanes] = self.kernel.labels[operands[0]]
        elif name[0] == "ret":
            if self.copies.of(lanes):
                raise PtxError("exit with copies that were not waited for")
            self.done[lanes] = True
        elif name[0] in ("bar", "barrier") and name[1] != "warp":
            self._wait(at, lanes)
        elif name[0] in meet or name[:2] == ("bar", "warp"):
            self._wait(at, lanes)
            ready = self._complete_warps(instruction, at)
            if len(ready) and name[0] != "bar":
                meet[name[0]](self, instruction, ready)
            self.waits[ready] = False
            self.at[ready] = at + 1
        elif name[0] in execute:
            execute[name[0]](self, instruction, lanes)
        else:
            raise NotImplementedError(instruction.where)

    def _wait(self, at: int, lanes: np.ndarray) -> None:
        self.waits[lanes] = True
        self.at[lanes] = at

    def _complete_warps(self, instruction: Instruction, at: int) -> np.ndarray:
        """Threads at `instruction` whose masks wait for nobody any more."""
        here = np.flatnonzero(self.waits & (self.at == at))
        if instruction.name[0] in WHOLE_WARP:
            mask = "0xFFFFFFFF"
        else:
            mask = instruction.operands[0 if instruction.name[0] == "bar" else -1]
        needed = self.value(mask, "u32", here)
        arrived = np.zeros(-(-self.count // WARP), np.uint32)
        gone = np.full_like(arrived, 0xFFFFFFFF)
        alive = np.flatnonzero(~self.done)
        np.bitwise_or.at(arrived, here // WARP, lane_bits(here))
        np.bitwise_and.at(gone, alive // WARP, ~lane_bits(alive))
        if not (needed & lane_bits(here)).all():
            raise PtxError("a lane is not in its own mask")
        return here[(needed & ~(arrived | gone)[here // WARP]) == 0]

    def _release_barrier(self) -> None:
        waiting = np.flatnonzero(self.waits)
        places = np.unique(self.at[waiting])
        _, name, operands, _ = self.kernel.code[places[0]]
        if len(places) > 1 or name[0] not in ("bar", "barrier") or name[1] == "warp":
            raise PtxError("deadlock: threads wait at " + self._list(places))
        if "red" in name:  # bar.red.popc.u32 d, barrier, p
            votes = self.value(operands[-1], "pred", waiting)
            result = {"popc": votes.sum, "and": votes.all, "or": votes.any}[name[2]]()
            dtype = np.uint32 if name[2] == "popc" else np.bool_
            self.put(operands[0], np.full(len(waiting), result, dtype), waiting)
        self.waits[waiting] = False
        self.at[waiting] += 1

    def _list(self, places: np.ndarray) -> str:
        threads = [int((self.at == place)[self.waits].sum()) for place in places]
        where = [self.kernel.code[place].where for place in places]
        return "; ".join(f"{w} ({n} threads)" for w, n in zip(where, threads, strict=True))


def lane_bits(threads: np.ndarray) -> np.ndarray:
    return np.uint32(1) << (threads % WARP).astype(np.uint32)
