# SPDX-License-Identifier: Apache-2.0
"""Puts the simulated CUDA ops in the place of the CPU ops, and sets how they are scheduled."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import torch

from tests.cudasim.build import CSRC, bare_library, library, runtime

SCHEDULES = ("forward", "reverse", "random")
MAX_SHARED_BYTES = 227 * 1024  # compute capability 9.0 and 10.0; 8.6, 8.9 and 12.0: 99 KiB
DEFAULTS = {
    "schedule": "forward",
    "seed": 0,
    "preemption": 0,
    "strict": True,
    "watchdog_seconds": 10,
    "max_shared_bytes": MAX_SHARED_BYTES,
}


@functools.cache
def simulator() -> ModuleType:
    """The runtime's Python module: ``configure``, ``reports``, ``counts``, ``launch``."""
    loader = ExtensionFileLoader("cudasim", str(runtime()))
    module = module_from_spec(spec_from_loader("cudasim", loader))
    loader.exec_module(module)
    return module


@contextmanager
def scheduled(
    schedule: str = "forward",
    seed: int = 0,
    preemption: float | None = None,
    strict: bool = True,
    watchdog_seconds: float = 10,
    max_shared_bytes: int = MAX_SHARED_BYTES,
) -> Iterator[ModuleType]:
    """Set in which order the threads of a kernel run; yields the simulator.

    Args:
        schedule (str): ``"forward"`` and ``"reverse"`` run lanes, warps and blocks by their number,
            each until it waits; ``"random"`` mixes all of them.
        seed (int): of the random schedule.
        preemption (float): chance that a thread is interrupted at a memory access; by default
            0.01 in the random schedule, else 0.
        strict (bool): a thread that exits before a barrier which others wait in is a fault.
        watchdog_seconds (float): processor time after which a kernel in which no thread waits or
            ends counts as an endless loop.
        max_shared_bytes (int): shared memory that a block can have after an opt-in.
    """
    if preemption is None:
        preemption = 0.01 if schedule == "random" else 0
    module = simulator()
    module.configure(
        schedule=schedule,
        seed=seed,
        preemption=preemption,
        strict=strict,
        watchdog_seconds=watchdog_seconds,
        max_shared_bytes=max_shared_bytes,
    )
    try:
        yield module
    finally:
        module.configure(**DEFAULTS)


@contextmanager
def simulated(
    csrc: Path = CSRC, namespace: str = "detr_fast_sim", check: bool = True, **schedule
) -> Iterator[ModuleType]:
    """Within this context the ops of detr_fast on CPU tensors run the simulated CUDA kernels.

    The simulated ops are registered in a namespace of their own; here the dispatcher is told to
    use them as the CPU kernels of detr_fast, and told to forget it afterwards.  Everything above
    the kernels (wrappers, autograd, fakes, modules) is the package's own.  Faults of a kernel are
    raised as RuntimeError.

    Args:
        csrc (Path): folder of the sources.
        namespace (str): of the simulated ops; other sources need another one.
        check (bool): False compiles without the checker, for large inputs.
        schedule: the arguments of `scheduled`.
    """
    with scheduled(**schedule) as module:
        override = torch.library.Library("detr_fast", "IMPL")
        try:
            for op in load_ops(csrc, namespace, check):
                kernel = getattr(getattr(torch.ops, namespace), op).default
                override.impl(op, kernel, "CPU", allow_override=True)
            yield module
        finally:
            override._destroy()


@functools.cache
def load_ops(csrc: Path, namespace: str, check: bool) -> tuple[str, ...]:
    """Register the simulated ops and name them.

    Once: two libraries cannot register the same ops, so a process keeps to the one that it has
    loaded when somebody edits the sources meanwhile.
    """
    torch.ops.load_library(library(csrc, namespace, check))
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return tuple(sorted(n.split("::")[1] for n in names if n.startswith(f"{namespace}::")))


@functools.cache
def load_test_kernels(source: Path, check: bool = True) -> CDLL:
    """Let ``simulator().launch`` know the kernels of a source file, of which it keeps hold."""
    simulator()
    return CDLL(str(bare_library(source, check)))
