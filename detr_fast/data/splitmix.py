# SPDX-License-Identifier: Apache-2.0
"""SplitMix64 (Steele, Lea, Flood 2014): random words that are a function of seed and place alone.

A word needs no words before it, so that those of many seeds are drawn in one go, and all platforms
draw the same.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: np.ndarray) -> np.ndarray:
    """The output function, elementwise on uint64; wraps around."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def first_words(seeds: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` words of each stream.

    Args:
        seeds (ndarray[N]): integers in [0, 2**64).

    Returns:
        ndarray[count, N]: uint64.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return mix(seeds.astype(np.uint64) + steps[:, None])


def below(words: np.ndarray, bounds: np.ndarray | int) -> np.ndarray:
    """Integers in [0, bounds) from uint64 words: int64, for bounds under 2**32."""
    scaled = (words >> np.uint64(32)) * np.asarray(bounds).astype(np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)
