# SPDX-License-Identifier: Apache-2.0
"""The small model of the default run: a DETR that learns on two CPU cores within minutes.

It is the DETR of `detr_fast.models.detr` with a small convolutional backbone.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from detr_fast.models.model_config import ModelConfig

DETR_TINY = ModelConfig(
    num_classes=4,
    backbone="tiny",
    position_embedding="learned",
    hidden_dim=128,
    nheads=8,
    enc_layers=2,
    dec_layers=3,
    dim_feedforward=512,
    dropout=0.0,
    num_queries=25,
    pre_norm=True,
)


class Coordinates(nn.Module):
    """Append the column and the row of every cell as two channels (Liu et al., NeurIPS 2018).

    DETR's values carry no position (its encoding goes into queries and keys alone), and few small
    convolutions cannot learn it from the border of the image.  In pixels of the input, so that
    padding to the right and below changes nothing.

    Args:
        stride (int): pixels of the input per cell.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (Tensor[B, C, H, W])`` to Tensor[B, C + 2, H, W]."""
        height, width = x.shape[-2:]
        step = torch.arange(max(height, width), dtype=x.dtype, device=x.device)
        place = (step + 0.5) * (self.stride / 16) - 4  # -4 ... 4 over 128 pixels
        columns = place[:width].expand(len(x), 1, height, width)
        rows = place[:height, None].expand(len(x), 1, height, width)
        return torch.cat([x, columns, rows], dim=1)


class ConvBackbone(nn.Module):
    """Four strided convolutions with batch norm, features at stride 16."""

    num_channels = 130

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers, Coordinates(stride=16))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``images (Tensor[B, 3, H, W])`` to features Tensor[B, 130, H / 16, W / 16]."""
        return self.body(images)
