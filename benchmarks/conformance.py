# SPDX-License-Identifier: Apache-2.0
"""Runs the conformance kernels of tests/cudasim on a GPU and keeps what they put out.

`--emit` compiles them where nvcc is, for a machine that has none: carry build/conformance.ptx.
On a CPU the simulator runs them, to try all but the driver.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # at the end: an installed detr_fast stands before the checkout's

from benchmarks.gpu_check import device_name, slug  # noqa: E402
from tests.cudasim import golden, load_test_kernels, scheduled, unsupported  # noqa: E402
from tests.cudasim.conformance import CASES, SOURCE, Launch  # noqa: E402
from tests.cudasim.driver import Driver  # noqa: E402
from tests.cudasim.ptx.emit import ptx_file, toolkit  # noqa: E402

CARRIED = ROOT / "build" / "conformance.ptx"
OLDEST = "compute_80"  # the driver compiles it for any later architecture
STAMP = "// kernels "


def stamp() -> str:
    """A line that tells PTX of these kernels from that of others."""
    return f"{STAMP}{' '.join(golden.identity(name) for name in CASES)}\n"


def emit(file: Path = CARRIED) -> Path:
    """Write the PTX of the kernels; nvcc is needed."""
    home, reason = toolkit()
    if home is None:
        raise FileNotFoundError(f"no nvcc to emit PTX: {reason}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(stamp() + ptx_file(SOURCE, home, OLDEST).read_text())
    return file


def ptx(carried: Path = CARRIED) -> str:
    """The PTX of the kernels: emitted where nvcc is, else carried."""
    home, reason = toolkit()
    if home is not None:
        return emit(carried).read_text()
    remedy = "run `python benchmarks/conformance.py --emit` where nvcc is"
    if not carried.exists():
        raise FileNotFoundError(f"no nvcc ({reason}) and no {carried.name} carried: {remedy}")
    text = carried.read_text()
    if not text.startswith(stamp()):
        raise ValueError(f"{carried.name} is of other kernels than the checkout's: {remedy}")
    return text


def simulated_differences(file: Path) -> tuple[dict[str, str], str]:
    """Where the simulator differs from a golden file, by case; or why it cannot tell."""
    if reason := unsupported():
        return {}, reason
    try:
        load_test_kernels(SOURCE)
    except (OSError, RuntimeError) as error:  # no g++, no headers
        return {}, f"the simulator does not build here: {str(error).splitlines()[0]}"
    with scheduled() as simulator:
        found = {
            name: golden.differences(outputs, name, simulator.launch)
            for name, outputs in golden.read(file).items()
        }
    return {name: text for name, text in found.items() if text}, ""


def main(argv: list[str] | None = None) -> int:
    """Write a golden file; 1 where the simulator differs from it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=golden.FOLDER, help="folder of the file")
    parser.add_argument("--emit", action="store_true", help=f"write {CARRIED.name} alone")
    options = parser.parse_args(argv)
    if options.emit:
        print(emit())
        return 0
    name, reason = device_name(options.device)
    if name is None:
        parser.error(f"no GPU: {reason}")
    file = options.output / f"{slug(name)}.json"
    golden.write(file, name, launcher(options.device))
    wrong, unknown = simulated_differences(file)
    print("\n".join(f"{case}: {text}" for case, text in wrong.items()))
    told = unknown or f"the simulator differs in {len(wrong)}"
    print(f"{len(CASES)} cases in {file.name}; {told}")
    return int(bool(wrong))


def launcher(device: str) -> Launch:
    """What runs a kernel on the device."""
    if device == "cuda":
        return Driver(ptx()).launch
    load_test_kernels(SOURCE)

    def launch(*arguments, **options) -> None:
        with scheduled() as simulator:
            simulator.launch(*arguments, **options)

    return launch


if __name__ == "__main__":
    sys.exit(main())
