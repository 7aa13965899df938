# SPDX-License-Identifier: Apache-2.0
"""The calls of torch that a computation makes: what eager mode pays for on the host."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Within this context the names of all ops are kept, those of the backward included.

    Attributes:
        names (list[str]): one for each call, in their order; views are ops, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the name and make the call."""
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def dispatched(run: Callable[[], Any]) -> list[str]:
    """Names of the ops that ``run()`` calls."""
    with Recorder() as recorder:
        run()
    return recorder.names
