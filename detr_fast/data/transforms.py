# SPDX-License-Identifier: Apache-2.0
"""From the image of a data set to what a model takes: DETR's augmentation or evaluation resize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from detr_fast.data.augmentation import (
    SHORT_SIDE,
    Augmentation,
    Target,
    draw,
    fresh_seed,
    longest_side,
    resized_size,
    size_of,
)
from detr_fast.reference.image import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL.Image import Image

    from detr_fast.data.augmentation import Picture

# maps image and target to image and target; one that draws random numbers takes a seed after them
Transform = Callable[..., tuple[Any, Target]]

PIXELS = ("float32", "uint8")


def train_transforms(short_side: int = SHORT_SIDE, pixels: str = "float32") -> Transforms:
    """The augmentation of DETR's training, see `detr_fast.data.augmentation.draw`.

    Args:
        short_side (int): largest short side in pixels; all sizes are in proportion to it.
        pixels (str): of the result, see `Transforms`.
    """
    return Transforms(True, short_side, pixels)


def eval_transforms(short_side: int = SHORT_SIDE, pixels: str = "float32") -> Transforms:
    """The short side to 800 pixels, the long one to at most 1333, or both in proportion.

    Args:
        short_side (int): in pixels.
        pixels (str): of the result, see `Transforms`.
    """
    return Transforms(False, short_side, pixels)


@dataclass(frozen=True)
class Transforms:
    """Resizes an image, or augments it, and makes it a tensor.

    Args:
        augment (bool): draw what training does; else one resize.
        short_side (int): in pixels.
        pixels (str): ``"float32"``: normalised, by pillow's resize, as in the original;
            ``"uint8"``: bytes, to be normalised on the device, by torch's resize, which is faster
            and rounds a few bytes differently.
    """

    augment: bool
    short_side: int = SHORT_SIDE
    pixels: str = "float32"

    def __post_init__(self) -> None:
        if self.pixels not in PIXELS:
            raise ValueError(f"pixels {self.pixels!r}: choose {' or '.join(PIXELS)}")

    def __call__(
        self, image: Picture, target: Target, seed: int | None = None
    ) -> tuple[Tensor, Target]:
        """Transform image and target.

        Args:
            image (PIL.Image.Image | Tensor[3, h, w]): uint8 RGB.
            target (dict): boxes (Tensor[N, 4]) as corners in pixels, labels, area, iscrowd.
            seed (int, optional): of the augmentation; by default from torch's generator.

        Returns:
            tuple: the image (Tensor[3, H, W]), and a target with boxes (Tensor[N, 4]) as centre,
            width and height in shares of the image.
        """
        image = as_tensor(image) if self.pixels == "uint8" else as_pillow(image)
        image, target = self.plan(size_of(image), seed)(image, target)
        tensor = as_tensor(image)
        height, width = tensor.shape[-2:]
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        boxes = torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=1)
        target["boxes"] = boxes / torch.tensor([width, height, width, height])
        return tensor if self.pixels == "uint8" else normalize(tensor), target

    def plan(self, size: tuple[int, int], seed: int | None = None) -> Augmentation:
        """What is done to an image of this height and width."""
        if self.augment:
            seeds = np.array([fresh_seed() if seed is None else seed])
            return draw(seeds, np.array([size]), self.short_side)[0]
        final = resized_size(*size, self.short_side, longest_side(self.short_side))
        return Augmentation(None, None, False, final)


def as_tensor(image: Picture) -> Tensor:
    """The pixels of an image as (uint8 Tensor[3, h, w]); those of pillow lie together in memory."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_pillow(image: Picture) -> Image:
    """The image as one of pillow."""
    if not isinstance(image, Tensor):
        return image
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def normalize(image: Tensor) -> Tensor:
    """Standardise RGB channels by the ImageNet statistics that DETR's weights expect.

    Args:
        image (Tensor[..., 3, H, W]): uint8, or floating point in [0, 1]

    Returns:
        Tensor[..., 3, H, W]: new and contiguous; float32, or the floating-point type given
    """
    if image.is_floating_point():
        image = image.clone(memory_format=torch.contiguous_format)
    else:
        image = image.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    mean, std = (
        image.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return image.sub_(mean).div_(std)
