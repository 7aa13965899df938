# SPDX-License-Identifier: Apache-2.0
"""Batches copied to a GPU while it computes."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast.data.packed import PackedBatch

_ALIGNMENT = 512  # bytes: that of torch's own allocations


class _Slot:
    """Memory on the device for one batch, used again and again.

    Attributes:
        free (Event | None): when the work on its last batch is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.free: Any = None

    def filled(self, batch: PackedBatch) -> PackedBatch:
        """Start the copy of a batch into this memory, which grows as need be."""
        needed = sum(_rounded(tensor) for tensor in (batch.pixels, batch.record))
        if len(self.memory) < needed:
            self.memory = torch.empty(needed, dtype=torch.uint8, device=self.memory.device)
        used = 0

        def place(tensor: Tensor) -> Tensor:
            nonlocal used
            memory = self.memory[used : used + tensor.nbytes].view(tensor.dtype)
            used += _rounded(tensor)
            # with the strides of the source it is one copy of bytes, whatever the memory format
            return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor, non_blocking=True)

        return batch.map(place)


@dataclass(frozen=True)
class _Sent:
    batch: PackedBatch
    slot: _Slot
    arrived: Any


class Prefetch:
    """Copies batches on a stream of its own, each before the step on the batch before it begins.

    There are two slots of memory on the device. The copy into one of them waits for the step before
    the last one, which has used it, and a step waits for its copy; both on the device: the host
    waits for nothing. So a batch is good until the next but one is asked for.

    Args:
        device (torch.device): a GPU.
        cuda (module): stands for ``torch.cuda`` in tests.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.stream = cuda.Stream(device)
        self.slots = deque(_Slot(device) for _ in range(2))

    def __call__(self, batches: Iterable[PackedBatch | None]) -> Iterator[PackedBatch | None]:
        """The same batches, on the device; those that are not in page-locked memory wait."""
        ahead: deque[_Sent | None] = deque()
        for batch in batches:
            ahead.append(None if batch is None else self._send(batch))
            if len(ahead) == 2:
                yield from self._handed_out(ahead.popleft())
        for sent in ahead:
            yield from self._handed_out(sent)

    def _send(self, batch: PackedBatch) -> _Sent:
        slot = self.slots[0]
        self.slots.rotate()
        with self.cuda.stream(self.stream):
            if slot.free is not None:
                self.stream.wait_event(slot.free)
            on_device = slot.filled(batch)
            return _Sent(on_device, slot, self.stream.record_event())

    def _handed_out(self, sent: _Sent | None) -> Iterator[PackedBatch | None]:
        if sent is None:
            yield None
            return
        compute = self.cuda.current_stream(self.device)
        compute.wait_event(sent.arrived)
        # whoever gets this memory after us has to wait for the work on this batch
        sent.slot.memory.record_stream(compute)
        try:
            yield sent.batch
        finally:  # all work on the batch is submitted by now, also when the loop was left
            sent.slot.free = compute.record_event()


def _rounded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
