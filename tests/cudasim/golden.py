# SPDX-License-Identifier: Apache-2.0
"""What a GPU made of the conformance kernels, kept as bit patterns in ``golden/<device>.json``.

An entry holds the kernel's own text and its inputs as a hash: where one has changed since, the
entry says nothing until ``gpu_check.sh conformance`` has run on that device again.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from tests.cudasim.conformance import CASES, SOURCE, Launch

FOLDER = Path(__file__).parent / "golden"
MOST_NAMED = 3  # elements that a message names


def identity(name: str) -> str:
    """A hash of a kernel's text, its inputs and its launch."""
    case = CASES[name]
    text = re.search(
        rf"__global__ void {name}\(.*?^}}", SOURCE.read_text(), re.DOTALL | re.MULTILINE
    )
    total = hashlib.sha256(text[0].encode())
    total.update(repr((case.block, case.grid, case.shared_bytes)).encode())
    for array in (*case.inputs, *case.outputs):
        total.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return total.hexdigest()[:16]


def write(file: Path, device: str, launch: Launch) -> None:
    """Run all cases and keep what they put out."""
    entries = {}
    for name, case in CASES.items():
        outputs = [
            {"dtype": str(out.dtype), "rows": [row.tobytes().hex() for row in np.atleast_2d(out)]}
            for out in case.run(name, launch)
        ]
        entries[name] = {"identity": identity(name), "outputs": outputs}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps({"device": device, "cases": entries}, indent=1) + "\n")
    draft.replace(file)


def read(file: Path) -> dict[str, list[np.ndarray]]:
    """The outputs of the cases that are still what they were when the file was written."""
    cases = json.loads(file.read_text())["cases"]
    return {
        name: [
            np.array([np.frombuffer(bytes.fromhex(row), out["dtype"]) for row in out["rows"]])
            for out in case["outputs"]
        ]
        for name, case in cases.items()
        if name in CASES and case["identity"] == identity(name)
    }


def differences(golden: list[np.ndarray], name: str, launch: Launch) -> str:
    """In which elements a launch differs from what a GPU made of it; nothing where it agrees.

    Bit for bit, but for the rows that have a tolerance.
    """
    found = []
    for number, (wanted, out) in enumerate(zip(golden, CASES[name].run(name, launch), strict=True)):
        got = np.atleast_2d(out)
        bits = f"u{got.itemsize}"
        wrong = got.view(bits) != wanted.view(bits)
        for row, (relative, absolute) in CASES[name].tolerance.items():
            wrong[row] &= ~np.isclose(got[row], wanted[row], relative, absolute)
        found += [
            f"output {number}, row {row}, column {column}: {got[row, column]}, "
            f"on the GPU {wanted[row, column]}"
            for row, column in np.argwhere(wrong)
        ]
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return "; ".join(found[:MOST_NAMED]) + more
