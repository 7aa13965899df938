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
# Most registers that a thread of a kernel may use on any architecture, by the type of its elements,
# in the eights that they are given in; 65536 serve the threads of a multiprocessor.
HALVES = ("__half", "__nv_bfloat16")
REGISTERS = {
    "attention_kernel": dict.fromkeys(HALVES, 168),  # three blocks of 128 threads
    "attention_statistics_kernel": dict.fromkeys(HALVES, 24),
    "attention_backward_kernel": dict.fromkeys(HALVES, 168),
    "pairwise_iou_kernel": {"float": 24, "double": 40},
    "pairwise_iou_backward_rows_kernel": {"float": 56, "double": 72},
    "pairwise_iou_backward_columns_kernel": {"float": 56, "double": 72},
    "sum_splits_kernel": {"float": 40, "double": 40},
    "generalized_box_iou_loss_kernel": {"float": 24, "double": 40},
    "generalized_box_iou_loss_backward_kernel": {"float": 40, "double": 56},
    "matched_box_losses_kernel": {"float": 32, "double": 40},
    "matched_box_losses_backward_kernel": {"float": 56, "double": 72},
    "linear_sum_assignment_kernel": {"float": 112, "double": 112},
    "hungarian_match_kernel": {"float": 128, "double": 152},
    "set_loss_kernel": {"float": 72, "double": 152},
    "set_loss_finish_kernel": {"float": 64, "double": 64},
    "set_loss_backward_kernel": {"float": 72, "double": 152},
    "normalize_images_kernel": dict.fromkeys(("float", *HALVES), 40),
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
    def limit(self):
        kernel, scalar = kernel_and_type(self.symbol)
        return REGISTERS.get(kernel, {}).get(scalar, 0)


def kernel_and_type(symbol):
    """("f_kernel", "float") of the symbol of f_kernel<..., float>."""
    kernel, _, arguments = short_name(demangled(symbol)).removesuffix(">").partition("<")
    return kernel, arguments.split(", ")[-1]


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
    assert not [entry for entry in entries if int(entry.registers) > entry.limit]


def test_no_limit_outlives_its_kernel(build):
    home, *_ = build
    kernels = {short_name(name).partition("<")[0] for name in product_kernels(home)}
    assert kernels == set(REGISTERS)
