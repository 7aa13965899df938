# SPDX-License-Identifier: Apache-2.0
"""Detections drawn on their images."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.visualize.canvas import (
    DPI,
    INK,
    WIDTH,
    Color,
    blank_figure,
    class_color,
    luminance,
    save_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Box(NamedTuple):
    """A box to draw: corners in pixels of the image, its class, its score (None: ground truth)."""

    corners: tuple[float, float, float, float]
    label: int
    score: float | None = None


class _Picture(NamedTuple):
    """One cell of the grid; the detections with falling score."""

    image: Tensor
    detections: list[_Box]
    truth: list[_Box]
    caption: str


def draw_detections(
    images: Sequence[Tensor],
    detections: Sequence[Mapping[str, Tensor]],
    class_names: Mapping[int, str],
    output_png: str | os.PathLike[str],
    **options: Any,
) -> None:
    """Draw images with their detections, to a PNG.

    Args and errors are those of `detections_figure`, with the file in the fourth place.
    """
    save_png(detections_figure(images, detections, class_names, **options), output_png)


def detections_figure(
    images: Sequence[Tensor],
    detections: Sequence[Mapping[str, Tensor]],
    class_names: Mapping[int, str],
    *,
    targets: Sequence[Mapping[str, Tensor]] | None = None,
    threshold: float = 0.5,
    columns: int = 4,
    top_k: int = 20,
    titled: bool = True,
) -> Figure:
    """Draw images with their detected boxes, class names and scores in a grid.

    A box has the colour of its class (`canvas.class_color`). Ground truth is dashed in white; where
    no detection of its class overlaps it with an IoU of 0.5, it bears its name if there is room.

    Args:
        images (list[Tensor[3, H, W]]): uint8, RGB.
        detections (list[dict]): of each image what `PostProcess` returns: ``scores`` (N,),
            ``labels`` (N,) and ``boxes`` (N, 4), corners in pixels of the image.
        class_names (dict[int, str]): label -> name.
        targets (list[dict], optional): of each image ``labels`` (T,) and ``boxes`` (T, 4),
            corners in pixels of the image.
        threshold (float): the lowest score to draw.
        columns (int): images side by side.
        top_k (int): of one image only the detections with the highest scores are drawn.
        titled (bool): whether the figure says what it shows, and each image how much it has.

    Raises:
        TypeError, ValueError: something has another type or shape; the message says what.
    """
    _check(images, detections, targets, columns)
    pictures = []
    for i, image in enumerate(images):
        found = _boxes(detections[i], threshold)
        caption = f"{len(found)} detected"
        if len(found) > top_k:
            caption = f"the best {top_k} of {caption}"
        truth = _boxes(targets[i]) if targets is not None else []
        if targets is not None:
            caption += f", {len(truth)} annotated"
        pictures.append(_Picture(image, found[:top_k], truth, caption))
    head = f"Detections, score \N{GREATER-THAN OR EQUAL TO} {threshold:g}"
    if targets is not None:
        head += " (dashed in white: ground truth)"
    return _grid(pictures, class_names, columns, head if titled else "")


def _check(
    images: Sequence[Tensor],
    detections: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]] | None,
    columns: int,
) -> None:
    if not images or columns < 1:
        raise ValueError(f"nothing to draw: {len(images)} images in {columns} columns")
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise ValueError(f"images[{i}] must be (3, H, W); found {tuple(image.shape)}")
        if image.dtype != torch.uint8:
            raise TypeError(f"images[{i}] must be uint8, not normalised; found {image.dtype}")
    for name, entries, keys in (
        ("detections", detections, ("labels", "scores")),
        ("targets", targets, ("labels",)),
    ):
        if entries is None:
            continue
        if len(entries) != len(images):
            raise ValueError(f"{len(images)} images, but {name} of {len(entries)}")
        for i, entry in enumerate(entries):
            if missing := {*keys, "boxes"} - entry.keys():
                raise ValueError(f"{name}[{i}] lacks {sorted(missing)}; found {sorted(entry)}")
            boxes = entry["boxes"]
            shapes = {key: tuple(entry[key].shape) for key in (*keys, "boxes")}
            count = (boxes.shape[0],) if boxes.ndim else ()
            if shapes["boxes"] != (*count, 4) or any(shapes[key] != count for key in keys):
                raise ValueError(
                    f"{name}[{i}] must have N boxes (N, 4) and N {keys}; found {shapes}"
                )
            if name == "targets" and len(boxes) and boxes.max() <= 1:
                raise ValueError(
                    f"targets[{i}]['boxes'] lie in [0, 1]: corners in pixels of the image are "
                    "needed (x0, y0, x1, y1), not shares of its size"
                )


def _boxes(entry: Mapping[str, Tensor], threshold: float | None = None) -> list[_Box]:
    """The finite boxes of a detection dict that reach the threshold, best first; or of a target."""
    corners, labels = entry["boxes"].tolist(), entry["labels"].tolist()
    scores = [None] * len(labels) if threshold is None else entry["scores"].tolist()
    boxes = [_Box(tuple(c), *rest) for c, *rest in zip(corners, labels, scores, strict=True)]
    boxes = [box for box in boxes if all(map(math.isfinite, box.corners))]
    if threshold is None:
        return boxes
    return sorted((b for b in boxes if b.score >= threshold), key=lambda b: -b.score)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """The area that two rectangles share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _was_found(truth: _Box, detections: Sequence[_Box]) -> bool:
    """Whether a detection of the same class overlaps `truth` with an IoU of 0.5."""
    area = _overlap(truth.corners, truth.corners)
    for box in detections:
        shared = _overlap(truth.corners, box.corners)
        union = area + _overlap(box.corners, box.corners) - shared
        if box.label == truth.label and shared >= 0.5 * union:
            return True
    return False


