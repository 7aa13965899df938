# SPDX-License-Identifier: Apache-2.0
"""Memory that knows its bounds."""

from typing import NamedTuple

import numpy as np


class PtxError(RuntimeError):
    """What a kernel did wrong, with the instruction that did it."""


class Region(NamedTuple):
    """Bytes that a kernel may touch."""

    start: int
    data: np.ndarray  # uint8
    name: str
    writable: bool


class Memory:
    """One address space: regions that a kernel may touch, each access checked."""

    def __init__(self, regions: list[Region] | None = None) -> None:
        self.regions = regions or []

    def add(self, array: np.ndarray, name: str, writable: bool, start: int | None = None) -> int:
        """Let kernels touch `array`; its first address, that of the host unless given."""
        start = array.ctypes.data if start is None else start
        self.regions.append(Region(start, array.reshape(-1).view(np.uint8), name, writable))
        return start

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """`size` bytes from each of the addresses, (len(addresses), size) uint8."""
        out = np.empty((len(addresses), size), np.uint8)
        for region, lanes, bytes_of in self._resolve(addresses, size, "read"):
            out[lanes] = region.data[bytes_of]
        return out

    def write(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """Write the rows of `data` (len(addresses), size) uint8 to the addresses."""
        for region, lanes, bytes_of in self._resolve(addresses, data.shape[1], "write"):
            if not region.writable:
                raise PtxError(f"write to {region.name}, which is only read")
            region.data[bytes_of] = data[lanes]

    def _resolve(self, addresses: np.ndarray, size: int, what: str):
        if (addresses % size).any():
            raise PtxError(f"misaligned {what} of {size} bytes")
        left = np.ones(len(addresses), bool)
        for region in self.regions:
            offsets = addresses.astype(np.int64) - region.start
            lanes = left & (offsets >= 0) & (offsets + size <= region.data.size)
            if lanes.any():
                left &= ~lanes
                yield region, lanes, offsets[lanes, None] + np.arange(size)
                if not left.any():
                    return
        if left.any():
            raise PtxError(
                f"out-of-bounds {what} of {size} bytes, {self._near(addresses[left][0])}"
            )

    def _near(self, address: int) -> str:
        ends = {region.start + region.data.size: region.name for region in self.regions}
        if not ends:
            return "of no such memory"
        end = min(ends, key=lambda end: abs(end - int(address)))
        return f"{int(address) - end:+} bytes from the end of {ends[end]}"
