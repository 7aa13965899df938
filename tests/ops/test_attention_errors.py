# SPDX-License-Identifier: Apache-2.0
"""What attention says of bad input: the same on every path."""

from contextlib import nullcontext

import pytest
import torch

from detr_fast import ops
from tests.cudasim import simulated
from tests.ops.attention_cases import attention_case, grid_case, raw_arguments

OPS = torch.ops.detr_fast
RECT = torch.tensor([[3, 5], [4, 6]], dtype=torch.int32)
COUNT = torch.tensor([3, 5], dtype=torch.int32)
GRID = {"key_rect": RECT, "padded_width": 6}
CASE = attention_case(24)
BAD = {
    "q": ({"q": CASE.q[0]}, r"q: expected shape \(\*, \*, \*, \*\), got \(2, 24, 32\)"),
    "heads of k": ({"k": CASE.k[:, :1]}, r"k: expected shape \(2, 2, \*, 32\), got \(2, 1, 24, 32"),
    "columns of k": ({"k": CASE.k[..., :8]}, r"k: expected .* got \(2, 2, 24, 8\)"),
    "dimensions of k": ({"k": CASE.k[0]}, r"k: expected .* got \(2, 24, 32\)"),
    "rows of v": (
        {"v": CASE.v[:, :, 1:]},
        r"v: expected shape \(2, 2, 24, \*\), got \(2, 2, 23, 32\)",
    ),
    "integers": ({"q": CASE.q.int()}, r"q: expected dtype torch\.float16, .*got torch\.int32"),
    "mixed": (
        {"k": CASE.k.half()},
        "k: expected the dtype of q, torch.bfloat16, got torch.float16",
    ),
    "mixed values": ({"v": CASE.v.double()}, "v: expected the dtype of q"),
    "dtype of a rect": (
        {**GRID, "key_rect": RECT.long()},
        r"key_rect: expected dtype torch\.int32, got torch\.int64",
    ),
    "shape of a rect": (
        {**GRID, "query_rect": RECT[:1]},
        r"query_rect: expected shape \(2, 2\), got \(1, 2\)",
    ),
    "shape of counts": (
        {"key_count": RECT},
        r"key_count: expected shape \(2,\), got \(2, 2\)",
    ),
    "dtype of counts": ({"key_count": COUNT.float()}, "key_count: expected dtype torch.int32"),
    "rect and count": (
        {**GRID, "key_count": COUNT},
        "key_rect and key_count: expected at most one of them",
    ),
    "no width": ({"query_rect": RECT}, "query_rect: needs padded_width"),
    "no grid": (
        {**GRID, "padded_width": 7},
        "key_rect: a sequence of 24 rows is no grid that is padded_width = 7 wide",
    ),
    "no cells": ({**GRID, "padded_width": 0}, "is no grid that is padded_width = 0 wide"),
    "probability": ({"dropout_p": 1.5}, "dropout_p: expected a probability, 0 to 1, got 1.5"),
    "no number": ({"dropout_p": float("nan")}, "dropout_p: .* got nan"),
    "mask of integers": (
        {"mask": torch.ones(24, 24, dtype=torch.int64)},
        r"mask: expected dtype torch\.bool, .* got torch\.int64",
    ),
    "shape of a mask": (
        {"mask": torch.ones(2, 24, dtype=torch.bool)},
        r"mask: expected a shape that broadcasts to \(2, 2, 24, 24\), got \(2, 24\)",
    ),
}
VALUE_ERRORS = {"rect and count", "no width", "probability", "no number"}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["here", "reference"])
def test_names_bad_input(device, name, path):
    changes, message = BAD[name]
    arguments = {
        key: x.to(device) if isinstance(x, torch.Tensor) else x
        for key, x in {"q": CASE.q, "k": CASE.k, "v": CASE.v, **changes}.items()
    }
    error = ValueError if name in VALUE_ERRORS else RuntimeError
    path = nullcontext() if path == "here" else ops.use_reference()
    with path, pytest.raises(error, match=message):
        ops.attention(**arguments)
    if not {"v", "mask", "dropout_p"} & set(changes):
        del arguments["v"]
        with pytest.raises(error, match=message):
            ops.attention_weights(**arguments)


def test_names_another_device(gpu):
    case = grid_case([(3, 5), (4, 6)], 4, 6, device=gpu)
    with pytest.raises(RuntimeError, match="key_rect: expected the device of q, cuda:0, got cpu"):
        ops.attention(*case[:3], key_rect=RECT, padded_width=6)
    with pytest.raises(RuntimeError, match="k: expected the device of q, cuda:0, got cpu"):
        ops.attention(case.q, CASE.k, case.v)


RAW = {
    "dtype": (lambda a: [a[0].float(), *a[1:]], "q: expected dtype Half or BFloat16, got Float"),
    "columns": (lambda a: [a[0][..., :16], *a[1:]], r"q: expected shape \(\*, \*, \*, 32\)"),
    "kept": (lambda a: [*a[:7], 0, None], "kept: expected 1 to 256, got 0"),
    "no seed": (lambda a: [*a[:7], 128, None], "seed: expected one if and only if kept < 256"),
    "a seed": (lambda a: [*a[:7], 256, torch.tensor(1)], "seed: expected one if and only if"),
    "seeds": (lambda a: [*a[:7], 8, torch.tensor([1])], r"seed: expected shape \(\), got \(1,\)"),
    "float seed": (lambda a: [*a[:7], 8, torch.tensor(1.0)], "seed: expected dtype Long"),
    "rect": (lambda a: [*a[:3], RECT.long(), *a[4:]], "query_rect: expected dtype Int, got Long"),
}


@pytest.mark.parametrize(("change", "message"), RAW.values(), ids=RAW)
def test_the_op_itself_checks_too(needs_simulator, change, message):
    with simulated(), pytest.raises(RuntimeError, match=message):
        OPS.attention(*change(list(raw_arguments(CASE))))
