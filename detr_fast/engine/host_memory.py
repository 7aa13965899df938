# SPDX-License-Identifier: Apache-2.0
"""What the C library does with memory that a training step frees."""

import ctypes
import os

# parameters of glibc's mallopt (malloc.h), and the largest threshold of mmap that it takes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
KEPT = 1 << 30  # bytes that the end of the heap may keep
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(library: ctypes.CDLL | None = None, *, kept: int = KEPT) -> bool:
    """Have blocks of up to 32 MiB reused, and up to 1 GiB of free memory kept by this process.

    By default glibc gives the end of the heap back whenever it has as much free as two of the
    largest blocks: the tensors of every step get pages that the system has to clear again, 4,200 of
    them in a step of the default run, which takes an eighth of its time.  What a process holds at
    its peak does not change.

    Args:
        library (ctypes.CDLL, optional): the C library; default: that of this process.
        kept (int): bytes of free memory to keep.

    Returns:
        bool: whether it was set: the library is glibc and the user has set nothing else by an
        environment variable.
    """
    if os.name != "posix" or any(name in os.environ for name in _SET_BY_USER):
        return False
    mallopt = getattr(library or ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(parameter, value)
        for parameter, value in (
            (_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
            (_TRIM_THRESHOLD, kept),
        )
    )
