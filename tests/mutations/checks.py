# SPDX-License-Identifier: Apache-2.0
"""What a mutant has to pass: calls of ops whose results, or whose errors, are known."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close

OPS = torch.ops.detr_fast
Tolerance = dict[torch.dtype, dict[str, float]]  # arguments of assert_close
ITS_OWN: Tolerance = {}


class Check(NamedTuple):
    """A call of an op, and what is due."""

    op: str
    arguments: tuple
    message: str = ""  # part of an error
    right: tuple[Tensor, ...] | None = None
    tolerance: Tolerance = ITS_OWN
    copies: bool | None = None  # whether tensors have to be copied before they can be read
    every_schedule: bool = True


def run(check: Check) -> tuple[Tensor, ...]:
    result = getattr(OPS, check.op)(*check.arguments)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def copies(check: Check) -> bool:
    """Whether a tensor is copied while a check runs."""
    with torch.autograd.profiler.profile() as profiler:
        run(check)
    names = [event.name for event in profiler.function_events]
    assert f"detr_fast::{check.op}" in names
    return "aten::copy_" in names


def failure(check: Check) -> str:
    """Why a check fails; nothing where it passes."""
    try:
        if check.copies is not None and copies(check) != check.copies:
            return f"{check.op}: copies of tensors that can be read where they lie, or none"
        ours = run(check)
    except RuntimeError as error:
        message = str(error)
        return "" if check.message and check.message in message else message
    if check.right is None:
        return f"{check.op}: no error, `{check.message}` is due"
    try:
        for value, wanted in zip(ours, check.right, strict=True):
            assert_close(value, wanted, equal_nan=True, **check.tolerance.get(wanted.dtype, {}))
    except AssertionError as error:
        return f"{check.op}: {error}"
    except ValueError:
        return f"{check.op}: {len(ours)} tensors, not {len(check.right)}"
    return ""
