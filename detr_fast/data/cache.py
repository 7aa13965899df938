# SPDX-License-Identifier: Apache-2.0
"""Decoded images kept in memory, one copy for this process and all workers of its loaders."""

from __future__ import annotations

import mmap
import os
import tempfile
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a line of the processor's cache


class ImageCache:
    """Keeps what was decoded, until nobody holds the cache any more.

    Pixels are kept, not files: those are in the system's page cache anyhow, as far as memory goes,
    and decoding them is what takes time. Each image has a place of its own, and memory is taken
    when it is filled. The places are in a file without a name, which is mapped by this process and
    by those that it starts, by whichever method (it travels with the pickled data set); it is not
    in ``/dev/shm``, which containers keep small.

    Two processes may fill a place at the same time: both write the same.

    Args:
        sizes (ndarray[N, 2]): height and width of each image in pixels. One that is not known (0)
            is not kept.

    Raises:
        OSError: the system refuses the mapping.
    """

    def __init__(self, sizes: np.ndarray) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._map(_nameless_file())

    def _map(self, file: IO[bytes]) -> None:
        rounded = -(-_bytes_of(self._sizes) // _ALIGNMENT) * _ALIGNMENT
        # a byte per image tells whether its place is filled; all places follow
        self._places = np.cumsum((len(rounded), *rounded))
        self._file = file
        file.truncate(int(self._places[-1]))
        self._memory = mmap.mmap(file.fileno(), int(self._places[-1]))
        self._filled = self._view(0, len(rounded))

    def _view(self, offset: int, count: int) -> Tensor:
        # of its own storage: what torch sends to another process is a whole storage
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=count, offset=offset)

    def __getstate__(self) -> dict[str, Any]:
        return {"sizes": self._sizes, "file": reduction.DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._sizes = state["sizes"]
        self._map(os.fdopen(state["file"].detach(), "r+b", buffering=0))

    def __len__(self) -> int:
        """Number of images that are kept by now, by any process."""
        return int(self._filled.count_nonzero())

    def get(self, index: int) -> Tensor | None:
        """An image; None if it is not there.

        Returns:
            Tensor[3, h, w]: uint8, the memory of the cache itself: not to be written to.
        """
        return self._place(index) if self._filled[index] else None

    def put(self, index: int, image: Tensor) -> None:
        """Keep an image (uint8 Tensor[3, h, w]); nothing happens if its size was not announced."""
        if tuple(image.shape[1:]) == tuple(self._sizes[index]):
            self._place(index).copy_(image)
            self._filled[index] = 1  # last: who sees it set finds the image complete

    def _place(self, index: int) -> Tensor:
        height, width = self._sizes[index].tolist()
        pixels = self._view(int(self._places[index]), 3 * height * width)
        return pixels.view(height, width, 3).permute(2, 0, 1)


def bytes_needed(sizes: np.ndarray) -> int:
    """Memory of an `ImageCache` that is full.

    Args:
        sizes (ndarray[N, 2]): height and width of each image in pixels, 0 where unknown.
    """
    return int(_bytes_of(np.asarray(sizes, dtype=np.int64)).sum())


def free_memory() -> int:
    """Bytes that this process can still have: what the system has, or its control groups leave."""
    free = [limit for limit in (_free_of_system(), *_free_of_groups()) if limit is not None]
    return max(0, min(free))


def _bytes_of(sizes: np.ndarray) -> np.ndarray:
    return 3 * sizes.clip(min=0).prod(axis=1)


def _nameless_file() -> IO[bytes]:
    """A file of holes, which takes memory where it is written to; gone with its last user."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("detr_fast images"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)  # not Linux: on a disk, which is read seldom


def _free_of_system() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all memory is the best guess there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_groups(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int | None]:
    """What each control group above this process leaves; None where it sets no limit."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            folder = root / "memory"
        else:
            continue
        # a container may see its own group as the root, or the path as the host names it
        below = [folder / part for part in (path.lstrip("/"), *Path(path.lstrip("/")).parents)]
        free += [_free_of_group(group, *names) for group in below]
    return free


def _free_of_group(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # files in the page cache count as used, and make room
    return None if most == "max" else int(most) - used + int(statistics.get(reclaimable, 0))
