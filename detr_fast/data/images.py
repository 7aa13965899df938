# SPDX-License-Identifier: Apache-2.0
"""Opening the image files of a data set, which may be gone, broken or of another size.

A JPEG is decoded by torchvision, which takes 0.6 to 0.8 of pillow's time (one thread; baseline,
progressive and grey files) for the same bits: both use libjpeg-turbo. All other formats stay with
pillow. torchvision saves a fifth of the time over a PNG, too, but its decoder is no match for
broken ones: a few changed bytes end the process (torchvision 0.29).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MISSING, UNREADABLE, OTHER_SIZE = 1, 2, 3
KINDS = {
    MISSING: "images whose file is missing",
    UNREADABLE: "images that cannot be decoded",
    OTHER_SIZE: "images of another size than the annotations say",
}
_ORIENTATION = 0x0112  # EXIF tag
_QUARTER_TURNS = (5, 6, 7, 8)  # its values that swap width and height
_WHITE_OF_16_BITS = 65535
_JPEG = ("JPEG", "MPO")  # MPO: several pictures, of which the first is read

Result = TypeVar("Result")


class UnusableImage(Exception):
    """An image cannot be used; the message says why in words that follow the image's name.

    Attributes:
        kind (int): key of `KINDS`
    """

    def __init__(self, kind: int, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def read_image(path: Path, size: Sequence[int]) -> Tensor:
    """Decode an image to RGB.

    A picture that its camera took turned by 90 degrees is turned upright where the annotated size
    says that the annotators saw it upright.

    Args:
        path (Path): any format that pillow reads
        size (Sequence[int]): annotated height and width in pixels, 0 where unknown

    Returns:
        Tensor[3, h, w]: uint8; the channels of a pixel are neighbours in memory, as decoders leave
        them and torch resizes fastest.

    Raises:
        UnusableImage: the file is missing, broken, cut off, or of another size.
    """
    return _open(path, size, _pixels)


def read_upright(path: Path) -> Tensor:
    """Decode an image to RGB, turned and mirrored as its camera says (EXIF).

    Args:
        path (Path): any format that pillow reads

    Returns:
        Tensor[3, h, w]: uint8, as `read_image` returns it.

    Raises:
        UnusableImage: the file is missing, broken or cut off.
    """
    return _open(path, (0, 0), lambda image, _: pixels_of(image))


def pixels_of(image: Image) -> Tensor:
    """The upright pixels of an image of pillow (uint8 Tensor[3, h, w])."""
    return _pixels(image, image.getexif().get(_ORIENTATION, 1) != 1)


def check_image(path: Path, size: Sequence[int]) -> None:
    """Raise what `read_image` would; a JPEG is decoded at an eighth of its size, for speed."""

    def decode(image: Image, turn: bool) -> None:
        image.draft(None, (image.width // 8, image.height // 8))
        image.load()

    _open(path, size, decode)


def _open(path: Path, size: Sequence[int], decode: Callable[[Image, bool], Result]) -> Result:
    """What ``decode`` makes of an opened image, told whether to turn it upright."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            turn = _other_size(size, (image.height, image.width))
            if turn and (not turned(image) or _other_size(size, image.size)):
                why = f"has {image.width} x {image.height} pixels, not {size[1]} x {size[0]}"
                raise UnusableImage(OTHER_SIZE, why)
            return decode(image, turn)
    except UnusableImage:
        raise
    except Exception as error:  # decoders raise errors of many classes over broken files
        if not os.path.exists(path):
            raise UnusableImage(MISSING, "is missing") from error
        raise UnusableImage(UNREADABLE, f"cannot be decoded ({error})") from error


def _pixels(image: Image, turn: bool) -> Tensor:
    from PIL import ImageOps

    if image.format in _JPEG and image.fp is not None:  # pillow closes the file once it has read it
        pixels = _decoded_jpeg(image, turn)
        if pixels is not None:
            return pixels
    if turn:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which convert() would cut off what is above 255
        grey = np.array(image).astype(np.int64).clip(0, _WHITE_OF_16_BITS)
        grey = ((grey * 255 + _WHITE_OF_16_BITS // 2) // _WHITE_OF_16_BITS).astype(np.uint8)
        return torch.from_numpy(np.repeat(grey[..., None], 3, axis=2)).permute(2, 0, 1)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _decoded_jpeg(image: Image, turn: bool) -> Tensor | None:
    """None of a file that torchvision refuses: pillow reads some of them, or says what is wrong."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:  # a later torchvision will be without decoders, its version 0.29 warns
        return None
    image.fp.seek(0)
    content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pixels = decode_jpeg(content, ImageReadMode.RGB, apply_exif_orientation=turn)
    except RuntimeError:
        return None
    # pillow also knows of turns that are told elsewhere than in EXIF
    expected = image.size if turn and turned(image) else image.size[::-1]
    return pixels if pixels.shape[1:] == expected else None


def _other_size(annotated: Sequence[int], found: Sequence[int]) -> bool:
    return any(a not in (0, f) for a, f in zip(annotated, found, strict=True))


def turned(image: Image) -> bool:
    """Whether a camera took the picture turned by 90 degrees, and says so in it."""
    return image.getexif().get(_ORIENTATION) in _QUARTER_TURNS
