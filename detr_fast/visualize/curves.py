# SPDX-License-Identifier: Apache-2.0
"""Training curves, drawn from ``log.txt``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detr_fast.engine.log import read_log
from detr_fast.visualize.canvas import (
    INK,
    PALE,
    WIDTH,
    blank_figure,
    panel,
    readable,
    run_color,
    run_names,
    save_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    figure = blank_figure(WIDTH, 760)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    several, best = len(runs) > 1, {}
    panels = [
        panel(figure, (2, 2, i), title, "epoch", unit)
        for i, (title, unit) in enumerate(_PANELS, start=1)
    ]
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for index, (name, records) in enumerate(runs.items()):
        by_epoch = {int(record["epoch"]): record for record in records if "epoch" in record}
        if not by_epoch:
            raise ValueError(f"the log of {name} has no epoch: train one first")
        for number, row, key, place, label in _SERIES:
            points = [
                (epoch, y)
                for epoch, record in sorted(by_epoch.items())
                if math.isfinite(y := _number(record, key, place))
            ]
            if not points:
                continue
            if key == "test_coco_eval_bbox" and not row:
                best[name] = max(points, key=lambda point: point[1])
            panels[number].plot(
                *zip(*points, strict=True),
                color=run_color(index if several else row),
                linestyle=("-", "--")[row],
                markersize=4,
                linewidth=1.8,
                label=label,
            )
    _explain(figure, panels, list(runs), best)
    return figure


_PANELS = (  # title, unit
    ("Loss", "weighted sum of its terms"),
    ("Class error of the matched queries", "%"),
    ("Average precision (validation)", "AP"),
    ("Learning rate (all but the backbone)", ""),
)
_SERIES = (  # panel, row (colour or dash), key and place in log.txt, label
    (0, 0, "train_loss", None, "training"),
    (0, 1, "test_loss", None, "validation"),
    (1, 0, "train_class_error", None, "training"),
    (1, 1, "test_class_error", None, "validation"),
    (2, 0, "test_coco_eval_bbox", 0, "AP (IoU 0.50:0.95)"),
    (2, 1, "test_coco_eval_bbox", 1, "AP50 (IoU 0.50)"),
    (3, 0, "train_lr", None, "learning rate"),
)


def _number(record: Mapping[str, Any], key: str, place: int | None) -> float:
    """The number under `key`, NaN where the epoch has none (COCO writes -1 for that)."""
    value = record.get(key)
    if place is not None and value is not None:
        value = math.nan if value[place] is None or value[place] < 0 else value[place]
    return math.nan if value is None else float(value)


def _explain(
    figure: Figure, panels: list[Axes], names: list[str], best: dict[str, tuple[int, float]]
) -> None:
    """Scale the axes and say what the lines are."""
    from matplotlib.lines import Line2D

    lines = [line for axes in panels for line in axes.lines]
    epochs = [epoch for line in lines for epoch in line.get_xdata()] or [0]
    pad = max(0.5, 0.03 * (max(epochs) - min(epochs)))
    sparse = all(len(line.get_xdata()) <= 25 for line in lines)
    for line in lines:
        line.set_marker("o" if sparse else "")
    for axes in panels:
        axes.set_xlim(min(epochs) - pad, max(epochs) + pad)
        if not axes.lines:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=PALE)
            continue
        if axes is panels[-1]:
            _scale_rates(axes)
            continue
        heights = [y for line in axes.lines for y in line.get_ydata()]
        axes.set_ylim(min(0, *heights), max(*heights, 1e-3) * 1.08)
        series = {line.get_label(): line for line in axes.lines}
        if len(names) > 1:
            series = {
                label: Line2D([], [], color=INK, linestyle=line.get_linestyle())
                for label, line in series.items()
            }
        axes.legend(series.values(), series.keys(), framealpha=0.85, fontsize=9)
    titles = [_title(name, best.get(name)) for name in names]
    if len(names) > 1:
        samples = [Line2D([], [], color=run_color(i)) for i in range(len(names))]
        figure.legend(
            samples, titles, loc="outside upper left", ncols=2, frameon=False, fontsize=10
        )
    else:
        figure.suptitle(titles[0], x=0.01, ha="left", fontsize=13, color=INK)


def _scale_rates(axes: Axes) -> None:
    """A logarithmic axis with the ticks 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rates = [y for line in axes.lines for y in line.get_ydata() if y > 0] or [1.0]
    axes.set_yscale("log")
    axes.set_ylim(min(rates) / 2, max(rates) * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _title(name: str, best: tuple[int, float] | None) -> str:
    """The name of a run and its best AP."""
    title = readable(name)
    return title if best is None else f"{title}: best AP {best[1]:.3f} in epoch {best[0]}"


def plot_training_curves(
    log_files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_png: str | os.PathLike[str],
) -> None:
    """Draw the curves of one ``log.txt``, or of several in one picture, to a PNG.

    A run is named after the folder of its log. See `training_curves_figure`.
    """
    files = [log_files] if isinstance(log_files, (str, os.PathLike)) else log_files
    paths = [Path(file).resolve() for file in files]
    names = run_names([p.parent if p.name == "log.txt" else p for p in paths])
    figure = training_curves_figure(
        {name: read_log(path) for name, path in zip(names, paths, strict=True)}
    )
    save_png(figure, output_png)
