# SPDX-License-Identifier: Apache-2.0
"""The order of the training images, and which of them share a batch.

Both follow from seed and epoch alone, as do the random numbers of the augmentation: a run that is
stopped anywhere and resumed sees the same batches, whatever the number of loader workers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from detr_fast.data.augmentation import draw

WINDOW = 128  # batches among which images change places


class Draw(NamedTuple):
    """One sample: which image, and the seed of its augmentation."""

    index: int
    seed: int


class Padding(NamedTuple):
    """What batches of an epoch have beside images.

    Attributes:
        shapes (int): how many different heights and widths the batches have.
        waste (float): pixels of the batches over those of their images.
        at_random (float): the same, of batches of any images, padded to the largest.
    """

    shapes: int
    waste: float
    at_random: float


class ShuffledBatches(Sampler[list[Draw]]):
    """Full batches of all images in a new order every epoch; the rest of an epoch is left out.

    Processes that train together share out the images of larger batches: the images of an update
    depend on ``batch_size * replicas`` alone.

    Args:
        length (int): number of images.
        batch_size (int): images per batch and process.
        seed (int): at least 0.
        rank (int): of this process.
        replicas (int): processes that train together.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int = 0, replicas: int = 1
    ) -> None:
        if not 0 <= rank < replicas:
            raise ValueError(f"rank {rank} of {replicas} replicas: expected 0 to {replicas - 1}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.replicas = rank, replicas
        self._epoch = self._first = 0

    def begin(self, epoch: int, batch: int = 0) -> None:
        """Let the next pass be that of ``epoch``, from its batch number ``batch`` on."""
        self._epoch, self._first = epoch, batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.length // (self.batch_size * self.replicas)

    def __iter__(self) -> Iterator[list[Draw]]:
        order, seeds, generator = self._epoch_draws()
        share = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for places in self._batches(order, seeds, generator)[self._first :, share]:
            drawn = zip(order[places].tolist(), seeds[places].tolist(), strict=True)
            yield [Draw(index, seed) for index, seed in drawn]

    def _epoch_draws(self) -> tuple[np.ndarray, np.ndarray, torch.Generator]:
        """Indices and seeds of the samples in a random order, and what to draw on from."""
        entropy = np.random.SeedSequence((self.seed, self._epoch)).generate_state(2)
        generator = torch.Generator().manual_seed(int(entropy[0]) << 32 | int(entropy[1]))
        order = torch.randperm(self.length, generator=generator)
        seeds = torch.randint(2**63 - 1, (self.length,), generator=generator)
        return order.numpy(), seeds.numpy(), generator

    def _batches(
        self, order: np.ndarray, seeds: np.ndarray, generator: torch.Generator
    ) -> np.ndarray:
        """The samples of each batch of all processes, as places in ``order`` (batches, images)."""
        images = self.batch_size * self.replicas
        return np.arange(len(self) * images).reshape(len(self), images)


class BucketedBatches(ShuffledBatches):
    """Full batches of images that have like sizes after their augmentation.

    The samples of an epoch are those of `ShuffledBatches`. `WINDOW` batches of them change
    places by their planned sizes; then the batches come in a random order.

    Args:
        sizes (ndarray[N, 2]): height and width of the images as they are read.
        batch_size (int): images per batch and process.
        seed (int): at least 0.
        short_side (int): of the augmentation, see `detr_fast.data.augmentation.draw`.
        multiple (int): height and width of a batch are rounded up to multiples of it.
        window (int): batches, of all processes, among which images change places.
        rank (int): of this process.
        replicas (int): processes that train together.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        batch_size: int,
        seed: int,
        short_side: int,
        multiple: int = 64,
        window: int = WINDOW,
        rank: int = 0,
        replicas: int = 1,
    ) -> None:
        super().__init__(len(sizes), batch_size, seed, rank, replicas)
        self.sizes, self.short_side = sizes, short_side
        self.multiple, self.window = multiple, window

    def padding(self) -> Padding:
        """What the batches of the epoch will have beside images, those of all processes."""
        order, seeds, generator = self._epoch_draws()
        sizes = self._planned(order, seeds)
        grouped = self._batches(order, seeds, generator).reshape(-1, self.batch_size)
        at_random = np.arange(grouped.size).reshape(grouped.shape)
        shapes = round_up(sizes[grouped].max(axis=1), self.multiple)
        real = sizes[: grouped.size].prod(axis=1).sum()
        waste, waste_at_random = (
            float(of_batches.prod(axis=1).sum() * self.batch_size / max(real, 1))
            for of_batches in (shapes, sizes[at_random].max(axis=1))
        )
        return Padding(len(np.unique(shapes, axis=0)), waste, waste_at_random)

    def largest(self) -> int:
        """The number of the batch of the epoch that has the most pixels, those of all processes."""
        order, seeds, generator = self._epoch_draws()
        sizes = self._planned(order, seeds)
        batches = self._batches(order, seeds, generator)
        return int(round_up(sizes[batches].max(axis=1), self.multiple).prod(axis=1).argmax())

    def _planned(self, order: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return draw(seeds, self.sizes[order], self.short_side).size

    def _batches(
        self, order: np.ndarray, seeds: np.ndarray, generator: torch.Generator
    ) -> np.ndarray:
        sizes = round_up(self._planned(order, seeds), self.multiple)
        batches = super()._batches(order, seeds, generator)
        for first in range(0, len(batches), self.window):
            places = batches[first : first + self.window]
            flat = places.ravel()
            places[:] = flat[_by_size(sizes[flat])].reshape(places.shape)
        return batches[torch.randperm(len(batches), generator=generator).numpy()]


def round_up(sizes: np.ndarray, multiple: int) -> np.ndarray:
    """The least multiples that hold these sizes."""
    return -(-sizes // multiple) * multiple


def _by_size(sizes: np.ndarray) -> np.ndarray:
    """An order in which neighbours have like sizes (N, 2).

    From wide through square to tall images by their long side; among those of one long side the
    short one falls and rises in turn, so that it does not jump where the next long side begins.
    """
    height, width = sizes.T
    long = np.where(height > width, height, -width)
    _, turn = np.unique(long, return_inverse=True)
    short = sizes.min(axis=1)
    return np.lexsort((np.where(turn % 2, -short, short), turn))
