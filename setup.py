# SPDX-License-Identifier: Apache-2.0
"""Builds ``detr_fast._C`` (schemas, CPU) and, where CUDA fits, ``detr_fast._C_cuda``.

Metadata is in pyproject.toml.  Environment: ``DETR_FAST_CUDA`` (0: no, 1: or fail, unset: if it
fits), ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CXX_FLAGS = [
    *("-O3", "-g0", "-Wall", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="),
    # loops that vectorise; elements that do not depend on the processor
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-ffp-contract=off"),
    "-fno-wrapv",  # Python's flags have -fwrapv, which keeps GCC from vectorising row[c + k]
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10
]
NVCC_FLAGS = ["-O3", "-lineinfo", "--threads=4", "-Xcompiler=-Wall,-fvisibility=hidden"]


def toolkits():
    """Folders that may hold a CUDA toolkit: CUDA_HOME alone, or nvcc's own and the usual ones."""
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home)
        return
    if nvcc := shutil.which("nvcc"):
        # nvcc on the PATH may be a wrapper script; its dry run names the real folder
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True)
        if top := re.search(rb"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE):
            yield Path(os.fsdecode(top[1].strip())).resolve()
    yield from (*sorted(Path("/usr/local").glob("cuda*"), reverse=True), Path("/opt/cuda"))


def ask_nvcc(home: Path, question: str) -> str:
    return subprocess.check_output([home / "bin/nvcc", question], text=True)


def cuda_home() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None, and the reason."""
    wish, wanted = os.environ.get("DETR_FAST_CUDA"), torch.version.cuda
    if wish == "0":
        return None, "without CUDA: DETR_FAST_CUDA=0"
    reason = "no toolkit found, see CUDA_HOME" if wanted else f"torch {torch.__version__} has none"
    for home in toolkits() if wanted else ():
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            release = re.search(r"release ([\d.]+)", ask_nvcc(home, "--version"))[1]
            if release.split(".")[0] == wanted.split(".")[0]:
                return home, f"with CUDA {release}"
            reason = f"torch needs CUDA {wanted}, {home} is {release}"
    if wish == "1":
        sys.exit(f"detr_fast: DETR_FAST_CUDA=1, but {reason}")
    return None, f"without CUDA: {reason}"


def architectures(home: Path) -> str:
    """TORCH_CUDA_ARCH_LIST, or those of ARCHITECTURES that this nvcc knows and newest PTX."""
    known = ask_nvcc(home, "--list-gpu-arch").split()
    ours = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(ours) + "+PTX"


def main() -> None:
    home, build = cuda_home()
    if home:  # torch takes both from the environment
        os.environ["CUDA_HOME"] = str(home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(home)
        build += f" for {os.environ['TORCH_CUDA_ARCH_LIST']}"
    print(f"detr_fast: building {build}")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def build_extension(self, extension):  # kept: an edit recompiles what it changed
            self.build_temp = f"build/torch-{torch.__version__}/{extension.name}"
            super().build_extension(extension)

    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*"))
    cuda = [f for f in files if f.endswith((".cu", "_cuda.cpp"))]
    cpu = [f for f in files if f.endswith(".cpp") and f not in cuda]
    common = {"include_dirs": [str(ROOT / "csrc")], "py_limited_api": True}
    common["depends"] = [f for f in files if f.endswith((".h", ".cuh"))]
    cxx = [*CXX_FLAGS, "-DUSE_CUDA", f'-DDETR_FAST_BUILD="{build}"']
    flags = {"cxx": cxx, "nvcc": NVCC_FLAGS}
    extensions = [CppExtension("detr_fast._C", cpu, extra_compile_args=flags, **common)]
    if home:
        extension = CUDAExtension("detr_fast._C_cuda", cuda, extra_compile_args=flags, **common)
        extension.libraries.remove("cudart")  # the one that torch has loaded serves
        extensions.append(extension)
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    setup(ext_modules=extensions, cmdclass={"build_ext": Build}, options=options)


if __name__ == "__main__":
    main()
