# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: its training curves, and detections drawn on images."""

from __future__ import annotations

import colorsys
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.engine.log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]
Color = tuple[float, float, float]

WIDTH = 1200  # pixels of a picture
DPI = 100
INK, PALE, PAPER = "#222222", "#8a8a8a", "white"

# the hues that Okabe and Ito (2008) chose so that colour-blind eyes tell them apart, without black
_HUES = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


def class_color(label: int) -> Color:
    """The colour of a class, red, green and blue in [0, 1]: always the same, never near black.

    Labels 0 to 6 have the colours of Okabe and Ito; those above take golden-angle steps around the
    colour circle in three degrees of brightness.
    """
    if 0 <= label < len(_HUES):
        red, green, blue = (int(_HUES[label][i : i + 2], 16) / 255 for i in (1, 3, 5))
        return red, green, blue
    saturation, value = ((0.55, 1.0), (0.85, 0.95), (0.45, 0.75))[label % 3]
    return colorsys.hsv_to_rgb(label * 0.6180339887 % 1, saturation, value)


def training_curves_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss, class error, AP and learning rate over the epochs of one or several runs.

    With several runs the colour tells the run and the dash the series.

    Args:
        runs (dict): name of each run -> the records of its ``log.txt``.

    Returns:
        Figure: 1200 x 760 pixels; the axes in the order above.

    Raises:
        ValueError: there is no run, or a run without a record that has an epoch.
    """
    if not runs:
        raise ValueError("no run to draw: give at least one log file")
    figure = _figure(WIDTH, 760)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    several, best = len(runs) > 1, {}
    panels = [_panel(figure, i, *texts) for i, texts in enumerate(_PANELS)]
    for index, (name, records) in enumerate(runs.items()):
        by_epoch = {int(record["epoch"]): record for record in records if "epoch" in record}
        if not by_epoch:
            raise ValueError(f"the log of {name} has no epoch: train one first")
        for panel, row, key, place, label in _SERIES:
            points = [
                (epoch, y)
                for epoch, record in sorted(by_epoch.items())
                if math.isfinite(y := _number(record, key, place))
            ]
            if not points:
                continue
            if key == "test_coco_eval_bbox" and not row:
                best[name] = max(points, key=lambda point: point[1])
            panels[panel].plot(
                *zip(*points, strict=True),
                color=_RUN_COLORS[(index if several else row) % len(_RUN_COLORS)],
                linestyle=("-", "--")[row],
                marker="o" if len(points) <= 25 else "",
                markersize=4,
                linewidth=1.8,
                label=label,
            )
    _explain(figure, panels, list(runs), best)
    return figure


_RUN_COLORS = [_HUES[i] for i in (4, 5, 2, 6, 0, 1)] + ["#000000"]
_PANELS = (  # title, unit
    ("Loss", "weighted sum of its terms"),
    ("Class error of the matched queries", "%"),
    ("Average precision (validation)", ""),
    ("Learning rate", ""),
)
_SERIES = (  # panel, row (colour or dash), key and place in log.txt, label
    (0, 0, "train_loss", None, "training"),
    (0, 1, "test_loss", None, "validation"),
    (1, 0, "train_class_error", None, "training"),
    (1, 1, "test_class_error", None, "validation"),
    (2, 0, "test_coco_eval_bbox", 0, "AP (IoU 0.50:0.95)"),
    (2, 1, "test_coco_eval_bbox", 1, "AP50 (IoU 0.50)"),
    (3, 0, "train_lr", None, "all but the backbone"),
)


def _number(record: Mapping[str, Any], key: str, place: int | None) -> float:
    """The number under `key`, NaN where the epoch has none (COCO writes -1 for that)."""
    value = record.get(key)
    if place is not None and value is not None:
        value = math.nan if value[place] is None or value[place] < 0 else value[place]
    return math.nan if value is None else float(value)


def _panel(figure: Figure, index: int, title: str, unit: str) -> Axes:
    panel = figure.add_subplot(2, 2, index + 1)
    panel.set_title(title, loc="left", fontweight="bold", fontsize=12)
    panel.set_xlabel("epoch")
    panel.set_ylabel(unit)
    panel.grid(color="#e4e4e4", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.get_major_locator().set_params(integer=True)
    return panel


def _explain(
    figure: Figure, panels: list[Axes], names: list[str], best: dict[str, tuple[int, float]]
) -> None:
    """Scale the axes and say what the lines are."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    several = len(names) > 1
    epochs = [x for panel in panels for line in panel.lines for x in line.get_xdata()]
    for panel in panels:
        if not panel.lines:
            panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", color=PALE)
            continue
        if min(epochs) == max(epochs):
            panel.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        heights = [y for line in panel.lines for y in line.get_ydata()]
        if panel is panels[-1]:
            positive = [y for y in heights if y > 0] or [1.0]
            panel.set_yscale("log")
            panel.set_ylim(min(positive) / 2, max(positive) * 2)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
        else:
            panel.set_ylim(min(0, *heights), max(*heights, 1e-3) * 1.08)
        handles = {line.get_label(): line for line in panel.lines}
        if several:
            handles = {
                label: Line2D([], [], color=INK, linestyle=line.get_linestyle())
                for label, line in handles.items()
            }
        panel.legend(handles.values(), handles.keys(), frameon=True, framealpha=0.85, fontsize=9)

    def described(name: str) -> str:
        short = name if len(name) <= 48 else "\N{HORIZONTAL ELLIPSIS}" + name[-47:]
        short = "\N{HAIR SPACE}" + short.replace("$", r"\$")  # no leading _, which hides a label
        if name not in best:
            return short
        epoch, value = best[name]
        return f"{short}: best AP {value:.3f} in epoch {epoch}"

    if several:
        lines = [Line2D([], [], color=_RUN_COLORS[i % len(_RUN_COLORS)]) for i in range(len(names))]
        labels = [described(name) for name in names]
        figure.legend(lines, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=10)
    else:
        figure.suptitle(described(names[0]), x=0.01, ha="left", fontsize=13, color=INK)


