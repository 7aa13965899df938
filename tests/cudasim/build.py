# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels with g++: the simulator's runtime, and libraries of simulated kernels.

Objects and libraries are kept in ``build/cudasim`` under a hash of everything that made them, and
get their name when they are complete: several test runs may build at a time, and one that dies
leaves nothing that another would take for a result.
"""

import fcntl
import functools
import hashlib
import os
import platform
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cudasim"
TORCH = Path(torch.__file__).parent

FLAGS = [
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", '-DDETR_FAST_BUILD="for the simulator"'),
]
HOST_FLAGS = ["-O2", "-g1"]
KERNEL_FLAGS = [
    *("-x", "c++", "-g", "-Wno-unknown-pragmas"),
    "-ftls-model=local-dynamic",  # shared arrays
    "-fstack-clash-protection",  # a frame that is too large must meet the guard page
]
FAST_FLAGS = ["-O2"]
# Every load and store of a kernel becomes a call of the checker; libtsan is never linked.
CHECK_FLAGS = [
    "-O1",
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,"
    "float-cast-overflow",
    *("--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0"),
]


def unsupported() -> str:
    """Why the simulator does not run on this machine; nothing where it does."""
    machine, system = platform.machine(), platform.system()
    if (machine, system) == ("x86_64", "Linux"):
        return ""
    return f"the simulator's fibers are written for x86-64 Linux, not for {machine} {system}"


@functools.cache
def cuda_headers() -> Path:
    """The headers of a CUDA toolkit, or of the wheels that torch's CUDA builds depend on."""
    toolkits = runpy.run_path(str(ROOT / "setup.py"))["toolkits"]()
    wheels = sorted(TORCH.parent.glob("nvidia/*"))
    for folder in (*toolkits, *wheels):
        if (folder / "include/cuda_fp16.h").exists():
            return folder / "include"
    raise FileNotFoundError("the simulator needs CUDA's headers: set CUDA_HOME")


@functools.cache
def compiler() -> str:
    """What else an object depends on: compiler, Python, torch and CUDA's headers."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    return f"{version.stdout}{sys.version}{torch.__version__}{cuda_headers()}"


def includes(*folders: Path) -> list[str]:
    """Include path; ``common`` of this folder stands before that of csrc."""
    torch_headers = (TORCH / "include", TORCH / "include/torch/csrc/api/include")
    system = (*torch_headers, cuda_headers(), sysconfig.get_path("include"))
    return [*(f"-I{f}" for f in (HERE, *folders)), *(f"-isystem{f}" for f in system)]


def digest(*parts: object) -> str:
    """A short hash of the contents of files and of the representation of anything else."""
    total = hashlib.sha256(compiler().encode())
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return total.hexdigest()[:16]


def run(*command: object) -> None:
    """Run a compiler; its messages become the error."""
    arguments = [str(c) for c in command]
    result = subprocess.run(arguments, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{result.stderr}")


def make(target: Path, *arguments: object) -> Path:
    """Have g++ write ``target``, unless it is there; a second process waits for the first."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            draft = target.with_suffix(f".draft{target.suffix}")
            run("g++", *arguments, "-o", draft)
            draft.rename(target)
    return target


def compile_all(
    sources: Sequence[Path], csrc: Path, defines: Sequence[str], check: bool
) -> list[Path]:
    """Compile every source to an object."""
    headers = sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cuh")])
    own = ("*.h", "common/*.h", "common/*.cuh", "runtime/*.h")
    headers += sorted(path for pattern in own for path in HERE.glob(pattern))

    def compile_one(source: Path) -> Path:
        if source.suffix == ".cu":
            flags = [*FLAGS, *KERNEL_FLAGS, *(CHECK_FLAGS if check else FAST_FLAGS)]
        else:
            flags = [*FLAGS, *HOST_FLAGS, *defines]
        target = CACHE / f"{source.stem}-{digest(source, *headers, flags)}.o"
        return make(target, *flags, *includes(csrc), "-c", source)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


@functools.cache
def runtime() -> Path:
    """Build the simulator itself, a Python module that all kernels of a process are linked to."""
    objects = compile_all(sorted(HERE.glob("runtime/*.cpp")), HERE / "runtime", [], check=False)
    target = CACHE / f"runtime-{digest(*objects)}" / "cudasim.so"
    return make(target, "-shared", *objects)


def kernel_library(name: str, sources: Sequence[Path], *flags: object, **options) -> Path:
    """Link compiled ``sources`` and the simulator; options are those of `compile_all`."""
    objects = compile_all(sources, **options)
    target = CACHE / f"lib{name}-{digest(*objects, runtime(), flags)}.so"
    return make(target, "-shared", *objects, runtime(), *flags)


def library(csrc: Path = CSRC, namespace: str = "detr_fast_sim", check: bool = True) -> Path:
    """Build the ops of ``csrc`` in ``namespace``; without ``check`` faults go unseen."""
    sources = [csrc / "ops.cpp", *sorted([*csrc.rglob("*_cuda.cpp"), *csrc.rglob("*.cu")])]
    defines = [f"-DDETR_FAST_NAMESPACE={namespace}", "-DDETR_FAST_CUDA_KEY=CPU"]
    torch_libraries = (f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch")
    return kernel_library(
        namespace, sources, *torch_libraries, csrc=csrc, defines=defines, check=check
    )


def bare_library(source: Path, check: bool = True) -> Path:
    """Build a file of kernels that no op wraps; the simulator's ``launch`` runs them by name."""
    return kernel_library(source.stem, [source], csrc=CSRC, defines=[], check=check)
