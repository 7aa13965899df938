# SPDX-License-Identifier: Apache-2.0
"""What ptxas says of the kernels, for every architecture of the build: needs nvcc, but no GPU."""

import re
import runpy
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cudasim.ptx.emit import demangled, kept, product_kernels, short_name, sources

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(ROOT.glob("csrc/**/*.cu"), key=str)
# Most registers that a thread of a kernel may use on any architecture; 65536 serve the threads of a
# multiprocessor: 64 let 1024 of them run at a time, 128 let 512.
REGISTERS = {
    "generalized_box_iou_kernel<float>": 32,
    "generalized_box_iou_kernel<double>": 64,
    "generalized_box_iou_backward_kernel<float>": 48,
    "generalized_box_iou_backward_kernel<double>": 80,
}
ENTRY = re.compile(
    r"entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Entry(NamedTuple):
    symbol: str
    arch: str
    stack: str
    stores: str
    loads: str
    registers: str

    @property
    def kernel(self):
        return short_name(demangled(self.symbol))


@pytest.fixture(scope="session")
def build():
    """What setup.py says of the build."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    home, reason = setup["cuda_home"]()
    if home is None:
        pytest.skip(reason)
    architectures = [arch.replace(".", "") for arch in setup["ARCHITECTURES"]]
    return home, architectures, setup["NVCC_FLAGS"]


@pytest.fixture(params=KERNELS, ids=lambda path: path.stem)
def entries(request, build, tmp_path):
    """ptxas on each kernel of a file and each architecture, where a source has changed."""
    home, architectures, flags = build
    command = [home / "bin/nvcc", "-std=c++17", *flags, "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    command += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    command += ["-c", request.param]
    log = kept(request.param.stem, ".log", [*sources(ROOT / "csrc")], command)
    if not log.exists():
        result = subprocess.run([*command, "-o", tmp_path / "o"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        log.write_text(result.stderr)
    found = [Entry(**match.groupdict()) for match in ENTRY.finditer(log.read_text())]
    assert {entry.arch for entry in found} == {f"sm_{name}" for name in architectures}
    return found


def test_kernels_do_not_spill(entries):
    assert not [
        entry for entry in entries if (entry.stack, entry.stores, entry.loads) != ("0",) * 3
    ]


def test_kernels_keep_to_their_registers(entries):
    assert not [entry for entry in entries if int(entry.registers) > REGISTERS[entry.kernel]]


def test_no_limit_outlives_its_kernel(build):
    kernels = {short_name(name) for name in product_kernels(build[0])}
    assert kernels == set(REGISTERS)
