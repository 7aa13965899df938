# SPDX-License-Identifier: Apache-2.0
"""DETR's augmentation and evaluation resize.

A transform maps ``(image, target)`` to ``(image, target)``. The image is a PIL image or a uint8
tensor; boxes are corners in pixels until `ToModelInput`, the last step, normalises both. Every
random number is drawn from torch's default generator, which DataLoader seeds per worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = Image | Tensor

Target = dict[str, Tensor]
Transform = Callable[["Picture", Target], tuple[Any, Target]]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SHORT_SIDE = 800  # of an image at evaluation, in pixels; the other sizes are shares of it
SCALES = tuple(range(480, 801, 32))
MAX_SIZE = 1333
PER_BOX = ("boxes", "labels", "area", "iscrowd")


def train_transforms(short_side: int = SHORT_SIDE) -> Transform:
    """The augmentation of DETR's training (Carion et al. 2020, section 4 and appendix A.4).

    A flip of every second image, then with equal chance a resize, or a resize, a crop and a
    resize.

    Args:
        short_side (int): largest short side in pixels; all sizes are in proportion to it.
    """
    v2 = _transforms_v2()
    scales, longest = _scaled(SCALES, short_side), longest_side(short_side)
    before_crop, crop = _scaled((400, 500, 600), short_side), _scaled((384, 600), short_side)
    cropped = [Resize(before_crop), RandomSizeCrop(*crop), Resize(scales, longest)]
    transform: Transform = v2.Compose(
        [
            RandomHorizontalFlip(0.5),
            v2.RandomChoice([Resize(scales, longest), v2.Compose(cropped)]),
            ToModelInput(),
        ]
    )
    return transform


def eval_transforms(short_side: int = SHORT_SIDE) -> Transform:
    """The short side to 800 pixels, the long one to at most 1333, or both in proportion.

    Args:
        short_side (int): in pixels.
    """
    resize = Resize((short_side,), longest_side(short_side))
    transform: Transform = _transforms_v2().Compose([resize, ToModelInput()])
    return transform


def longest_side(short_side: int) -> int:
    """Pixels that no side of an image exceeds whose short side is at most ``short_side``."""
    return _scaled((MAX_SIZE,), short_side)[0]


def _scaled(sizes: Sequence[int], short_side: int) -> tuple[int, ...]:
    return tuple(round(size * short_side / SHORT_SIDE) for size in sizes)


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
    mean, std = (image.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return image.sub_(mean).div_(std)


def resized_size(
    height: int, width: int, short_side: int, max_size: int | None = None
) -> tuple[int, int]:
    """Height and width after a resize that keeps the aspect ratio, in pixels.

    The short side becomes ``short_side``, or as much less as keeps the long one within
    ``max_size``. The rounding is the original's: nearest for the corrected short side, down for
    the long side.
    """
    short, long = sorted((height, width))
    if max_size is not None and long / short * short_side > max_size:
        short_side = max(round(max_size * short / long), 1)
    long_side = int(short_side * long / short)
    return (long_side, short_side) if width < height else (short_side, long_side)


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirror left and right with probability ``p``."""

    p: float

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        """Returns image and boxes, mirrored or as they are."""
        if torch.rand(()).item() >= self.p:
            return image, target
        functional = _transforms_v2().functional
        _, width = functional.get_size(image)
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        boxes = torch.stack((width - x1, y0, width - x0, y1), dim=1)
        return functional.horizontal_flip(image), {**target, "boxes": boxes}


@dataclass(frozen=True)
class Resize:
    """Bilinear resize to a short side drawn from ``short_sides``; see `resized_size`."""

    short_sides: Sequence[int]
    max_size: int | None = None

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        """Returns the image in its new size, boxes and areas scaled with it."""
        functional = _transforms_v2().functional
        short_side = self.short_sides[_draw(0, len(self.short_sides) - 1)]
        height, width = functional.get_size(image)
        size = resized_size(height, width, short_side, self.max_size)
        scale_y, scale_x = size[0] / height, size[1] / width
        target = {
            **target,
            "boxes": target["boxes"] * torch.tensor([scale_x, scale_y, scale_x, scale_y]),
            "area": target["area"] * (scale_x * scale_y),
            "size": torch.tensor(size),
        }
        return functional.resize(image, list(size)), target


@dataclass(frozen=True)
class RandomSizeCrop:
    """Cut out a rectangle anywhere, each side uniform in [min_size, min(side, max_size)] pixels.

    A side shorter than ``min_size`` is kept whole. Boxes are clipped, their areas become those of
    the clipped boxes, and boxes outside are dropped.
    """

    min_size: int
    max_size: int

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        """Returns the cut-out and the boxes that lie in it."""
        functional = _transforms_v2().functional
        full_height, full_width = functional.get_size(image)
        width, height = self._side(full_width), self._side(full_height)
        top, left = _draw(0, full_height - height), _draw(0, full_width - width)

        boxes = target["boxes"] - torch.tensor([left, top, left, top])
        boxes = boxes.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
        extent = boxes[:, 2:] - boxes[:, :2]
        keep = (extent > 0).all(dim=1)
        target = {**target, "boxes": boxes, "area": extent.prod(dim=1)}
        target |= {field: target[field][keep] for field in PER_BOX}
        target["size"] = torch.tensor([height, width])
        return functional.crop(image, top, left, height, width), target

    def _side(self, full: int) -> int:
        return _draw(min(self.min_size, full), min(full, self.max_size))


class ToModelInput:
    """Image to a normalised tensor, boxes to centre, width and height as shares of its size."""

    def __call__(self, image: Picture, target: Target) -> tuple[Tensor, Target]:
        """Returns the image (float32 Tensor[3, H, W]) and a target with boxes (Tensor[N, 4])."""
        pixels: Tensor = _transforms_v2().functional.to_image(image).as_subclass(Tensor)
        height, width = pixels.shape[-2:]
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        boxes = torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=1)
        boxes = boxes / torch.tensor([width, height, width, height])
        return normalize(pixels), {**target, "boxes": boxes}

    def __repr__(self) -> str:
        return "ToModelInput()"


def _draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def _transforms_v2() -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError('transforms need torchvision: pip install "detr-fast[train]"') from error
    return v2
