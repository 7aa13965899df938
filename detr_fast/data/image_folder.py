# SPDX-License-Identifier: Apache-2.0
"""What the readers of image folders share: listing, image sizes, the COCO dict they produce."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

from detr_fast.data.images import turned
from detr_fast.data.validate import DataReport

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation")}
READERS = 16  # threads that wait for the disk or the network
PER_TASK = 64  # files

Read = TypeVar("Read")


class LabelledImage(NamedTuple):
    """An image and its objects.

    Attributes:
        name (str): file name relative to the image folder
        size (tuple[int, int]): width and height in pixels
        objects (list[tuple[int, list[float]]]): category id and box: x, y, width, height in pixels
    """

    name: str
    size: tuple[int, int]
    objects: list[tuple[int, list[float]]]


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image; hidden files are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def list_images(folder: Path) -> list[str]:
    """Image files of a folder and those below it, relative to it, in ascending order."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = PurePath(parent).relative_to(folder)
        names += [(below / name).as_posix() for name in files if is_image(name)]
    return sorted(names)


def in_threads(read: Callable[[str], Read], names: Iterable[str]) -> list[Read]:
    """What ``read`` returns for each name: many files are read faster at the same time."""
    names = list(names)
    # a task of its own for each file would cost more than the reading
    parts = [names[at : at + PER_TASK] for at in range(0, len(names), PER_TASK)]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda part: [read(name) for name in part], parts)
        return [value for part in found for value in part]


def image_sizes(
    folder: Path, names: Sequence[str], report: DataReport
) -> list[tuple[int, int] | None]:
    """Width and height in pixels from the headers of image files, without decoding them.

    Those of a photo that its camera took turned by 90 degrees are given as it is seen upright.
    None, and an entry in the report, where a file is missing or no image.

    Raises:
        ImportError: without pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading images needs pillow: pip install "detr-fast[train]"') from error

    def read(name: str) -> tuple[int, int] | str:
        path = os.path.join(folder, name)
        try:
            with Image.open(path) as image:
                # formats of cameras alone: a PNG would be decoded in search of the tag
                camera = image.format in ("JPEG", "MPO")
                return image.size[::-1] if camera and turned(image) else image.size
        except FileNotFoundError:
            return f"{path} (no such file)"
        except Exception as error:  # decoders raise errors of many classes over broken files
            return f"{path} ({type(error).__name__})"

    found = in_threads(read, names)
    unreadable = [size for size in found if isinstance(size, str)]
    report.add("images whose header cannot be read (left out)", unreadable)
    return [None if isinstance(size, str) else size for size in found]


def coco_content(images: Iterable[LabelledImage], categories: Mapping[int, str]) -> dict[str, Any]:
    """Images and boxes in the COCO format; ids count from 1 in ascending order of the names."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, (width, height), objects in sorted(images):
        image_id = len(entries) + 1
        entries.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for category, box in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in categories.items()],
    }
