# SPDX-License-Identifier: Apache-2.0
"""What a module computes from its weights alone, kept from one image to the next in inference."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

MOST_ENTRIES = 4  # grids of images that are resized to one shorter side: a handful are frequent
# make_fx and fake tensors, which the two conditions on compilers do not see
_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
Value = TypeVar("Value", Tensor, tuple[Tensor, ...])


class InferenceCache(nn.Module):
    """Results of functions of weights, forgotten when a weight is changed, moved or replaced.

    It is in use in eval mode with gradients disabled. ``train()``, ``eval()`` and ``to()`` of the
    model empty it. A weight that was written through its ``data`` alone, by the replay of a CUDA
    graph or by an extension, none of which torch counts as a change, needs one of them.

    It has no part in the state dict, in copies or in files; compilers, exporters and CUDA graphs
    get the computation itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[Hashable, tuple[Any, Any, Any]] = {}

    def in_use(self, device: torch.device) -> bool:
        """Whether `forward` looks for an earlier result on the device."""
        return not (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACERS)
            # a CUDA graph would outlive the result
            or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        )

    def forward(
        self,
        compute: Callable[[], Value],
        device: torch.device,
        *sources: Tensor,
        key: tuple[Hashable, ...] = (),
    ) -> Value:
        """Return ``compute()``, of now or of earlier.

        Args:
            compute (Callable): returns a tensor or a tuple of tensors, on the device.
            device (torch.device): where.
            *sources (Tensor): all tensors that the result depends on.
            key (tuple): everything else that it depends on but autocast.
        """
        if not self.in_use(device) or (state := _state(sources)) is None:
            return compute()
        key = (*key, *map(id, sources), *_surroundings(device))
        known = self._entries.pop(key, None)
        if known is None or known[1] != state:
            # a tensor of inference mode could not be told from one that was written to since
            with torch.inference_mode(False), torch.no_grad():
                value = compute()
            if _state(value if isinstance(value, tuple) else (value,)) is None:
                return value
            known = (sources, state, value)  # keeps the sources: their ids stay theirs
        while len(self._entries) >= MOST_ENTRIES:
            self._entries.pop(next(iter(self._entries)), None)
        self._entries[key] = known
        return known[2]

    def train(self, mode: bool = True) -> "InferenceCache":
        """Forget everything."""
        self._entries.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._entries.clear()
        return super()._apply(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> "InferenceCache":
        replica: InferenceCache = super()._replicate_for_data_parallel()
        replica._entries = {}  # a thread's own
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_entries": {}}


def _state(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...] | None:
    """What changes when a tensor is written to; None where that cannot be known."""
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):  # fake, for instance
        return None
    try:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    except (RuntimeError, NotImplementedError):  # of inference mode or vmap
        return None


def _surroundings(device: torch.device) -> tuple[Hashable, ...]:
    """What a computation depends on beside its arguments: the dtype of products and the queue."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return device, autocast, torch.cuda.current_stream(device) if kind == "cuda" else None
