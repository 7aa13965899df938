# SPDX-License-Identifier: Apache-2.0
"""Keys of many JSON objects as arrays, with a mask of the values that are what they should be.

Values of plain types, the rule, are converted by numpy at once; only a list with others among them
is gone through value by value. No JSON value raises here.
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
_INT64 = np.iinfo(np.int64)


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
    low: int = _INT64.min,
    high: int = _INT64.max,
) -> Column:
    """Whole numbers in [low, high] (int64[N]); 3.0 is one, "3" and true are not.

    A key that is absent or null has the default; without one it is malformed.
    """
    values, valid = _convert(entries, key, np.int64, {int}, _integer, default)
    valid &= (values >= low) & (values <= high)
    values[~valid] = default or 0
    return Column(values, valid)


def switches(entries: Objects, key: str) -> Column:
    """0 or 1 (int64[N]), as number or as truth value; 0 where the key is absent or null."""

    def convert(value: Any) -> int | None:
        return int(value) if isinstance(value, bool) else _integer(value)

    values, valid = _convert(entries, key, np.int64, {int, bool}, convert, 0)
    valid &= (values == 0) | (values == 1)
    values[~valid] = 0
    return Column(values, valid)


def measures(entries: Objects, key: str) -> Column:
    """Finite numbers of 0 or more (float64[N]); NaN where malformed, absent or null.

    An absent one is valid.
    """
    values, valid = _convert(entries, key, np.float64, {int, float}, _number, math.nan)
    valid &= ~(values < 0)
    values[~valid] = math.nan
    return Column(values, valid)


def quadruples(entries: Objects, key: str) -> Column:
    """Lists of four finite numbers within `LARGEST_COORDINATE` (float64[N, 4])."""
    raw = [entry.get(key) for entry in entries]
    if set(map(type, raw)) <= {list, tuple} and set(map(len, raw)) <= {4}:
        flat = list(chain.from_iterable(raw))
        if set(map(type, flat)) <= {int, float}:
            try:
                values = np.array(flat, dtype=np.float64).reshape(len(raw), 4)
            except OverflowError:
                pass
            else:
                return _within_reach(values)
    return _within_reach(np.array([_quadruple(value) for value in raw]).reshape(len(raw), 4))


def _within_reach(values: np.ndarray) -> Column:
    valid = (np.abs(values) <= LARGEST_COORDINATE).all(axis=1)
    values[~valid] = 0
    return Column(values, valid)


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
    plain: set[type],
    convert: Callable[[Any], int | float | None],
    default: int | float | None,
) -> Column:
    raw = [entry.get(key) for entry in entries]
    if set(map(type, raw)) <= plain:
        try:
            values = np.array(raw, dtype=dtype)
        except OverflowError:  # a number beyond int64 or float64
            pass
        else:
            return Column(values, np.isfinite(values))
    values = np.full(len(raw), 0 if default is None else default, dtype=dtype)
    valid = np.ones(len(raw), dtype=bool)
    for at, value in enumerate(raw):
        converted = default if value is None else convert(value)
        if converted is None:
            valid[at] = False
        else:
            values[at] = converted
    return Column(values, valid)


def _integer(value: Any) -> int | None:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return None
    return int(value) if _INT64.min <= value <= _INT64.max else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
