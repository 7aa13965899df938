# SPDX-License-Identifier: Apache-2.0
"""The GPU memory that one contender needs, while the others stand beside it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Run

Held = Callable[[], int]


def peak_bytes(run: Run, held: Held) -> int:
    """Peak of a call by torch's allocator, as if the contender were alone.

    Args:
        run (Callable): the call, made before.
        held (Callable): bytes that the contender keeps between calls.

    Returns:
        int: what it holds, and what the call allocates beyond what there was before it.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, held_before = torch.cuda.memory_allocated(), held()
    run()
    torch.cuda.synchronize()
    return held_before + torch.cuda.max_memory_allocated() - before


def nothing_held() -> int:
    """Of a contender that keeps nothing."""
    return 0


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among some objects."""
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))


def training_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, buffers, gradients and the state of the optimizer."""
    weights = list(model.parameters())
    moments = (value for state in optimizer.state.values() for value in state.values())
    return bytes_of([*weights, *model.buffers(), *(w.grad for w in weights), *moments])


def graph_bytes() -> int:
    """Memory that CUDA graphs have for themselves; a replay allocates nothing."""
    if not torch.cuda.is_available():
        return 0
    segments = torch.cuda.memory_snapshot()
    private = (s for s in segments if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0))
    return sum(segment["total_size"] for segment in private)
