# SPDX-License-Identifier: Apache-2.0
"""Instructions of the attention kernels' main loops on sm_90: needs nvcc and nvdisasm, but no GPU.

A multiprocessor issues 128 lane-instructions a clock: what a score takes of them bounds the speed.
Counted is the way through a loop that computes and copies; what masks the last step is jumped over.
"""

import re
import runpy
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cudasim.ptx.emit import demangled, once, short_name, sources

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = ROOT / "csrc/attention"
LANES = 32
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?P<guard>@\S+)?\s*(?P<text>.*?)\s*;")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
HOT = ("HMMA", "LDGSTS")  # tensor cores, asynchronous copies


class Loop(NamedTuple):
    """What a warp does in a step of a main loop, and what a score may take of it."""

    name: str
    scores: int
    most: float  # instructions of a lane
    most_with_dropout: float
    turns: int = 1  # of an inner loop, which holds all products


# By kernel and by products of tensor cores in a step or a turn.  Bare kernels without padding and
# masks take 6.6 (with dropout 10.9) for many queries forward, 8.5 for keys and values, 6.9 for
# their queries.
LOOPS = {
    "attention_kernel": {
        72: Loop("many queries", 32 * 64, 7.1, 12.0),
        18: Loop("few queries", 16 * 32, 11.6, 22.0),
    },
    "attention_backward_kernel": {
        32: Loop("keys and values", 32 * 64, 8.8, 12.4, turns=4),
        96: Loop("many queries", 32 * 64, 6.6, 9.3),
        48: Loop("few queries", 32 * 32, 8.8, 11.9),
    },
}


class Code(NamedTuple):
    """The instructions of a kernel."""

    guards: list[str]
    texts: list[str]
    labels: dict[str, int]

    def opcode(self, at: int) -> str:
        return re.split(r"[.\s]", self.texts[at])[0]

    def target(self, at: int) -> int | None:
        """Where a branch goes."""
        found = TARGET.search(self.texts[at]) if self.opcode(at) == "BRA" else None
        return self.labels[found[1]] if found else None

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of the innermost loops that use tensor cores."""
        backward = [(self.target(i), i) for i in range(len(self.texts))]
        found: list[tuple[int, int]] = []
        loops = [(start, end) for start, end in backward if start is not None and start <= end]
        for start, end in sorted(loops, key=lambda loop: loop[1] - loop[0]):
            products = any(self.opcode(i) == "HMMA" for i in range(start, end + 1))
            if products and all(end < other[0] or other[1] < start for other in found):
                found.append((start, end))
        return found

    def around(self, start: int, end: int) -> tuple[int, int] | None:
        """The innermost of the loops that hold another one."""
        backward = [(self.target(i), i) for i in range(end + 1, len(self.texts))]
        loops = [(first, last) for first, last in backward if first is not None and first <= start]
        return min(loops, key=lambda loop: loop[1] - loop[0], default=None)

    def step(self, start: int, end: int) -> Counter:
        """Opcodes of the shortest way through a loop that takes all of what is hot."""
        ways: dict[int, tuple[int, int, int]] = {start: (0, 0, -1)}  # -hot, length, from where
        for at in range(start, end + 1):
            if at not in ways:
                continue
            hot, length, _ = ways[at]
            jump = self.target(at)
            always = jump is not None and not self.guards[at] and self.texts[at].startswith("BRA `")
            followers = [] if always or self.opcode(at) == "EXIT" else [at + 1]
            followers += [jump] if jump is not None and jump > at else []
            for follower in followers:
                way = (hot - (self.opcode(at) in HOT), length + 1, at)
                ways[follower] = min(ways.get(follower, way), way)
        way, at = [end], end
        while at != start:
            at = ways[at][2]
            way.append(at)
        return Counter(self.opcode(at) for at in way)


def parsed(text: str) -> dict[str, Code]:
    """What nvdisasm says of a cubin, by the symbols of the kernels."""
    kernels = {}
    for section in text.split("\t.section\t.text.")[1:]:
        code = Code([], [], {})
        for line in section.splitlines():
            if label := LABEL.match(line):
                code.labels[label[1]] = len(code.texts)
            elif instruction := INSTRUCTION.match(line):
                code.guards.append(instruction["guard"] or "")
                code.texts.append(instruction["text"])
        kernels[section.partition(",")[0]] = code
    return kernels


@pytest.fixture(scope="module")
def kernels():
    """The code of every attention kernel, by its readable name."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    home, reason = setup["cuda_home"]()
    if home is None:
        pytest.skip(reason)
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm"))
    disassembler = next((p for p in [home / "bin/nvdisasm", *wheels] if p.exists()), None)
    disassembler = disassembler or shutil.which("nvdisasm")
    if disassembler is None:
        pytest.skip("no nvdisasm: not in the toolkit, nor is nvidia-cuda-nvdisasm installed")
    found = {}
    for source in sorted(ATTENTION.glob("*.cu")):
        command = [home / "bin/nvcc", "-std=c++17", *setup["NVCC_FLAGS"], f"-I{ROOT / 'csrc'}"]
        command += ["-arch=sm_90", "-cubin", source]
        cubin = once(source.stem, ".cubin", [*sources(ROOT / "csrc")], command)
        result = subprocess.run(
            [disassembler, "-c", cubin], capture_output=True, text=True, check=True
        )
        codes = parsed(result.stdout)
        found |= {short_name(demangled(symbol)): code for symbol, code in codes.items()}
    return found


