# SPDX-License-Identifier: Apache-2.0
"""Which cells of a feature grid are padding: those that the original's interpolation finds."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_fast.data.batch import ImageBatch
from detr_fast.models.padding import padding_of_mask, padding_of_sizes


def sampled(sizes, pixels, grid):
    """Padded cells (B, h, w) by nearest interpolation of the mask, as the original does."""
    mask = torch.ones(len(sizes), *pixels, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes):
        mask[image, :height, :width] = False
    return F.interpolate(mask[None].float(), size=grid)[0].to(torch.bool)


# of an image's side in cells of the backbones, and others that share no factor
GRIDS = {
    (64, 96): (2, 3),
    (97, 131): (4, 5),
    (100, 101): (7, 13),
    (33, 70): (33, 9),
    (65, 1): (3, 1),
    (41, 57): (6, 8),
    (52, 58): (44, 54),  # where exact products are whole numbers and those of float32 are less
}


@pytest.mark.parametrize("pixels", GRIDS, ids=str)
def test_every_size_of_an_image_gives_the_sampled_cells(pixels):
    grid = GRIDS[pixels]
    sides = range(1, max(pixels) + 1)
    sizes = [(min(side, pixels[0]), min(side, pixels[1])) for side in sides]
    sizes += [(side, 1) for side in range(1, pixels[0] + 1)]
    padding = padding_of_sizes(torch.tensor(sizes, dtype=torch.int32), pixels, grid)
    expected = sampled(sizes, pixels, grid)
    assert torch.equal(padding.cells.unflatten(1, grid), expected)
    assert padding.width == grid[1]
    assert padding.rect.dtype == torch.int32
    counts = [(~expected).any(2).sum(1), (~expected).any(1).sum(1)]
    assert_close(padding.rect.long(), torch.stack(counts, dim=1))


def test_scales_that_float32_rounds_give_the_sampled_cells():
    """Rows of lengths to 1400 in the cells that strides of 8, 16 and 32 leave."""
    for length in range(2, 1401, 7):
        for stride in (8, 16, 32):
            cells = -(-length // stride)
            # the images at which the next cell begins, by the exact quotient, and their neighbours
            edges = {j * length // cells + d for j in range(1, cells + 1) for d in (-1, 0, 1, 2)}
            sizes = [(1, side) for side in sorted(edges) if 1 <= side <= length]
            found = padding_of_sizes(
                torch.tensor(sizes, dtype=torch.int32), (1, length), (1, cells)
            )
            row = torch.arange(length).float()[None, None]
            source = F.interpolate(row, size=cells)[0, 0]
            real = torch.tensor(sizes)[:, 1:]
            assert torch.equal(found.rect[:, 1].long(), (source < real).sum(1)), (length, cells)


def test_an_image_without_any_real_pixel_counts_as_unpadded():
    sizes = torch.tensor([(0, 64), (64, 0), (0, 0), (1, 1)], dtype=torch.int32)
    padding = padding_of_sizes(sizes, (64, 64), (2, 2))
    assert padding.rect.tolist() == [[2, 2]] * 3 + [[1, 1]]
    assert padding.cells.sum(1).tolist() == [0, 0, 0, 3]
    mask = ImageBatch(torch.zeros(4, 3, 64, 64), sizes).mask
    assert torch.equal(padding_of_mask(mask, (2, 2)).cells, padding.cells)


def test_any_mask_is_sampled_to_the_nearest_cell():
    """Of 10 columns in 7, a cell is padding when the pixel at floor(i * 10 / 7) is."""
    mask = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    padding = padding_of_mask(mask, (7, 7))
    places = [i * 10 // 7 for i in range(7)]
    assert torch.equal(padding.cells.unflatten(1, (7, 7)), mask[:, places][:, :, places])
    assert padding.rect is None
