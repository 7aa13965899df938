# SPDX-License-Identifier: Apache-2.0
"""Reads PTX, the assembly text that nvcc emits (Parallel Thread Execution ISA 9.0)."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.cudasim.ptx.memory import Memory

# how a statement may begin: source line, scope, label, anything up to its semicolon
STATEMENT = re.compile(
    r"\s*(?:\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*|(?P<scope>[{}])|(?P<label>[$\w]+):"
    r"|(?P<text>[^;]+);)"
)
ARRAY = re.compile(  # or a single variable
    r"\.(?P<space>const|global|shared|local)\s+\.align\s+(?P<align>\d+)\s+\.[bsuf](?P<bits>\d+)\s+"
    r"(?P<name>[\w$]+)(?:\[(?P<count>\d*)\])?(?:\s*=\s*\{(?P<bytes>[^}]*)\})?"
)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+")
NAME = re.compile(r"[%$]?\w+(?:\.[xyz])?")


class Address(NamedTuple):
    """``[base+offset]``."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


class Instruction(NamedTuple):
    """``@guard name operands;`` of a kernel, and where it stands."""

    guard: str
    name: tuple[str, ...]  # the opcode, split at its dots
    operands: tuple[Operand, ...]
    where: str


class Parameter(NamedTuple):
    """One parameter of a kernel in the bytes that a launch hands over."""

    name: str
    start: int
    size: int


def split_operands(text: str) -> tuple[Operand, ...]:
    operands: list[Operand] = []
    for operand in (match.strip() for match in OPERAND.findall(text) if match.strip()):
        if operand[0] == "{":
            operands.append(tuple(part.strip() for part in operand[1:-1].split(",")))
        elif operand[0] == "[":
            base, _, offset = operand[1:-1].partition("+")
            operands.append(Address(base.strip(), int(offset or 0)))
        else:
            operands.append(operand)
    return tuple(operands)


def bytes_of(array: re.Match) -> int:
    """0 of dynamic shared memory, whose length a launch gives."""
    count = 1 if array["count"] is None else int(array["count"] or 0)
    return count * int(array["bits"]) // 8


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass
class Layout:
    """Where the arrays of a kernel stand in its shared or its local memory."""

    size: int = 0
    symbols: dict[str, int] = field(default_factory=dict)

    def add(self, array: re.Match) -> None:
        self.symbols[array["name"]] = self.size = round_up(self.size, int(array["align"]))
        self.size += bytes_of(array)


class Kernel:
    """The instructions of one ``.entry`` and what they refer to."""

    def __init__(self, name: str, parameters: str, body: str, module: "Module"):
        self.name, self.module = name, module
        self.parameters: list[Parameter] = []
        self.registers: dict[str, str] = {}  # name -> type
        self.labels: dict[str, int] = {}
        self.code: list[Instruction] = []
        self.shared, self.local = Layout(), Layout()
        start = 0
        for align, kind, parameter, count in PARAMETER.findall(parameters):
            width = 1 if kind == "b8" else int(kind[1:]) // 8
            start = round_up(start, int(align or width))
            self.parameters.append(Parameter(parameter, start, width * int(count or 1)))
            start += width * int(count or 1)
        self._read(body)
        for array in module.shared:  # dynamic shared memory stands behind the rest
            self.shared.size = round_up(self.shared.size, 128)
            self.shared.add(array)

    def _read(self, body: str) -> None:
        scopes: list[dict[str, str]] = [{}]  # registers that inline assembly renames
        line = ""
        for match in STATEMENT.finditer(body):
            if match["file"]:
                line = f" at {self.module.files.get(match['file'], '?')}:{match['line']}"
            elif match["scope"] == "{":
                scopes.append({})
            elif match["scope"]:
                scopes.pop()
            elif match["label"]:
                self.labels[match["label"]] = len(self.code)
            else:
                text = " ".join(match["text"].split())
                if text.startswith(".reg "):
                    self._declare(text, scopes)
                elif array := ARRAY.match(text):
                    (self.shared if array["space"] == "shared" else self.local).add(array)
                elif not text.startswith("."):
                    self.code.append(self._instruction(text, scopes, line))

    def _declare(self, text: str, scopes: list[dict[str, str]]) -> None:
        _, kind, names = text.split(maxsplit=2)
        for name in (part.strip() for part in names.split(",")):
            if counted := re.fullmatch(r"(%\w+?)<(\d+)>", name):
                registers = [f"{counted[1]}{i}" for i in range(int(counted[2]))]
            else:
                registers = [name]
            for register in registers:
                if len(scopes) > 1:
                    scopes[-1][register] = f"{register}@{len(self.registers)}"
                self.registers[scopes[-1].get(register, register)] = kind[1:]

    def _instruction(self, text: str, scopes: list[dict[str, str]], line: str) -> Instruction:
        names = {old: new for scope in scopes for old, new in scope.items()}
        where = f"`{text}`{line}"
        guard = ""
        if text[0] == "@":
            guard, _, text = text[1:].partition(" ")
            guard = guard.replace(
                guard.lstrip("!"), names.get(guard.lstrip("!"), guard.lstrip("!"))
            )
        opcode, _, operands = text.partition(" ")
        operands = NAME.sub(lambda name: names.get(name[0], name[0]), operands)
        return Instruction(guard, tuple(opcode.split(".")), split_operands(operands), where)


class Module:
    """A PTX file: its kernels by name, its constants in memory."""

    def __init__(self, text: str):
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
        files = re.findall(r"^\s*\.file\s+(\d+)\s+\"([^\"]*)\"", text, re.MULTILINE)
        self.files = {number: Path(path).name for number, path in files}
        self.memory, self.symbols = Memory(), {}
        self.kernels: dict[str, Kernel] = {}
        entries = list(re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)[^{]*\{", text))
        outside, end = [], 0
        bodies = []
        for entry in entries:
            outside.append(text[end : entry.start()])
            end = closing_brace(text, entry.end())
            bodies.append(text[entry.end() : end])
        arrays = list(ARRAY.finditer("".join([*outside, text[end:]])))
        self.shared = [array for array in arrays if array["space"] == "shared"]
        for array in arrays:
            if array["space"] in ("const", "global"):
                data = np.zeros(bytes_of(array), np.uint8)
                values = [int(value) for value in (array["bytes"] or "").split(",") if value]
                data[: len(values)] = values
                self.symbols[array["name"]] = self.memory.add(data, array["name"], writable=False)
        for entry, body in zip(entries, bodies, strict=True):
            self.kernels[entry[1]] = Kernel(entry[1], entry[2], body, self)


def closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise ValueError("a kernel without an end")
