# SPDX-License-Identifier: Apache-2.0
"""Where a cell of the feature grid is: sine and learned position encodings."""

import math

import torch
from torch import Tensor, nn

from detr_fast.models.inference_cache import InferenceCache
from detr_fast.models.padding import Padding


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
        self.kept = InferenceCache()

    def forward(self, features: Tensor, padding: Padding | None) -> Tensor:
        """Encode the grid of the features.

        Args:
            features (Tensor[B, C, H, W]): of which shape, dtype and device count.
            padding (Padding, optional): their padded cells, whose encoding is of no account.

        Returns:
            Tensor[B, H * W, channels], or Tensor[H * W, channels] if there is no padding: the
            row's channels first. In inference a grid without padding gets the tensor of before.
        """
        (height, width), device, dtype = features.shape[-2:], features.device, features.dtype
        if padding is None:
            return self.kept(
                lambda: self._encoded(*_places(height, width, device))[0].to(dtype),
                device,
                key=(height, width, dtype),
            )
        if padding.rect is not None:  # sines are of rows and columns, not of every cell
            rows, _, columns, _ = _places(height, width, device)
            last_row, last_column = padding.rect[..., None, None].unbind(1)
            return self._encoded(rows, last_row, columns, last_column).to(dtype)
        real = ~padding.cells.unflatten(1, (height, width))
        rows = real.cumsum(1, dtype=torch.float32)
        columns = real.cumsum(2, dtype=torch.float32)
        return self._encoded(rows, rows[:, -1:], columns, columns[:, :, -1:]).to(dtype)

    def _encoded(
        self, rows: Tensor, last_row: Tensor, columns: Tensor, last_column: Tensor
    ) -> Tensor:
        exponents = torch.arange(0, self.half, 2, dtype=torch.float32, device=rows.device)
        wavelengths = self.temperature ** (exponents / self.half)

        def waves(places: Tensor, last: Tensor) -> Tensor:
            angles = (places / (last + self.eps) * (2 * math.pi))[..., None] / wavelengths
            return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)

        both = waves(rows, last_row), waves(columns, last_column)
        return torch.cat(torch.broadcast_tensors(*both), dim=-1).flatten(1, 2)


def _places(height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Rows (1, H, 1), the last of them, columns (1, 1, W) and the last of them, from 1 on."""
    rows, columns = (
        torch.arange(1, count + 1, device=device, dtype=torch.float32) for count in (height, width)
    )
    rows, columns = rows[None, :, None], columns[None, None, :]
    return rows, rows[:, -1:], columns, columns[:, :, -1:]


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
        self.kept = InferenceCache()

    def forward(self, features: Tensor, padding: Padding | None) -> Tensor:
        """Encode the grid of the features, for all images alike.

        Args:
            features (Tensor[B, C, H, W]): of which shape, dtype and device count.
            padding (Padding, optional): of no account.

        Returns:
            Tensor[H * W, channels]: the column's channels first; in inference the tensor of before.

        Raises:
            ValueError: if the grid has more than 50 rows or columns.
        """
        (height, width), dtype = features.shape[-2:], features.dtype
        if max(height, width) > self.size:
            raise ValueError(
                f"learned position encoding: a grid of {height} x {width} cells exceeds its "
                f"{self.size} x {self.size}: use smaller images or position_embedding='sine'"
            )

        def encoded() -> Tensor:
            columns = self.col_embed.weight[:width].expand(height, -1, -1)
            rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
            return torch.cat([columns, rows], dim=-1).flatten(0, 1).to(dtype)

        sources = (self.col_embed.weight, self.row_embed.weight)
        return self.kept(encoded, features.device, *sources, key=(height, width, dtype))
