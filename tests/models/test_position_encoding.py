# SPDX-License-Identifier: Apache-2.0
"""Position encodings against their formulas, element by element."""

import math

import pytest
import torch
from torch.testing import assert_close

from detr_fast.models.position_encoding import PositionEncodingLearned, PositionEncodingSine


def padded(height, width, real_height, real_width):
    padding = torch.ones(height, width, dtype=torch.bool)
    padding[:real_height, :real_width] = False
    return padding


def test_sine_equals_its_formula():
    channels, sizes = 12, [(5, 7), (3, 7), (5, 1), (2, 4)]
    padding = torch.stack([padded(5, 7, *size) for size in sizes])
    encoding = PositionEncodingSine(channels)(padding)
    assert encoding.shape == (4, 5, 7, channels)
    assert encoding.dtype == torch.float32
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


def test_sine_of_real_cells_does_not_depend_on_the_padding():
    encode = PositionEncodingSine(16)
    alone = encode(padded(4, 6, 4, 6)[None])
    in_batch = encode(padded(9, 8, 4, 6)[None])
    assert torch.equal(in_batch[:, :4, :6], alone)


def test_sine_of_padding_alone_is_finite():
    assert PositionEncodingSine(8)(torch.ones(1, 3, 3, dtype=torch.bool)).isfinite().all()


def test_learned_joins_column_and_row():
    encode = PositionEncodingLearned(8)
    encoding = encode(padded(3, 50, 2, 2).expand(2, -1, -1))
    assert encoding.shape == (2, 3, 50, 8)
    for row, column in ((0, 0), (2, 1), (1, 49)):
        expected = torch.cat([encode.col_embed.weight[column], encode.row_embed.weight[row]])
        assert torch.equal(encoding[1, row, column], expected)


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
        PositionEncodingLearned(8)(torch.zeros(1, 51, 3, dtype=torch.bool))
