# SPDX-License-Identifier: Apache-2.0
"""Puts the interpreted PTX of the CUDA kernels in the place of the CPU ops.

The host side of an op (``*_cuda.cpp`` and ``launch_*``) is compiled by g++ with a header that hands
each launch over: grid, block and arguments are those of a real launch, and the kernel is the one
that nvcc makes.
"""

import ctypes
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from tests.cudasim.build import CSRC, FLAGS, TORCH, includes, runtime
from tests.cudasim.ptx import Memory, run_blocks
from tests.cudasim.ptx.emit import demangled, once, product_kernels, sources

HERE = Path(__file__).absolute().parent
NAMESPACE = "detr_fast_ptx"


@functools.cache
def library() -> Path:
    """The ops of csrc with a host side that records its launches."""
    headers = [path for path in sources(CSRC, HERE.parent) if path.suffix in (".h", ".cuh")]
    names = (f"-DDETR_FAST_NAMESPACE={NAMESPACE}", "-DDETR_FAST_CUDA_KEY=CPU")
    flags = [*FLAGS, *names, f"-I{HERE}", *includes(CSRC), "-O0", "-x", "c++", "-w"]
    files = [CSRC / "ops.cpp", HERE / "recorder.cpp"]
    files += sorted([*CSRC.rglob("*_cuda.cpp"), *CSRC.rglob("*.cu")])

    def compile_one(source: Path) -> Path:
        return once(f"ptx-{source.stem}", ".o", [*headers, source], ["g++", *flags, "-c", source])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, files))
    # the simulator resolves what the bodies of the kernels call
    link = ["g++", "-shared", *objects, runtime(), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch"]
    return once(f"lib{NAMESPACE}", ".so", objects, link)


LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_void_p,
)
TRACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int)
UNTRACK_ALL = ctypes.CFUNCTYPE(None)


class Callbacks(ctypes.Structure):
    _fields_ = (("launch", LAUNCH), ("track", TRACK), ("untrack_all", UNTRACK_ALL))


class Interpreter:
    """Answers the recorder's calls; keeps the kernels that ran and the opcodes that were met."""

    def __init__(self, home: Path):
        self.kernels = product_kernels(home)
        self.memory = Memory()
        self.launched: set[str] = set()
        self.opcodes: set[str] = set()
        self.callbacks = Callbacks(
            LAUNCH(self._launch), TRACK(self._track), UNTRACK_ALL(self._untrack_all)
        )

    def _launch(self, tag, sizes, shared_bytes, count, arguments, size_of, error) -> None:
        try:
            name = next(name for name in self.kernels if name in demangled(tag.decode()))
            values = [ctypes.string_at(arguments[i], size_of[i]) for i in range(count)]
            grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
            kernel = self.kernels[name]
            met = run_blocks(kernel, grid, block, shared_bytes, values, self.memory)
            self.opcodes |= met
            self.launched.add(name)
        except Exception as reason:  # an exception cannot pass through C++
            text = f"{type(reason).__name__}: {reason}".encode()[:1000]
            ctypes.memmove(error, text + b"\0", len(text) + 1)

    def _track(self, data, size, name, writable) -> None:
        if size:
            array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(data))
            self.memory.add(array, name.decode(), bool(writable))

    def _untrack_all(self) -> None:
        self.memory = Memory()


@contextmanager
def interpreted(home: Path) -> Iterator[Interpreter]:
    """Within this context the ops of detr_fast on CPU tensors run the PTX of their kernels."""
    interpreter = Interpreter(home)
    torch.ops.load_library(library())
    ctypes.CDLL(library()).ptx_connect(ctypes.byref(interpreter.callbacks))
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    override = torch.library.Library("detr_fast", "IMPL")
    try:
        for name in sorted(n for n in names if n.startswith(f"{NAMESPACE}::")):
            op = name.split("::")[1]
            kernel = getattr(getattr(torch.ops, NAMESPACE), op).default
            override.impl(op, kernel, "CPU", allow_override=True)
        yield interpreter
    finally:
        override._destroy()
