# SPDX-License-Identifier: Apache-2.0
"""The calls of torch that a computation makes: what eager mode pays for on the host."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import Run


class _Recorder(TorchDispatchMode):
    """Keeps the names of all ops, those of the backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def dispatched(run: Run) -> list[str]:
    """Names of the ops, one for each call, in their order; views are ops, too."""
    with _Recorder() as recorder:
        run()
    return recorder.names
