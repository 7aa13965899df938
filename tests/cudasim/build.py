# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/ with g++ into a library of simulated CUDA ops."""

import hashlib
import os
import runpy
import subprocess
import sysconfig
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
# Every load and store of a kernel becomes a call of the checker; libtsan is never linked.
KERNEL_FLAGS = [
    *("-x", "c++", "-O1", "-g", "-fstack-clash-protection", "-ftls-model=local-dynamic"),
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,"
    "float-cast-overflow",
    *("--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0"),
    "-Wno-unknown-pragmas",
]


def cuda_headers() -> Path:
    """The headers of a CUDA toolkit, or of the wheels that torch's CUDA builds depend on."""
    toolkits = runpy.run_path(str(ROOT / "setup.py"))["toolkits"]()
    wheels = sorted(TORCH.parent.glob("nvidia/*"))
    for folder in (*toolkits, *wheels):
        if (folder / "include/cuda_fp16.h").exists():
            return folder / "include"
    raise FileNotFoundError("the simulator needs CUDA's headers: set CUDA_HOME")


def includes(csrc: Path) -> list[str]:
    """Include path; ``common`` of this folder stands before that of csrc."""
    torch_headers = (TORCH / "include", TORCH / "include/torch/csrc/api/include")
    folders = (HERE, csrc, *torch_headers, cuda_headers(), sysconfig.get_path("include"))
    return [f"-I{folder}" for folder in folders[:2]] + [f"-isystem{f}" for f in folders[2:]]


def library(csrc: Path = CSRC, namespace: str = "detr_fast_sim") -> Path:
    """Build the ops of ``csrc`` in ``namespace``; objects are kept by the hash of their inputs."""
    CACHE.mkdir(parents=True, exist_ok=True)
    headers = [p for folder in (csrc, HERE) for p in sorted(folder.rglob("*.[hc]*"))]
    common = hashlib.sha256(torch.__version__.encode())
    for header in headers:
        if header.suffix in (".h", ".cuh"):
            common.update(header.read_bytes())
    names = (f"-DDETR_FAST_NAMESPACE={namespace}", "-DDETR_FAST_CUDA_KEY=CPU")
    flags = [*FLAGS, *names, *includes(csrc)]

    def compile_one(source: Path) -> Path:
        kernel_flags = KERNEL_FLAGS if source.suffix == ".cu" else ["-O2"]
        key = common.copy()
        key.update(source.read_bytes() + repr([kernel_flags, FLAGS, namespace]).encode())
        target = CACHE / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            draft = target.with_suffix(f".{os.getpid()}.o")
            run("g++", *flags, *kernel_flags, "-c", source, "-o", draft)
            draft.rename(target)
        return target

    sources = [csrc / "ops.cpp", HERE / "cudasim_rt.cpp"]
    sources += sorted([*csrc.rglob("*_cuda.cpp"), *csrc.rglob("*.cu")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    key = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    target = CACHE / f"lib{namespace}-{key}.so"
    if not target.exists():
        libraries = (f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch")
        draft = target.with_suffix(f".{os.getpid()}.so")
        run("g++", "-shared", *objects, "-o", draft, *libraries)
        draft.rename(target)
    return target


def run(*command) -> None:
    """Run a compiler; its messages become the error."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")
