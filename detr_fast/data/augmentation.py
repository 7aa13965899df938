# SPDX-License-Identifier: Apache-2.0
"""DETR's augmentation, planned before an image is read.

What is done to an image follows from a seed and from the image's size alone. So the sizes of a
whole epoch are known before it begins, and images of like sizes can be put into one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr_fast.data.splitmix import below, first_words

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = Image | Tensor

Target = dict[str, Tensor]

SHORT_SIDE = 800  # of an image at evaluation, in pixels; the other sizes are shares of it
SCALES = tuple(range(480, 801, 32))
MAX_SIZE = 1333
BEFORE_CROP = (400, 500, 600)
CROP = (384, 600)
PER_BOX = ("boxes", "labels", "area", "iscrowd")


def longest_side(short_side: int) -> int:
    """Pixels that no side of an image exceeds whose short side is at most ``short_side``."""
    return _scaled((MAX_SIZE,), short_side)[0]


def resized_size(
    height: int, width: int, short_side: int, max_size: int | None = None
) -> tuple[int, int]:
    """Height and width after a resize that keeps the aspect ratio, in pixels.

    The short side becomes ``short_side``, or as much less as keeps the long one within
    ``max_size``. The rounding is the original's: nearest for the corrected short side, down for
    the long side.
    """
    [size] = resized_sizes(np.array([[height, width]]), short_side, max_size).tolist()
    return size[0], size[1]


def resized_sizes(
    sizes: np.ndarray, short_sides: np.ndarray | int, max_size: int | None = None
) -> np.ndarray:
    """`resized_size` of many images.

    Args:
        sizes (ndarray[N, 2]): height and width, int64.
        short_sides (ndarray[N] | int): wanted.
        max_size (int, optional): limit of the long side.

    Returns:
        ndarray[N, 2]: int64.
    """
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    if max_size is not None:
        fitting = np.rint(max_size * short / long).astype(np.int64).clip(min=1)
        short_sides = np.where(long / short * short_sides > max_size, fitting, short_sides)
    long_sides = (short_sides * long / short).astype(np.int64)
    upright = sizes[:, 1] < sizes[:, 0]
    return np.where(
        upright[:, None],
        np.stack(np.broadcast_arrays(long_sides, short_sides), axis=1),
        np.stack(np.broadcast_arrays(short_sides, long_sides), axis=1),
    )


class Augmentation(NamedTuple):
    """What is done to one image: resize, cut out, mirror, resize.

    Attributes:
        first (tuple[int, int] | None): height and width of the first resize.
        crop (tuple[int, int, int, int] | None): top, left, height and width of what is cut out
            then.
        flip (bool): whether left and right change places.
        size (tuple[int, int]): height and width in the end.
    """

    first: tuple[int, int] | None
    crop: tuple[int, int, int, int] | None
    flip: bool
    size: tuple[int, int]

    def __call__(self, image: Picture, target: Target) -> tuple[Picture, Target]:
        """Apply the plan.

        The image is mirrored where it is smallest; the original mirrors it first, which is the same
        up to the rounding of pixels.

        Args:
            image (PIL.Image.Image | Tensor[3, h, w]): uint8, of the size that the plan is for.
            target (dict): boxes (Tensor[N, 4]: corners in pixels), area, labels, iscrowd.

        Returns:
            tuple: image and target in new pixels. Boxes are clipped to what is cut out, and get its
            area; those outside are dropped.
        """
        target = dict(target)
        if self.first is not None:
            image = _resize(image, target, self.first)
        if self.crop is not None:
            image = _crop(image, target, *self.crop)
        if self.flip:
            image = _flip(image, target)
        image = _resize(image, target, self.size)
        target["size"] = torch.tensor(self.size)
        return image, target


@dataclass(frozen=True)
class Augmentations:
    """The plans of N images, in columns.

    Attributes:
        crops (ndarray[N]): whether an image is resized, cut and resized again; else resized once.
        first (ndarray[N, 2]): see `Augmentation`; without meaning where not ``crops``.
        crop (ndarray[N, 4]): likewise.
        flip (ndarray[N]): bool.
        size (ndarray[N, 2]): int64.
    """

    crops: np.ndarray
    first: np.ndarray
    crop: np.ndarray
    flip: np.ndarray
    size: np.ndarray

    def __getitem__(self, index: int) -> Augmentation:
        first, crop = None, None
        if self.crops[index]:
            first, crop = tuple(self.first[index].tolist()), tuple(self.crop[index].tolist())
        return Augmentation(first, crop, bool(self.flip[index]), tuple(self.size[index].tolist()))


def draw(seeds: np.ndarray, sizes: np.ndarray, short_side: int = SHORT_SIDE) -> Augmentations:
    """Draw the augmentation of DETR's training (Carion et al. 2020, section 4 and appendix A.4).

    Every second image is mirrored. With equal chance an image is resized to a short side of 480 to
    800 pixels; or it is resized to one of 400 to 600, a rectangle with sides of 384 to 600 pixels
    (a shorter side is kept whole) is cut out anywhere, and this is resized to 480 to 800.

    Args:
        seeds (ndarray[N]): integers in [0, 2**63).
        sizes (ndarray[N, 2]): height and width of the images, at least 1.
        short_side (int): largest short side in pixels; all sizes are in proportion to it.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    scales, longest = np.array(_scaled(SCALES, short_side)), longest_side(short_side)
    before_crop = np.array(_scaled(BEFORE_CROP, short_side))
    low, high = _scaled(CROP, short_side)

    words = first_words(np.asarray(seeds), 8)
    crops, flip = words[0] >> np.uint64(63) == 1, words[1] >> np.uint64(63) == 1
    first = resized_sizes(sizes, before_crop[below(words[2], len(before_crop))])
    least, most = np.minimum(first, low), np.minimum(first, high)
    cut = least + below(words[3:5].T, most - least + 1)
    corner = below(words[5:7].T, first - cut + 1)
    whole = np.where(crops[:, None], cut, sizes)
    size = resized_sizes(whole, scales[below(words[7], len(scales))], longest)
    return Augmentations(crops, first, np.concatenate((corner, cut), axis=1), flip, size)


