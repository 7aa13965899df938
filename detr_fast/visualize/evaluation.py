# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found as pictures: precision over recall, AP by size, confused classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from detr_fast.evaluation.coco import SUMMARY, CocoResult
from detr_fast.visualize.canvas import INK, PALE, WIDTH, blank_figure, panel, readable, run_color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED, COUNTED = 100, 20  # classes up to which a matrix has names, and a number in each cell


def precision_recall_figure(results: Mapping[str, CocoResult]) -> Figure:
    """Precision over recall, mean of the classes, at an IoU of 0.50, 0.75, and over 0.50:0.95.

    Of a single run the curve of each class is drawn, too, in grey.

    Args:
        results (dict): name of each run -> its evaluation.

    Returns:
        Figure: 1200 x 420 pixels, one axes for each IoU.

    Raises:
        ValueError: there is no run.
    """
    if not results:
        raise ValueError("no run to draw: evaluate at least one")
    figure = blank_figure(WIDTH, 420)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    panels = (("IoU 0.50", slice(0, 1)), ("IoU 0.75", slice(5, 6)), ("IoU 0.50:0.95", slice(None)))
    for number, (title, thresholds) in enumerate(panels, start=1):
        axes = panel(figure, (1, 3, number), title, "recall", "precision")
        for index, (name, result) in enumerate(results.items()):
            recalls = result.eval["params"]["recThrs"]
            # (thresholds, recalls, classes), -1 where a class has no ground truth
            precision = result.eval["precision"][thresholds, :, :, 0, -1].numpy()
            precision = precision.mean(0)[:, (precision > -1).all((0, 1))]
            if not precision.size:
                continue
            if len(results) == 1:
                axes.plot(recalls, precision, color=PALE, linewidth=0.7, alpha=0.5)
            mean = precision.mean(1)
            label = f"{readable(name)}: {mean.mean():.3f}"
            axes.plot(recalls, mean, color=run_color(index), linewidth=2, label=label)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(framealpha=0.85, fontsize=9, title="AP")
        else:
            axes.text(0.5, 0.5, "nothing annotated", ha="center", color=PALE)
    return figure


def size_figure(results: Mapping[str, CocoResult]) -> Figure:
    """AP and AR (100 detections) by the size of objects.

    Args:
        results (dict): name of each run -> its evaluation.

    Returns:
        Figure: 1200 x 380 pixels, axes for AP and AR, a bar for each run and size.

    Raises:
        ValueError: there is no run.
    """
    if not results:
        raise ValueError("no run to draw: evaluate at least one")
    figure = blank_figure(WIDTH, 380)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    width = 0.8 / len(results)
    for number, (kind, title) in enumerate(
        (("AP", "Average precision by size"), ("AR", "Average recall by size")), start=1
    ):
        places = {
            area: i
            for i, (what, iou, area, limit) in enumerate(SUMMARY)
            if (what, iou, limit) == (kind, "0.50:0.95", 100)
        }
        axes = panel(figure, (1, 2, number), title, "", f"{kind} (IoU 0.50:0.95)")
        axes.grid(visible=False, axis="x")
        for index, (name, result) in enumerate(results.items()):
            heights = [result.stats[place] for place in places.values()]
            left = np.arange(len(places)) - 0.4 + (index + 0.5) * width
            bars = axes.bar(
                left,
                np.maximum(heights, 0),
                width * 0.94,
                color=run_color(index),
                label=readable(name),
            )
            texts = ["none" if height < 0 else f"{height:.3f}" for height in heights]
            axes.bar_label(bars, texts, fontsize=8, padding=2, color=INK)
        axes.set_xticks(range(len(places)), list(places))
        axes.set_ylim(0, 1.05)
        if number == 1:
            axes.legend(framealpha=0.85, fontsize=9)
    return figure


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Which class was taken for which.

    Args:
        confusion (int64[K + 1, K + 1]): as in `detr_fast.evaluation.Errors`.
        class_names (list[str]): of the K classes.

    Returns:
        Figure: rows are annotated, columns detected classes; the colour is the share of the row.

    Raises:
        ValueError: the matrix has another shape.
    """
    count = len(class_names) + 1
    if confusion.shape != (count, count):
        raise ValueError(
            f"{count - 1} class names need a matrix of {count} x {count}, found {confusion.shape}"
        )
    side = int(np.clip(300 + 60 * count, 560, WIDTH))
    figure = blank_figure(side, side - 40)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    totals = confusion.sum(1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, shrink=0.6, label="share of the annotated class")
    size = float(np.clip(480 / count, 5, 11))
    if count <= NAMED:
        names = [readable(name, 24) for name in class_names]
        axes.set_xticks(range(count), [*names, "(missed)"], rotation=90, fontsize=size)
        axes.set_yticks(range(count), [*names, "(nothing)"], fontsize=size)
    if count <= COUNTED:
        for i, j in np.ndindex(count, count):
            if confusion[i, j]:
                color = "white" if shares[i, j] > 0.5 else INK
                axes.text(j, i, str(confusion[i, j]), ha="center", va="center", color=color)
    axes.set_xlabel("detected")
    axes.set_ylabel("annotated")
    return figure
