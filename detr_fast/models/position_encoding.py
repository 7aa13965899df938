# SPDX-License-Identifier: Apache-2.0
"""Where a cell of the feature grid is: sine and learned position encodings."""

import math

import torch
from torch import Tensor, nn


class PositionEncodingSine(nn.Module):
    """Sines and cosines of the normalised row and column (Carion et al., ECCV 2020, appendix A.4).

    Rows and columns count from 1 to the last cell that is not padding, which gets ``2 * pi``.

    Args:
        channels (int): channels of the encoding: half for the row, half for the column.
        temperature (float): ratio of the longest wavelength to the shortest.
    """

    eps = 1e-6

    def __init__(self, channels: int, temperature: float = 10000.0) -> None:
        super().__init__()
        self.half = channels // 2
        self.temperature = temperature

    def forward(self, padding: Tensor) -> Tensor:
        """Encode a grid.

        Args:
            padding (BoolTensor[B, H, W]): True where a cell is padding.

        Returns:
            Tensor[B, H, W, channels]: float32, the row's channels first.
        """
        real = ~padding
        rows = real.cumsum(1, dtype=torch.float32)
        columns = real.cumsum(2, dtype=torch.float32)
        rows = rows / (rows[:, -1:, :] + self.eps) * (2 * math.pi)
        columns = columns / (columns[:, :, -1:] + self.eps) * (2 * math.pi)
        exponents = torch.arange(0, self.half, 2, dtype=torch.float32, device=padding.device)
        wavelengths = self.temperature ** (exponents / self.half)
        angles = torch.stack([rows, columns], dim=-1)[..., None] / wavelengths
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


class PositionEncodingLearned(nn.Module):
    """One trained vector for every row and one for every column.

    Args:
        channels (int): channels of the encoding: half for the column, half for the row.
    """

    size = 50

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.size, channels // 2)
        self.col_embed = nn.Embedding(self.size, channels // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, padding: Tensor) -> Tensor:
        """Encode a grid.

        Args:
            padding (BoolTensor[B, H, W]): gives the size of the grid; its values do not matter.

        Returns:
            Tensor[B, H, W, channels]: the column's channels first.

        Raises:
            ValueError: if the grid has more than 50 rows or columns.
        """
        batch, height, width = padding.shape
        if max(height, width) > self.size:
            raise ValueError(
                f"learned position encoding: a grid of {height} x {width} cells exceeds its "
                f"{self.size} x {self.size}: use smaller images or position_embedding='sine'"
            )
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).expand(batch, -1, -1, -1)
