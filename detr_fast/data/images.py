# SPDX-License-Identifier: Apache-2.0
"""Opening the image files of a data set, which may be gone, broken or of another size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


class UnusableImage(Exception):
    """An image cannot be used; the message says why in words that follow the image's name.

    Attributes:
        kind (int): key of `KINDS`
    """

    def __init__(self, kind: int, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def read_image(path: Path, size: Sequence[int]) -> Image:
    """Decode an image to RGB.

    A picture that its camera took turned by 90 degrees is turned upright where the annotated size
    says that the annotators saw it upright.

    Args:
        path (Path): any format that pillow reads
        size (Sequence[int]): annotated height and width in pixels, 0 where unknown

    Raises:
        UnusableImage: the file is missing, broken, cut off, or of another size.
    """
    return _read(path, size, lambda image: image.convert("RGB"))


def check_image(path: Path, size: Sequence[int]) -> None:
    """Raise what `read_image` would; a JPEG is decoded at an eighth of its size, for speed."""

    def decode(image: Image) -> Image:
        image.draft(None, (image.width // 8, image.height // 8))
        image.load()
        return image

    _read(path, size, decode)


def _read(path: Path, size: Sequence[int], decode: Callable[[Image], Image]) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if _other_size(size, (image.height, image.width)):
                if not turned(image) or _other_size(size, image.size):
                    why = f"has {image.width} x {image.height} pixels, not {size[1]} x {size[0]}"
                    raise UnusableImage(OTHER_SIZE, why)
                return decode(ImageOps.exif_transpose(image))
            return decode(image)
    except UnusableImage:
        raise
    except Exception as error:  # decoders raise errors of many classes over broken files
        if not os.path.exists(path):
            raise UnusableImage(MISSING, "is missing") from error
        raise UnusableImage(UNREADABLE, f"cannot be decoded ({error})") from error


def _other_size(annotated: Sequence[int], found: Sequence[int]) -> bool:
    return any(a not in (0, f) for a, f in zip(annotated, found, strict=True))


def turned(image: Image) -> bool:
    """Whether a camera took the picture turned by 90 degrees, and says so in it."""
    return image.getexif().get(_ORIENTATION) in _QUARTER_TURNS
