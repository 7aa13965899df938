# SPDX-License-Identifier: Apache-2.0
"""Whether paired results differ: mean difference, its t-interval and a verdict."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

EQUAL, DIFFERENT, UNDECIDED = "equal", "different", "undecided"


class Comparison(NamedTuple):
    """What pairs tell of a difference.

    Attributes:
        mean (float): of the differences.
        low (float): lower end of the 95 % interval of the mean (Student's t).
        high (float): upper end.
        bound (float): largest mean difference that counts as none.
    """

    mean: float
    low: float
    high: float
    bound: float

    @property
    def verdict(self) -> str:
        """``equal``: the mean is within the bound and the interval holds 0; ``different``: the
        interval does not hold 0; ``undecided``: it does, but the mean is beyond the bound.
        """
        if not self.low <= 0 <= self.high:
            return DIFFERENT
        return EQUAL if abs(self.mean) <= self.bound else UNDECIDED

    def __str__(self) -> str:
        why = {
            EQUAL: f"the mean is within {self.bound:g}, the interval holds 0",
            DIFFERENT: "the interval does not hold 0",
            UNDECIDED: f"the mean is beyond {self.bound:g}, the interval holds 0: more seeds",
        }
        if max(-self.low, self.high) <= self.bound:
            why[EQUAL] = f"all of the interval is within {self.bound:g}, and it holds 0"
        return (
            f"{self.mean:+.4f}, 95 % interval [{self.low:+.4f}, {self.high:+.4f}]: "
            f"{self.verdict} ({why[self.verdict]})"
        )


def compare(differences: Sequence[float], bound: float) -> Comparison:
    """Compare by the differences of pairs.

    Args:
        differences (Sequence[float]): at least two.
        bound (float): largest mean difference that counts as none.

    Raises:
        ValueError: if there are fewer than two.
    """
    pairs = len(differences)
    if pairs < 2:
        raise ValueError(f"an interval needs at least 2 pairs, got {pairs}")
    from scipy.stats import t

    mean = fmean(differences)
    half = float(t.ppf(0.975, pairs - 1)) * stdev(differences) / math.sqrt(pairs)
    return Comparison(mean, mean - half, mean + half, bound)
