# SPDX-License-Identifier: Apache-2.0
"""Position encodings against their formulas, element by element."""

import math

import pytest
import torch
from torch.testing import assert_close

from detr_fast.models.padding import Padding
from detr_fast.models.position_encoding import PositionEncodingLearned, PositionEncodingSine


def grid(height, width):
    """Features of which the shape counts."""
    return torch.zeros(1, 1, height, width)


def padding(height, width, *sizes, form="rect"):
    cells = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for image, (real_height, real_width) in enumerate(sizes):
        cells[image, :real_height, :real_width] = False
    rect = (torch.tensor(sizes, dtype=torch.int32), width) if form == "rect" else ()
    return Padding(cells.flatten(1), *rect)


@pytest.mark.parametrize("form", ["rect", "mask"])
def test_sine_equals_its_formula(form):
    channels, sizes = 12, [(5, 7), (3, 7), (5, 1), (2, 4)]
    encoding = PositionEncodingSine(channels)(grid(5, 7), padding(5, 7, *sizes, form=form))
    assert encoding.shape == (4, 35, channels)
    assert encoding.dtype == torch.float32
    encoding = encoding.unflatten(1, (5, 7))
    half = channels // 2
    for image, (height, width) in enumerate(sizes):
        for row in range(height):
            for column in range(width):
                expected = []
                for place, count in ((row + 1, height), (column + 1, width)):
                    angle = place / (count + 1e-6) * 2 * math.pi
                    for channel in range(half):
                        wave = angle / 10000 ** (2 * (channel // 2) / half)
                        expected.append(math.cos(wave) if channel % 2 else math.sin(wave))
                assert_close(
                    encoding[image, row, column], torch.tensor(expected), atol=1e-5, rtol=0
                )


def test_sine_of_real_cells_is_the_same_in_every_form():
    encode = PositionEncodingSine(16)
    alone = encode(grid(4, 6), None)
    assert alone.shape == (24, 16)
    for form in ("rect", "mask"):
        in_batch = encode(grid(9, 8), padding(9, 8, (9, 8), (4, 6), form=form))
        assert torch.equal(in_batch[1].unflatten(0, (9, 8))[:4, :6].flatten(0, 1), alone)


@pytest.mark.parametrize("form", ["rect", "mask"])
def test_sine_of_padding_alone_is_finite(form):
    encode = PositionEncodingSine(8)
    assert encode(grid(3, 3), padding(3, 3, (0, 0), form=form)).isfinite().all()


@pytest.mark.parametrize("encoding", [PositionEncodingSine, PositionEncodingLearned])
def test_encoding_has_the_dtype_of_the_features(encoding):
    features = grid(3, 4).bfloat16()
    for of in (None, padding(3, 4, (3, 4), (2, 2)), padding(3, 4, (3, 3), form="mask")):
        assert encoding(8)(features, of).dtype == torch.bfloat16


def test_learned_joins_column_and_row():
    encode = PositionEncodingLearned(8)
    encoding = encode(grid(3, 50), padding(3, 50, (3, 50), (2, 2))).unflatten(0, (3, 50))
    for row, column in ((0, 0), (2, 1), (1, 49)):
        expected = torch.cat([encode.col_embed.weight[column], encode.row_embed.weight[row]])
        assert torch.equal(encoding[row, column], expected)


def test_learned_starts_uniform_and_has_the_keys_of_the_original():
    state = PositionEncodingLearned(256).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "row_embed.weight": (50, 128),
        "col_embed.weight": (50, 128),
    }
    for weight in state.values():
        assert 0 <= weight.min() < 0.01 < 0.99 < weight.max() <= 1


def test_learned_names_the_limit():
    with pytest.raises(ValueError, match="51 x 3 cells exceeds its 50 x 50"):
        PositionEncodingLearned(8)(grid(51, 3), None)