def draw_flip(seed: int) -> bool:
    """The `Augmentation.flip` of a seed."""
    return bool(first_words(np.array([seed]), 2)[1, 0] >> np.uint64(63))


def fresh_seed() -> int:
    """A seed from torch's default generator, which DataLoader seeds per worker."""
    return int(torch.randint(2**63 - 1, ()))


def _scaled(sizes: Sequence[int], short_side: int) -> tuple[int, ...]:
    return tuple(round(size * short_side / SHORT_SIDE) for size in sizes)


def size_of(image: Picture) -> tuple[int, int]:
    """Height and width of an image in pixels."""
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    return image.height, image.width


def _resize(image: Picture, target: Target, size: tuple[int, int]) -> Picture:
    height, width = size_of(image)
    scale_y, scale_x = size[0] / height, size[1] / width
    target["boxes"] = target["boxes"] * torch.tensor([scale_x, scale_y, scale_x, scale_y])
    target["area"] = target["area"] * (scale_x * scale_y)
    resized: Picture = _functional().resize(image, list(size), antialias=True)
    return resized


def _crop(image: Picture, target: Target, top: int, left: int, height: int, width: int) -> Picture:
    boxes = target["boxes"] - torch.tensor([left, top, left, top])
    boxes = boxes.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
    extent = boxes[:, 2:] - boxes[:, :2]
    keep = (extent > 0).all(dim=1)
    target |= {"boxes": boxes, "area": extent.prod(dim=1)}
    target |= {field: target[field][keep] for field in PER_BOX}
    if not isinstance(image, Tensor):
        return image.crop((left, top, left + width, top + height))
    cut = image[:, top : top + height, left : left + width]
    # torch resizes bytes whose channels lie together, row behind row, several times as fast
    return cut[None].contiguous(memory_format=torch.channels_last)[0]


def _flip(image: Picture, target: Target) -> Picture:
    _, width = size_of(image)
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    target["boxes"] = torch.stack((width - x1, y0, width - x0, y1), dim=1)
    flipped: Picture = _functional().horizontal_flip(image)
    return flipped


def _functional() -> Any:
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise ImportError('transforms need torchvision: pip install "detr-fast[train]"') from error
    return functional
