# SPDX-License-Identifier: Apache-2.0
"""``--cache``: whether the data sets of a training keep what they decode."""

import os
from collections.abc import Sequence

from torch.utils.data import Dataset

from detr_fast.config import Config, UsageError
from detr_fast.data.cache import ImageCache, bytes_needed, free_memory
from detr_fast.data.coco import CocoDetection
from detr_fast.engine.log import say

SHARE = 0.5  # of the free memory: what `auto` takes at most


def cache_images(config: Config, datasets: Sequence[Dataset]) -> None:
    """Give the data sets a cache where ``--cache`` asks for one, and say so in a line.

    Generated images have no need of it: their data set keeps them anyhow.

    Raises:
        UsageError: if ``--cache ram`` asks for more memory than there is.
    """
    readers = [dataset for dataset in datasets if isinstance(dataset, CocoDetection)]
    if config.cache == "off" or not readers:
        return
    if os.name != "posix":
        if config.cache == "ram":
            raise UsageError(f"--cache ram: not on this system ({os.name}): take --cache off")
        return
    needed, free = sum(bytes_needed(reader.annotations.sizes) for reader in readers), free_memory()
    if config.cache == "ram" and needed > free:
        raise UsageError(
            f"--cache ram: the decoded images take {_size(needed)}, of memory {_size(free)} are "
            "free: take --cache off, fewer images, or a machine with more memory"
        )
    if config.cache == "auto":
        if config.epochs - config.start_epoch <= 1:
            return
        if needed > SHARE * free:
            say(
                f"images are decoded anew in every epoch: all of them take {_size(needed)}, of "
                f"memory {_size(free)} are free, of which --cache auto takes half at most"
            )
            return
    for reader in readers:
        reader.cache = ImageCache(reader.annotations.sizes)
    say(
        f"images are decoded once and kept in memory: {_size(needed)} of {_size(free)} that are "
        "free (--cache off: decoded anew in every epoch)"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