def test_scores_take_few_instructions(kernels):
    found, too_many = set(), []
    for name, code in kernels.items():
        kernel, dropout = name.partition("<")[0], "true" in name
        for start, end in code.loops():
            # a product needs its whole warp
            products = [i for i in range(start, end + 1) if code.opcode(i) == "HMMA"]
            assert not any(code.guards[i] for i in products), name
            opcodes = code.step(start, end)
            loop = LOOPS[kernel][opcodes["HMMA"]]
            outer = code.around(start, end)
            assert (loop.turns > 1) == (outer is not None), (name, loop)
            if outer:
                turn, opcodes = opcodes, code.step(*outer)
                opcodes.update({op: n * (loop.turns - 1) for op, n in turn.items()})
            most = loop.most_with_dropout if dropout else loop.most
            total = sum(opcodes.values()) * LANES / loop.scores
            parts = [f"{op} {n * LANES / loop.scores:.2f}" for op, n in opcodes.most_common(12)]
            line = f"{name}, {loop.name}: {total:.2f} of at most {most}: {', '.join(parts)}"
            print(line)
            found.add((kernel, loop, dropout))
            too_many += [line] if total > most else []
    assert not too_many
    assert found == {
        (kernel, loop, dropout)
        for kernel, loops in LOOPS.items()
        for loop in loops.values()
        for dropout in (False, True)
    }


# a main loop of the form that nvcc emits, with a last step that is masked
LOOP = """\t.section\t.text.k,"ax",@progbits
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0040*/               @P1 FMUL.FTZ R4, R4, R5 ;
.L_x_1:
        /*0050*/              @!P2 BRA `(.L_x_2) ;
        /*0060*/                   FSEL R4, R4, -INF, P3 ;
        /*0070*/                   FSEL R5, R5, -INF, P3 ;
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0090*/                   FADD R4, R4, R4 ;
.L_x_3:
        /*00a0*/               @P4 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
"""


def test_step_computes_and_copies_but_masks_nothing():
    code = parsed(LOOP)["k"]
    ((start, end),) = code.loops()
    assert (start, end) == (1, 10)
    assert code.step(start, end) == {"HMMA": 1, "LDGSTS": 1, "FMUL": 1, "FADD": 1, "BRA": 3}
