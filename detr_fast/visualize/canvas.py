# SPDX-License-Identifier: Apache-2.0
"""What all pictures share: colours, empty figures and the way to disk."""

from __future__ import annotations

import colorsys
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detr_fast.atomic_file import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Color = tuple[float, float, float]

WIDTH = 1200  # of the widest pictures, in pixels
DPI = 100
INK, PALE = "#222222", "#8a8a8a"

# the hues that Okabe and Ito (2008) chose so that colour-blind eyes tell them apart, without black
HUES = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
RUN_COLORS = [HUES[i] for i in (4, 5, 2, 6, 0, 1)] + ["#000000"]


def class_color(label: int) -> Color:
    """The colour of a class, red, green and blue in [0, 1]: always the same, never near black.

    Labels 0 to 6 have the colours of Okabe and Ito; those above take golden-angle steps around the
    colour circle in three degrees of brightness.
    """
    if 0 <= label < len(HUES):
        red, green, blue = (int(HUES[label][i : i + 2], 16) / 255 for i in (1, 3, 5))
        return red, green, blue
    saturation, value = ((0.55, 1.0), (0.85, 0.95), (0.45, 0.75))[label % 3]
    color = colorsys.hsv_to_rgb(label * 0.6180339887 % 1, saturation, value)
    while luminance(color) < 0.15:  # blues and violets
        red, green, blue = (0.9 * c + 0.1 for c in color)
        color = red, green, blue
    return color


def luminance(color: Color) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2), 0 for black and 1 for white."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def blank_figure(width: int, height: int) -> Figure:
    """An empty figure of `width` x `height` pixels that no pyplot knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "detr-fast[train]"') from error
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def panel(figure: Figure, place: tuple[int, int, int], title: str, x: str, y: str) -> Axes:
    """Axes with a title and the names of both directions.

    Args:
        figure (Figure): gets them.
        place (tuple[int, int, int]): rows and columns of the figure, and the number from 1 on.
        title (str), x (str), y (str): the texts.
    """
    axes = figure.add_subplot(*place)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def run_color(index: int) -> str:
    """The colour of a run among several."""
    return RUN_COLORS[index % len(RUN_COLORS)]


def readable(name: str, length: int = 40) -> str:
    """A name cut to a readable length and safe from matplotlib's markup."""
    name = name if len(name) <= length else "\N{HORIZONTAL ELLIPSIS}" + name[1 - length :]
    return "\N{HAIR SPACE}" + name.replace("$", r"\$")  # a leading _ would hide it in a legend


def run_names(paths: Sequence[Path]) -> list[str]:
    """Short names of folders and of files in them, or whole paths if two are alike."""
    names = [p.name if p.is_dir() else f"{p.parent.name}/{p.stem}" for p in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def encoded(figure: Figure, kind: str = "PNG") -> bytes:
    """The figure as a file.

    Args:
        figure (Figure): what to draw.
        kind (str): ``"PNG"``, with six bits per channel (photographs shrink by a third, and no eye
            sees it), or ``"JPEG"``.
    """
    import numpy as np
    from PIL import Image

    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    if kind == "PNG":
        pixels = pixels & 0xFC | pixels >> 6
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format=kind, quality=88)
    return file.getvalue()


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG that is complete whenever it is there under its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encoded(figure))
