# SPDX-License-Identifier: Apache-2.0
"""The order of the training images and the random numbers of their augmentation.

Both follow from seed and epoch alone: a run that is stopped anywhere and resumed sees the same
images with the same augmentation, whatever the number of loader workers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class Draw(NamedTuple):
    """One sample: which image, and the seed of its augmentation."""

    index: int
    seed: int


class ShuffledBatches(Sampler[list[Draw]]):
    """Full batches of all images in a new order every epoch; the rest of an epoch is left out.

    Args:
        length (int): number of images.
        batch_size (int): images per batch.
        seed (int): at least 0.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self._epoch = self._first = 0

    def begin(self, epoch: int, batch: int = 0) -> None:
        """Let the next pass be that of ``epoch``, from its batch number ``batch`` on."""
        self._epoch, self._first = epoch, batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        entropy = np.random.SeedSequence((self.seed, self._epoch)).generate_state(2)
        generator = torch.Generator().manual_seed(int(entropy[0]) << 32 | int(entropy[1]))
        order = torch.randperm(self.length, generator=generator)
        seeds = torch.randint(2**63 - 1, (self.length,), generator=generator)
        for batch in range(self._first, len(self)):
            drawn = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield [Draw(*d) for d in zip(order[drawn].tolist(), seeds[drawn].tolist(), strict=True)]


class SeededSamples(Dataset[Any]):
    """A data set whose samples are drawn with the random numbers of their `Draw`.

    torch's default generator, which the augmentation draws from, has the draw's seed for one
    sample and is then as before.

    Args:
        dataset (Dataset): takes the indices.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: Draw) -> Any:
        before = torch.get_rng_state()
        # torch.manual_seed would queue a call for CUDA with every sample
        torch.default_generator.manual_seed(draw.seed)
        try:
            return self.dataset[draw.index]
        finally:
            torch.set_rng_state(before)