def plot_training_curves(log_files: PathLike | Sequence[PathLike], output_png: PathLike) -> None:
    """Draw the curves of one ``log.txt``, or of several in one picture, to a PNG.

    A run is named after the folder of its log. See `training_curves_figure`.
    """
    files = [log_files] if isinstance(log_files, (str, os.PathLike)) else log_files
    paths = [Path(file).resolve() for file in files]
    names = [path.parent.name if path.name == "log.txt" else path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    figure = training_curves_figure(
        {name: read_log(path) for name, path in zip(names, paths, strict=True)}
    )
    _save(figure, output_png)


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
    output_png: PathLike,
    *,
    targets: Sequence[Mapping[str, Tensor]] | None = None,
    threshold: float = 0.5,
    columns: int = 4,
    top_k: int = 20,
) -> None:
    """Draw images with their detected boxes, class names and scores in a grid, to a PNG.

    A box has the colour of its class (`class_color`). Ground truth is dashed in white; it bears
    its name where no detection of its class overlaps it with an IoU of 0.5.

    Args:
        images (list[Tensor[3, H, W]]): uint8, RGB.
        detections (list[dict]): of each image what `PostProcess` returns: ``scores`` (N,),
            ``labels`` (N,) and ``boxes`` (N, 4), corners in pixels of the image.
        class_names (dict[int, str]): label -> name.
        output_png (path): the file; its folder is created when needed.
        targets (list[dict], optional): of each image ``labels`` (T,) and ``boxes`` (T, 4),
            corners in pixels of the image.
        threshold (float): the lowest score to draw.
        columns (int): images side by side.
        top_k (int): of one image only the detections with the highest scores are drawn.

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
    head = f"Detections with a score of at least {threshold:g}"
    if targets is not None:
        head += "; dashed in white: ground truth, named where it was missed"
    _save(_grid(pictures, class_names, columns, head), output_png)


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
    margin, gap, title, caption = 16, 14, 44, 20
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
    figure = _figure(width, height)
    figure.text(margin / width, 1 - margin / height, head, va="top", fontsize=11, color=INK)
    top = title
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            left = margin + column * (cell + gap)
            wide, high = sizes[i]
            figure.text(
                left / width,
                1 - (top + caption - 5) / height,
                pictures[i].caption,
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
    labels = _Labels(axes, width, height, scale)
    for box in picture.detections:
        name = class_names.get(box.label, f"class {box.label}")
        labels.put(box, name, f" {box.score:.2f}", class_color(box.label))
    for box in picture.truth:
        if not _was_found(box, picture.detections):
            name = class_names.get(box.label, f"class {box.label}")
            labels.put(box, name, " missed", (0.13, 0.13, 0.13))


class _Labels:
    """Puts the names of boxes where they stay inside the picture and off one another."""

    def __init__(self, axes: Axes, width: int, height: int, scale: float) -> None:
        self.axes = axes
        self.size = (width * scale, height * scale)
        self.scale = scale
        self.taken: list[tuple[float, float, float, float]] = []

    def put(self, box: _Box, name: str, ending: str, color: Color) -> None:
        """Write `name` (shortened to the width of the picture) and `ending` beside the box."""
        padding = 2
        text = self.axes.text(
            0,
            0,
            name + ending,
            va="top",
            fontsize=8,
            color="black" if _luminance(color) > 0.18 else "white",
            parse_math=False,
            clip_on=True,
            bbox={"boxstyle": f"square,pad={padding / _points(8)}", "fc": color, "ec": "none"},
        )
        renderer = self.axes.figure.canvas.get_renderer()
        for kept in range(len(name) - 1, 0, -1):
            extent = text.get_window_extent(renderer)
            if extent.width + 2 * padding <= self.size[0]:
                break
            text.set_text(name[:kept] + "\N{HORIZONTAL ELLIPSIS}" + ending)
        extent = text.get_window_extent(renderer)
        wide, high = extent.width + 2 * padding, extent.height + 2 * padding
        x0, y0, x1, y1 = (corner * self.scale for corner in box.corners)
        spots = [(x, y) for x in (x0, x1 - wide) for y in (y0 - high, y1, y0, y1 - high)]
        rooms = []
        for x, y in spots:
            left = min(max(x, 0), max(self.size[0] - wide, 0))
            top = min(max(y, 0), max(self.size[1] - high, 0))
            rooms.append((left, top, left + wide, top + high))
        room = min(rooms, key=lambda r: sum(_overlap(r, other) for other in self.taken))
        self.taken.append(room)
        text.set_position(((room[0] + padding) / self.scale, (room[1] + padding) / self.scale))


def _luminance(color: Color) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2), 0 for black and 1 for white."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _points(size: float) -> float:
    """Screen pixels of a length in points."""
    return size * DPI / 72


def _figure(width: int, height: int) -> Figure:
    """An empty figure of `width` x `height` pixels that no pyplot knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "detr-fast[train]"') from error
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: PathLike) -> None:
    """Write a PNG that is complete whenever it is there under its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(part, format="png", dpi=DPI)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
