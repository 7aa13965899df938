# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the kernels, kept by the hash of their sources."""

import ctypes
import functools
import hashlib
import os
import re
import runpy
from pathlib import Path

from tests.cudasim.build import CACHE, CSRC, HERE, ROOT, run
from tests.cudasim.ptx import Kernel, Module

ARCHITECTURE = "compute_90"
ANONYMOUS = re.compile(r"(\d+)(?=_GLOBAL__N_)")


def toolkit() -> tuple[Path | None, str]:
    """The CUDA toolkit that the build takes, or None, and the reason."""
    return runpy.run_path(str(ROOT / "setup.py"))["cuda_home"]()


def kept(stem: str, suffix: str, inputs: list[Path], command: list) -> Path:
    """Where the outcome of `command` on the inputs is kept, whether it is there yet or not."""
    CACHE.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr([str(part) for part in command]).encode())
    for path in inputs:
        key.update(path.read_bytes())
    return CACHE / f"{stem}-{key.hexdigest()[:16]}{suffix}"


def once(stem: str, suffix: str, inputs: list[Path], command: list) -> Path:
    """The file that `command` makes of the inputs with ``-o``."""
    target = kept(stem, suffix, inputs, command)
    if not target.exists():
        draft = target.with_suffix(f".{os.getpid()}{suffix}")
        run(*command, "-o", draft)
        draft.rename(target)
    return target


def sources(*folders: Path) -> list[Path]:
    return [
        path for folder in folders for path in sorted(folder.rglob("*.[hc]*")) if path.is_file()
    ]


@functools.cache
def emitted(source: Path, home: Path) -> Module:
    """The PTX that nvcc makes of a kernel file, ready to be interpreted."""
    return Module(ptx_file(source, home).read_text())


def ptx_file(source: Path, home: Path, architecture: str = ARCHITECTURE) -> Path:
    """The PTX that nvcc makes of a kernel file for an architecture and those after it."""
    flags = [
        "-std=c++17",
        "-O3",
        "-lineinfo",
        f"-arch={architecture}",
        f"-I{CSRC}",
        f"-I{HERE}",
        "-ptx",
    ]
    command = [home / "bin/nvcc", *flags, source]
    return once(source.stem, ".ptx", [*sources(CSRC), source], command)


@functools.cache
def product_kernels(home: Path) -> dict[str, Kernel]:
    """Every kernel of csrc, by its readable name."""
    modules = [emitted(source, home) for source in sorted(CSRC.rglob("*.cu"))]
    return {demangled(name): kernel for m in modules for name, kernel in m.kernels.items()}


@functools.cache
def demangled(name: str) -> str:
    """A C++ symbol in readable form, the same for g++ and nvcc."""
    demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
    demangle.restype = ctypes.c_char_p  # copied; the few bytes of the original are not freed
    # nvcc puts a hash of the file into the name of the anonymous namespace
    found = ANONYMOUS.search(name)
    if found:
        name = f"{name[: found.start()]}12_GLOBAL__N_1{name[found.end() + int(found[1]) :]}"
    return demangle(name.encode(), None, None, None).decode()


def short_name(kernel: str) -> str:
    """``f_kernel<float>`` of ``void detr_fast::(anonymous namespace)::f_kernel<float>(float*)``."""
    return re.search(r"(\w+_kernel(?:<.*>)?)\(", kernel)[1].replace("detr_fast::", "")
