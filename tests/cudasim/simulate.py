# SPDX-License-Identifier: Apache-2.0
"""Puts the simulated CUDA ops in the place of the CPU ops."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.cudasim.build import CSRC, library


@contextmanager
def simulated(csrc: Path = CSRC, namespace: str = "detr_fast_sim") -> Iterator[None]:
    """Within this context the ops of detr_fast on CPU tensors run the simulated CUDA kernels.

    The simulated ops are registered in a namespace of their own; here the dispatcher is told to
    use them as the CPU kernels of detr_fast, and told to forget it afterwards.  Everything above
    the kernels (wrappers, autograd, fakes, modules) is the package's own.
    """
    torch.ops.load_library(library(csrc, namespace))
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    override = torch.library.Library("detr_fast", "IMPL")
    try:
        for name in sorted(n for n in names if n.startswith(f"{namespace}::")):
            op = name.split("::")[1]
            kernel = getattr(getattr(torch.ops, namespace), op).default
            override.impl(op, kernel, "CPU", allow_override=True)
        yield
    finally:
        override._destroy()
