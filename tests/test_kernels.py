# SPDX-License-Identifier: Apache-2.0
"""What ptxas says of the kernels: needs nvcc, but no GPU."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(ROOT.glob("csrc/**/*.cu"), key=str)
# most registers that a thread of a kernel may use (65536 serve a multiprocessor)
REGISTERS = {"boxes_kernels": 80}
ENTRY = re.compile(
    r"entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?(?P<spilled>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_do_not_spill(source, tmp_path):
    setup = runpy.run_path(str(ROOT / "setup.py"))
    home, reason = setup["cuda_home"]()
    if home is None:
        pytest.skip(reason)
    names = [arch.replace(".", "") for arch in setup["ARCHITECTURES"]]
    command = [home / "bin/nvcc", "-std=c++17", "-O3", "--threads=0", "-Xptxas=-v"]
    command += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    command += [f"-I{ROOT / 'csrc'}", "-c", source, "-o", tmp_path / "kernels.o"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    entries = [match.groupdict() for match in ENTRY.finditer(log)]
    assert {entry["arch"] for entry in entries} == {f"sm_{name}" for name in names}
    assert not [entry for entry in entries if entry["spilled"] != "0"]
    assert not [entry for entry in entries if int(entry["registers"]) > REGISTERS[source.stem]]
