# SPDX-License-Identifier: Apache-2.0
"""Keys of many JSON objects as arrays, with a mask of the values that are what they should be.

Values of plain types, the rule, are converted by numpy at once, others one by one. No JSON value
raises here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

Objects = Sequence[Mapping[str, Any]]

# pixels; float32 arithmetic on coordinates stays finite, and no image is larger
LARGEST_COORDINATE = 2.0**31
_PLAIN = frozenset((int, float))
# ids and sizes: what JSON readers agree on (RFC 8259, section 6), and float64 holds exactly
LARGEST_INTEGER = 2**53


class Column(NamedTuple):
    """One key of N objects.

    Attributes:
        values (ndarray[N, ...]): the default where not valid
        valid (bool[N]): false where the value is malformed, or absent without a default
    """

    values: np.ndarray
    valid: np.ndarray


def objects(entries: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The entries, with an empty object in place of those that are no objects."""
    return [entry if isinstance(entry, Mapping) else {} for entry in entries]


def integers(
    entries: Objects,
    key: str,
    *,
    default: int | None = None,
    low: int = -LARGEST_INTEGER,
    high: int = LARGEST_INTEGER,
) -> Column:
    """Whole numbers in [low, high] (int64[N]); 3.0 is one, "3" and true are not.

    A key that is absent or null has the default; without one it is malformed.
    """
    values, valid = _convert(entries, key, np.int64, frozenset((int,)), _integer, default)
    valid &= (values >= low) & (values <= high)
    values[~valid] = default or 0
    return Column(values, valid)


def switches(entries: Objects, key: str) -> Column:
    """0 or 1 (int64[N]), as number or as truth value; 0 where the key is absent or null."""

    def convert(value: Any) -> int | None:
        return int(value) if isinstance(value, bool) else _integer(value)

    values, valid = _convert(entries, key, np.int64, frozenset((int, bool)), convert, 0)
    valid &= (values == 0) | (values == 1)
    values[~valid] = 0
    return Column(values, valid)


def measures(entries: Objects, key: str) -> Column:
    """Finite numbers of 0 or more (float64[N]); NaN where malformed, absent or null.

    An absent one is valid.
    """
    values, valid = _convert(entries, key, np.float64, _PLAIN, _number, math.nan)
    valid &= ~(values < 0)
    values[~valid] = math.nan
    return Column(values, valid)


def quadruples(entries: Objects, key: str) -> Column:
    """Lists of four finite numbers within `LARGEST_COORDINATE` (float64[N, 4])."""
    raw = [entry.get(key) for entry in entries]
    odd = [at for at, value in enumerate(raw) if not _is_plain_quadruple(value)]
    rows = raw.copy()
    for at in odd:
        rows[at] = (0, 0, 0, 0)
    try:
        values = np.array(list(chain.from_iterable(rows)), dtype=np.float64).reshape(-1, 4)
    except OverflowError:
        odd, values = range(len(raw)), np.zeros((len(raw), 4))
    for at in odd:
        values[at] = _quadruple(raw[at])
    valid = (np.abs(values) <= LARGEST_COORDINATE).all(axis=1)
    values[~valid] = 0
    return Column(values, valid)


def _is_plain_quadruple(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and _PLAIN.issuperset(map(type, value))


def _quadruple(value: Any) -> list[float]:
    if isinstance(value, list | tuple | np.ndarray) and len(value) == 4:
        numbers = [_number(number) for number in value]
        if None not in numbers:
            return numbers
    return [math.nan] * 4


def _convert(
    entries: Objects,
    key: str,
    dtype: type,
    plain: frozenset[type],
    convert: Callable[[Any], int | float | None],
    default: int | float | None,
) -> Column:
    raw = [entry.get(key) for entry in entries]
    odd = [at for at, value in enumerate(raw) if type(value) not in plain]
    rows = raw.copy()
    for at in odd:
        rows[at] = 0
    try:
        values = np.array(rows, dtype=dtype)
    except OverflowError:  # a number beyond int64 or float64
        odd, values = range(len(raw)), np.zeros(len(raw), dtype=dtype)
    valid = np.isfinite(values)
    for at in odd:
        converted = default if raw[at] is None else convert(raw[at])
        valid[at] = converted is not None
        values[at] = converted or 0
    return Column(values, valid)


def _integer(value: Any) -> int | None:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return None
    return int(value) if abs(int(value)) <= LARGEST_INTEGER else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
