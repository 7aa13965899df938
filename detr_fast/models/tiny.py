# SPDX-License-Identifier: Apache-2.0
"""The small model of the default run: a DETR that learns on two CPU cores within minutes.

It is the DETR of `detr_fast.models.detr`; small are its numbers and its backbone.  What makes it
learn within 1,200 steps is its start: a DETR of the usual start first spends hundreds of steps on
finding out where queries should look, and what a box has to do with where they look.  Here each
query looks at a cell of its own from the first step on (`place_queries`), features know their
coordinates (`Coordinates`), and no encoder stands between the two: with one, the start is slower.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detr_fast.models.model_config import ModelConfig

if TYPE_CHECKING:
    from detr_fast.models.detr import DETR

DETR_TINY = ModelConfig(
    num_classes=4,
    backbone="tiny",
    hidden_dim=128,
    nheads=8,
    enc_layers=0,
    dec_layers=2,
    dim_feedforward=256,
    dropout=0.0,
    num_queries=16,
    pre_norm=True,
)


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut; the identity at first.

    Args:
        width (int): channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (Tensor[B, width, H, W])`` to the same shape."""
        out = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu_(self.bn2(self.conv2(out)).add_(x))


class Coordinates(nn.Module):
    """Append the column and the row of every cell as two channels (Liu et al., NeurIPS 2018).

    DETR adds its position encoding to queries and keys and never to values, so that a box can be
    told from the values alone if the features carry their place; few convolutions cannot learn it
    from the border of the image.  Both run from -4 to 4 over the map, whatever its size, as boxes
    are shares of the image.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (Tensor[B, C, H, W])`` to Tensor[B, C + 2, H, W]."""
        height, width = x.shape[-2:]
        rows, columns = (
            (torch.arange(cells, dtype=x.dtype, device=x.device) + 0.5) * (8 / cells) - 4
            for cells in (height, width)
        )
        places = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)])
        return torch.cat([x, places.expand(x.shape[0], -1, -1, -1)], dim=1)


class ConvBackbone(nn.Module):
    """Strided and residual convolutions with batch norm; features at stride 16.

    Args:
        channels_last (bool): of a pixel all channels beside each other in memory, which saves a
            quarter of the time on a CPU; False: one channel after the other.
    """

    num_channels = 130

    def __init__(self, channels_last: bool = True) -> None:
        super().__init__()
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.body = nn.Sequential(
            *_halve(3, 16),
            *_halve(16, 48),
            *_halve(48, 64),
            Residual(64),
            *_halve(64, 128),
            Residual(128),
            nn.BatchNorm2d(128),  # behind ReLU half of the variance would be a constant
            Coordinates(),
        )
        self.body.to(memory_format=self.layout)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``images (Tensor[B, 3, H, W])`` to features Tensor[B, 130, H / 16, W / 16]."""
        return self.body(images.contiguous(memory_format=self.layout))


def _halve(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """A convolution of stride 2 with batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


@torch.no_grad()
def place_queries(model: "DETR", sharpness: float = 5.0) -> None:
    """Start a model with each query looking at a place of its own, on a grid over the image.

    Some channels of the position encoding, those of the shortest wavelengths, become lanes: there
    the norms in front of the decoder's attention to the image let no content pass at first, and
    queries and keys of each head are those channels and nothing else.  A query whose embedding is
    the encoding of a place so attends to the cells around it.  All of this is a start: every weight
    is trained, and names and shapes are those of any DETR.

    Args:
        model (DETR): with ``pre_norm`` and sine encoding; any other is left as it is.
        sharpness (float): how strongly a query prefers the cells next to its place.
    """
    config = model.config
    if not config.pre_norm or config.position_embedding != "sine":
        return
    width, heads = config.hidden_dim, config.nheads
    count = max(1, min(width // heads // 2, width // 16))
    lanes = torch.cat([torch.arange(count), width // 2 + torch.arange(count)])

    model.transformer.encoder.norm.weight[lanes] = 0
    for layer in model.transformer.decoder.layers:
        layer.norm2.weight[lanes] = 0
        for weight in layer.multihead_attn.in_proj_weight.chunk(3)[:2]:
            for head in weight.chunk(heads):
                head[: len(lanes)] = sharpness * torch.eye(width)[lanes]

    places = _grid(config.num_queries)
    fine = 64  # the encoding is sampled on a grid of fine x fine cells
    encoding = model.backbone[1](torch.empty(1, 0, fine, fine), None).unflatten(0, (fine, fine))
    # cell i of 8 is encoded as (i + 1) / 8: for 16 queries these are the places of whole cells, so
    # that a query starts with the features of one cell and not with the average of several
    rows, columns = (places * fine + fine / 8 - 1).round().long().clamp(max=fine - 1).unbind(1)
    model.query_embed.weight.copy_(encoding[rows, columns])


def _grid(count: int) -> Tensor:
    """Spread points evenly: Tensor[count, 2], rows and columns in (0, 1)."""
    lines = math.isqrt(count)
    points = []
    for line in range(lines):
        members = count * (line + 1) // lines - count * line // lines
        points += [((line + 0.5) / lines, (i + 0.5) / members) for i in range(members)]
    return torch.tensor(points)
