# SPDX-License-Identifier: Apache-2.0
"""Runs the PTX that nvcc emits, on numpy.

The simulator next door runs what g++ makes of a kernel; this runs what nvcc makes of it: inline
assembly, ``#ifdef __CUDACC__`` and the compiler's own work.  An instruction that it does not know
raises NotImplementedError with its text.

Not modelled: memory order, races with asynchronous copies, the GPU's approximations.
"""

from itertools import product

import numpy as np

from tests.cudasim.ptx.block import Block, Launch
from tests.cudasim.ptx.collectives import MEET
from tests.cudasim.ptx.memory import Memory, PtxError
from tests.cudasim.ptx.opcodes import EXECUTE
from tests.cudasim.ptx.program import Kernel, Module

__all__ = ["EXECUTE", "MEET", "Memory", "Module", "PtxError", "launch", "run_blocks"]


def launch(kernel: Kernel, grid, block, *arguments, shared_bytes=0, limit=10**6) -> set[str]:
    """Run a kernel; the opcodes that were met.

    Args:
        kernel: of a Module
        grid, block: a number or three
        arguments: numpy arrays (those that are not writeable are inputs) and numbers
        shared_bytes: of dynamic shared memory
        limit: most instructions of a block, lest a kernel that never ends stops the tests
    """
    memory, parameters = Memory(), []
    if len(arguments) != len(kernel.parameters):
        raise ValueError(f"{kernel.name} has {len(kernel.parameters)} parameters")
    for argument, parameter in zip(arguments, kernel.parameters, strict=True):
        if isinstance(argument, np.ndarray):
            address = memory.add(argument, parameter.name, argument.flags.writeable)
            argument = np.uint64(address)
        elif isinstance(argument, int):
            argument = np.array(argument, f"i{parameter.size}")
        else:
            argument = np.array(argument, f"f{parameter.size}")
        parameters.append(argument.tobytes())
    return run_blocks(kernel, three(grid), three(block), shared_bytes, parameters, memory, limit)


def run_blocks(
    kernel, grid, block, shared_bytes, parameters: list[bytes], memory, limit=10**6
) -> set[str]:
    """Run a kernel on the bytes of its parameters; the opcodes that were met."""
    last = kernel.parameters[-1]
    data = np.zeros(last.start + last.size, np.uint8)
    for value, parameter in zip(parameters, kernel.parameters, strict=True):
        assert len(value) == parameter.size, parameter.name
        data[parameter.start :][: parameter.size] = np.frombuffer(value, np.uint8)
    memory.regions.extend(kernel.module.memory.regions)
    job = Launch(kernel, grid, block, shared_bytes, data, memory)
    met: set[str] = set()
    with np.errstate(all="ignore"):
        for z, y, x in product(*(range(size) for size in reversed(grid))):
            met |= Block(job, (x, y, z)).run(EXECUTE, MEET, limit)
    return met


def three(size) -> tuple[int, int, int]:
    sizes = size if isinstance(size, tuple) else (size,)
    return (*sizes, 1, 1, 1)[:3]
