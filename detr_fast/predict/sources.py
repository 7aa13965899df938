# SPDX-License-Identifier: Apache-2.0
"""Images to look at: files, folders, patterns, videos, arrays, tensors, generated ones."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr_fast.config import UsageError
from detr_fast.data.images import UNREADABLE, UnusableImage, pixels_of, read_upright

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
SHAPES = "shapes"  # the generated validation images, where no file or folder has this name


class Source(NamedTuple):
    """An image that is read when it is its turn.

    Attributes:
        name (str): for messages and results.
        file (str): relative path under which its picture is written, without an ending.
        load (Callable): returns it (uint8 Tensor[3, H, W], upright RGB); raises UnusableImage.
    """

    name: str
    file: str
    load: Callable[[], Tensor]


def is_one(images: Any) -> bool:
    """Whether this is one image, and not several or what may hold several."""
    if isinstance(images, (str, os.PathLike)):
        path = Path(images)
        return path.is_file() and path.suffix.lower() not in VIDEOS
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim < 4
    return not isinstance(images, Sequence | Iterator)


def find_sources(images: Any) -> Iterator[Source]:
    """The images behind a path, a folder (with all below it), a pattern, or something in memory.

    Args:
        images: a path of an image or a video, a folder, a pattern such as ``photos/*.jpg``,
            ``"shapes"``, an image of pillow, an array (ndarray[H, W, 3], uint8 RGB; or grey, or
            with alpha), a tensor (Tensor[3, H, W], uint8 or floating point in [0, 1]), a batch of
            these (4 dimensions), or a sequence of any of all that.

    Raises:
        UsageError: if a path leads nowhere, or a folder or pattern to no image.
        TypeError, ValueError: if it is nothing of that kind; says what it is.
    """
    if isinstance(images, (str, os.PathLike)):
        yield from _of_path(Path(images), os.fspath(images))
    elif isinstance(images, Sequence | Iterator) or getattr(images, "ndim", 0) == 4:
        for place, image in enumerate(images):
            if isinstance(image, (str, os.PathLike)):
                yield from _of_path(Path(image), os.fspath(image))
            else:
                yield Source(str(place), f"{place:06}", _loader(image, str(place)))
    else:
        yield Source("image", "image", _loader(images, "image"))


def _of_path(path: Path, text: str) -> Iterator[Source]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _is_image(p, hidden_below=path))
        if not found:
            raise UsageError(f"{path}: no image in this folder")
        for file in found:
            yield _of_file(file, file.relative_to(path))
    elif path.exists():
        yield from _of_video(path) if _is_video(path) else [_of_file(path, Path(path.name))]
    elif glob.has_magic(text):
        found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        found = [file for file in found if _is_image(file) or _is_video(file)]
        if not found:
            raise UsageError(f"{text}: no image fits this pattern")
        for file in found:
            yield from _of_video(file) if _is_video(file) else [_of_file(file, Path(file.name))]
    elif text == SHAPES:
        yield from _generated()
    else:
        raise UsageError(f"{text}: no such file or folder, and no pattern such as photos/*.jpg")


def _is_image(path: Path, hidden_below: Path | None = None) -> bool:
    from PIL import Image

    if hidden_below and any(p.startswith(".") for p in path.relative_to(hidden_below).parts):
        return False
    known = Image.registered_extensions()
    return path.suffix.lower() in known and known[path.suffix.lower()] in Image.OPEN


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def _of_file(path: Path, shown: Path) -> Source:
    # a name that came with `..` must not lead the picture out of its folder
    parts = [part for part in shown.with_suffix("").parts if part not in ("..", shown.anchor)]
    return Source(str(path), str(Path(*parts)), lambda: read_upright(path))


def _of_video(path: Path) -> Iterator[Source]:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:  # it also needs the libraries of ffmpeg
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f'{path}: videos need torchcodec and ffmpeg: pip install "detr-fast[video]" ({reason})'
        ) from error
    try:
        frames = VideoDecoder(str(path))
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{path}: cannot be decoded ({str(error).splitlines()[0]})") from error
    lock = Lock()
    for number in range(len(frames)):
        load = partial(_frame, frames, lock, number)
        yield Source(f"{path}#{number}", f"{path.name}/{number:06}", load)


def _frame(frames: Any, lock: Lock, number: int) -> Tensor:
    with lock:  # two threads at one decoder crash the process
        try:
            return frames[number]
        except (RuntimeError, IndexError) as error:
            why = f"cannot be decoded ({str(error).splitlines()[0]})"
            raise UnusableImage(UNREADABLE, why) from error


def _generated() -> Iterator[Source]:
    from detr_fast.data.shapes import ShapesDetection

    dataset = ShapesDetection("val")
    for index in range(len(dataset)):
        yield Source(f"{SHAPES}/{index}", f"{index:06}", _picture(dataset, index))


def _picture(dataset: Any, index: int) -> Callable[[], Tensor]:
    return lambda: dataset.load_image(index)


def _loader(image: Any, name: str) -> Callable[[], Tensor]:
    return lambda: as_rgb(image, name)


def as_rgb(image: Any, name: str) -> Tensor:
    """An image in memory as (uint8 Tensor[3, H, W]).

    Raises:
        TypeError, ValueError: if it is none; says what it is.
    """
    if isinstance(image, np.ndarray):
        return _of_array(image, name)
    if isinstance(image, Tensor):
        return _of_tensor(image, name)
    if hasattr(image, "getexif"):
        return pixels_of(image)
    raise TypeError(
        f"image {name}: expected a path, an image of pillow, an array or a tensor, got "
        f"{type(image).__name__}"
    )


def _of_array(image: np.ndarray, name: str) -> Tensor:
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or not image.size:
        raise ValueError(
            f"image {name}: expected an array (H, W, 3), RGB, or grey or with alpha, got shape "
            f"{image.shape}"
        )
    if image.dtype != np.uint8:
        raise TypeError(f"image {name}: expected an array of uint8, got {image.dtype}")
    channels = torch.from_numpy(np.array(image[..., :3])).permute(2, 0, 1)
    return channels.expand(3, -1, -1)


def _of_tensor(image: Tensor, name: str) -> Tensor:
    if image.dim() != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise ValueError(
            f"image {name}: expected a tensor (3, H, W), RGB or grey, got shape "
            f"{tuple(image.shape)}"
        )
    image = image.detach().cpu().expand(3, -1, -1)
    if image.is_floating_point():
        low, high = image.aminmax()
        if low < 0 or high > 1 or not low.isfinite():
            raise ValueError(
                f"image {name}: floating-point pixels are in [0, 1], not normalised; found "
                f"{low.item():.3g} to {high.item():.3g}"
            )
        return (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise TypeError(f"image {name}: expected uint8 or floating point, got {image.dtype}")
    return image


def read(source: Source) -> Tensor | UnusableImage:
    """The image, or why there is none: a thread that reads ahead raises nothing."""
    try:
        return source.load()
    except UnusableImage as error:
        return error
