# SPDX-License-Identifier: Apache-2.0
"""What of a feature grid is padding, as the transformer gets it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Padding(NamedTuple):
    """Padded cells of a batch of feature grids.

    Attributes:
        cells (BoolTensor[B, L]): True where a cell is padding; the cells row by row.
        rect (IntTensor[B, 2] | None): int32 (h, w) where the real cells are the upper left h x w.
        width (int | None): cells of a row of the grid, with ``rect``.
    """

    cells: Tensor
    rect: Tensor | None = None
    width: int | None = None


def padding_of_sizes(sizes: Tensor, pixels: tuple[int, int], grid: tuple[int, int]) -> Padding:
    """Padding of a grid over images that fill the upper left of theirs, found on the device.

    A cell is what ``F.interpolate(mask, grid)`` samples for it, as in the original: cell j is
    padding where pixel ``floor(j * scale)`` is, with the product rounded to float32.

    Args:
        sizes (IntTensor[B, 2]): int32 (height, width) of each image without its padding.
        pixels (tuple[int, int]): height and width of the padded images.
        grid (tuple[int, int]): height and width of the feature grid.
    """
    # a softmax over no cell at all is NaN: an image that is all padding counts as none
    empty = (sizes <= 0).any(1, keepdim=True)
    sizes = sizes.masked_fill(empty, torch.iinfo(torch.int32).max)
    rows, columns = (
        torch.arange(cells, device=sizes.device, dtype=torch.float32) * (length / cells) < real
        for cells, length, real in zip(grid, pixels, sizes.split(1, dim=1), strict=True)
    )
    rect = torch.stack([rows.sum(1, dtype=torch.int32), columns.sum(1, dtype=torch.int32)], dim=1)
    real_cells = rows[:, :, None] & columns[:, None, :]
    return Padding(~real_cells.flatten(1), rect, grid[1])


def padding_of_mask(mask: Tensor, grid: tuple[int, int]) -> Padding:
    """Padding of a grid where any pixel may be padding.

    Args:
        mask (BoolTensor[B, H, W]): True where a pixel is padding.
        grid (tuple[int, int]): height and width of the feature grid.
    """
    cells = F.interpolate(mask[None].float(), size=grid)[0].to(torch.bool).flatten(1)
    # as above: an image that is all padding counts as none
    return Padding(cells & ~cells.all(1, keepdim=True))