def _grid(
    pictures: Sequence[_Picture], class_names: Mapping[int, str], columns: int, head: str
) -> Figure:
    """A figure in which each picture has a cell of its own, and nothing leaves its cell."""
    margin, gap, title, caption = (16, 14, 44, 20) if head else (0, 0, 0, 0)
    columns = min(columns, len(pictures))
    cell = min((WIDTH - 2 * margin - (columns - 1) * gap) // columns, 560)
    sizes = []
    for picture in pictures:
        height, width = picture.image.shape[1:]
        scale = cell / max(height, width)
        sizes.append((max(round(width * scale), 1), max(round(height * scale), 1)))
    rows = [range(i, min(i + columns, len(pictures))) for i in range(0, len(pictures), columns)]
    row_heights = [caption + max(sizes[i][1] for i in row) for row in rows]
    width = 2 * margin + columns * cell + (columns - 1) * gap
    height = title + sum(row_heights) + gap * len(rows)
    figure = blank_figure(width, height)
    figure.text(margin / width, 1 - margin / height, head, va="top", fontsize=11, color=INK)
    top = title
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            left = margin + column * (cell + gap)
            wide, high = sizes[i]
            figure.text(
                left / width,
                1 - (top + caption - 5) / height,
                pictures[i].caption if head else "",
                va="baseline",
                fontsize=8,
                color=INK,
            )
            lower = height - top - caption - high
            axes = figure.add_axes((left / width, lower / height, wide / width, high / height))
            _draw_picture(axes, pictures[i], class_names, wide / pictures[i].image.shape[2])
        top += row_height + gap
    return figure


def _draw_picture(
    axes: Axes, picture: _Picture, class_names: Mapping[int, str], scale: float
) -> None:
    """Draw one cell, `scale` screen pixels per pixel of the image."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    height, width = picture.image.shape[1:]
    axes.imshow(
        picture.image.permute(1, 2, 0).cpu().numpy(),
        extent=(0, width, height, 0),
        aspect="auto",
        interpolation="bicubic" if scale > 1 else "antialiased",
    )
    axes.set_axis_off()
    inset = 1 / scale  # a line along the border stays visible

    def rectangle(box: _Box, color: Color | str, line_width: float, **style: Any) -> None:
        x0, x1 = (min(max(x, inset), width - inset) for x in box.corners[::2])
        y0, y1 = (min(max(y, inset), height - inset) for y in box.corners[1::2])
        shadow = withStroke(linewidth=line_width + 1.2, foreground="black", alpha=0.55)
        axes.add_patch(
            Rectangle(
                (x0, y0),
                x1 - x0,
                y1 - y0,
                fill=False,
                edgecolor=color,
                linewidth=line_width,
                path_effects=[shadow],
                **style,
            )
        )

    for box in reversed(picture.detections):
        rectangle(box, class_color(box.label), 1.6)
    for box in picture.truth:
        rectangle(box, "white", 0.9, linestyle=(0, (4, 4)))
    labels = _Labels(axes, width * scale, height * scale, scale)
    named = [(b, f" {b.score:.2f}", class_color(b.label), False) for b in picture.detections]
    missed = [b for b in picture.truth if not _was_found(b, picture.detections)]
    named += [(b, " missed", (0.13, 0.13, 0.13), True) for b in missed]
    for box, ending, color, only_if_free in named:
        name = class_names.get(box.label, f"class {box.label}")
        labels.put(box, name, ending, color, only_if_free=only_if_free)


class _Labels:
    """Puts the names of boxes where they stay inside the picture and off one another.

    Args:
        axes (Axes): those of the picture.
        width (float), height (float): of the picture, in pixels of the screen.
        scale (float): pixels of the screen per pixel of the image.
    """

    def __init__(self, axes: Axes, width: float, height: float, scale: float) -> None:
        self.axes = axes
        self.width, self.height, self.scale = width, height, scale
        self.taken: list[tuple[float, float, float, float]] = []

    def put(self, box: _Box, name: str, ending: str, color: Color, *, only_if_free: bool) -> None:
        """Write `name` (shortened to the width of the picture) and `ending` beside the box.

        Where names must cover one another, the first one stays on top.
        """
        points, padding = 8, 2
        text = self.axes.text(
            0,
            0,
            name + ending,
            va="top",
            fontsize=points,
            color="black" if luminance(color) > 0.18 else "white",
            parse_math=False,
            clip_on=True,
            zorder=4 + 1 / (1 + len(self.taken)),
            bbox={
                "boxstyle": f"square,pad={padding / (points * DPI / 72)}",
                "facecolor": color,
                "edgecolor": "none",
            },
        )
        renderer = self.axes.figure.canvas.get_renderer()
        extent = text.get_window_extent(renderer)
        for kept in range(len(name) - 1, 0, -1):
            if extent.width + 2 * padding <= self.width:
                break
            text.set_text(name[:kept] + "\N{HORIZONTAL ELLIPSIS}" + ending)
            extent = text.get_window_extent(renderer)
        place = self._place(box, extent.width + 2 * padding, extent.height + 2 * padding)
        if only_if_free and self._covered(place):
            text.remove()
            return
        self.taken.append(place)
        text.set_position(((place[0] + padding) / self.scale, (place[1] + padding) / self.scale))

    def _place(self, box: _Box, wide: float, high: float) -> tuple[float, float, float, float]:
        """The first of the places around the box that covers least of the names before it."""
        x0, y0, x1, y1 = (corner * self.scale for corner in box.corners)
        places = []
        for x in (x0, x1 - wide, x1, x0 - wide):
            for y in (y0 - high, y1, y0, y1 - high):
                left = max(min(x, self.width - wide), 0)
                top = max(min(y, self.height - high), 0)
                places.append((left, top, left + wide, top + high))
        return min(places, key=self._covered)

    def _covered(self, place: tuple[float, float, float, float]) -> float:
        return sum(_overlap(place, other) for other in self.taken)
