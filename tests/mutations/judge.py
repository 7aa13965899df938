# SPDX-License-Identifier: Apache-2.0
"""Builds a mutant as a library of the simulator and runs the checks on it."""

import functools
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from tests.cudasim import build, simulate
from tests.mutations.checks import failure
from tests.mutations.mutants import Mutant
from tests.mutations.subjects import Subject

NAMESPACE = "detr_fast_mutant"
DEFINES = [f"-DDETR_FAST_NAMESPACE={NAMESPACE}", "-DDETR_FAST_CUDA_KEY=CPU"]
HOST_FLAGS = ["-O0", "-g0"]
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
SYSTEM = re.compile(r"^#include <.+>", re.MULTILINE)
PATIENCE = 3  # times the processor time of the sources as they are: a mutant that takes more hangs


class Verdict(NamedTuple):
    """`outcome` is caught, survived, or invalid: not a program."""

    mutant: Mutant
    outcome: str
    reason: str


@functools.cache
def reads(source: Path) -> set[Path]:
    """The files of csrc that a source includes, itself among them."""
    csrc = build.CSRC
    found = {source}
    for name in INCLUDE.findall(source.read_text()):
        if (csrc / name).exists():
            found |= reads(csrc / name)
    return found


def flags(source: Path) -> list:
    kernel = [*build.KERNEL_FLAGS, *build.CHECK_FLAGS]
    return [*build.FLAGS, *(kernel if source.suffix == ".cu" else [*HOST_FLAGS, *DEFINES])]


def precompile(source: Path, folder: Path) -> Path:
    """The headers of a source that no mutant touches, compiled: half of its time."""
    lines = {line for path in reads(source) for line in SYSTEM.findall(path.read_text())}
    if source.suffix == ".cu":
        lines = {'#include "common/cuda.h"'}
    elif source.name != "ops.cpp":  # common/device.h is that of the simulator
        lines = {line for line in lines if "cuda" not in line and "shim" not in line}
    header = folder / f"{source.stem}.h"
    header.write_text("".join(f"{line}\n" for line in sorted(lines)))
    options = [flag for flag in flags(source) if flag not in ("-x", "c++")]
    output = ["-x", "c++-header", header, "-o", f"{header}.gch"]
    build.run("g++", *options, *build.includes(build.CSRC), *output)
    return header


def link(target: Path, objects: list[Path]) -> Path:
    torch_libraries = (f"-L{build.TORCH / 'lib'}", "-ltorch_cpu", "-ltorch")
    build.run("g++", "-shared", *objects, build.runtime(), *torch_libraries, "-o", target)
    return target


def processor_seconds() -> float:
    """That the processes of this one have taken."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Judge:
    """Keeps the objects and the right answers; mutants differ from them in one file."""

    def __init__(self, subject: Subject, folder: Path):
        torch.set_num_threads(1)
        self.folder, self.limit = folder, 600
        self.checks = subject.checks()
        self.objects = {}
        self.headers = {}
        for source in subject.sources():
            self.headers[source] = precompile(source, folder)
            self.objects[source] = folder / f"{source.stem}.o"
            self._compile(source, self.objects[source], build.CSRC)

    def unchanged(self) -> str:
        """What the checks say of the sources as they are: nothing, or all that follows is void."""
        library = link(self.folder / "unchanged.so", list(self.objects.values()))
        before = processor_seconds()
        reason = self._run(library)
        self.limit = math.ceil(PATIENCE * (processor_seconds() - before))
        return reason

    def judge(self, mutant: Mutant) -> Verdict:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            csrc = folder / "csrc"
            shutil.copytree(build.CSRC, csrc)
            (csrc / mutant.path.relative_to(build.CSRC)).write_text(mutant.source())
            objects = []
            for source, unchanged in self.objects.items():
                if mutant.path in reads(source):
                    objects.append(folder / unchanged.name)
                    self._compile(source, objects[-1], csrc)
                else:
                    objects.append(unchanged)
            library = link(folder / "mutant.so", objects)
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if "error:" in line]
            return Verdict(mutant, "invalid", lines[0].split("error:")[1] if lines else str(error))
        else:
            reason = self._run(library)
            return Verdict(mutant, "caught" if reason else "survived", reason)
        finally:
            shutil.rmtree(folder)

    def _compile(self, source: Path, target: Path, csrc: Path) -> None:
        """Compile what stands in `csrc` in the place of a source."""
        command = [*flags(source), "-include", self.headers[source], *build.includes(csrc)]
        place = csrc / source.relative_to(build.CSRC)
        build.run("g++", *command, "-c", place, "-o", target)

    def _run(self, library: Path) -> str:
        """The first failure, from a process that may crash or hang."""
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=self._run_checks, args=(library, theirs))
        process.start()
        theirs.close()
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return f"hangs: more than {self.limit} s"
        return ours.recv() if process.exitcode == 0 else f"crashes with {process.exitcode}"

    def _run_checks(self, library: Path, connection) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (self.limit, self.limit + 1))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        simulate.library = lambda *_: library
        for schedule in simulate.SCHEDULES:
            with simulate.simulated(namespace=NAMESPACE, schedule=schedule, watchdog_seconds=2):
                for check in self.checks:
                    if schedule != simulate.SCHEDULES[0] and not check.every_schedule:
                        continue
                    if reason := failure(check):
                        connection.send(reason)
                        return
        connection.send("")
