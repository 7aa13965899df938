# SPDX-License-Identifier: Apache-2.0
"""Training curves: the points of log.txt stand in the picture."""

import json
import math
import sys

import pytest
from PIL import Image

from detr_fast.visualize import plot_training_curves, training_curves_figure


def records(count, every=1, best=7):
    """A log of `count` epochs that evaluates every few of them."""
    log = []
    for epoch in range(count):
        log.append(
            {"epoch": epoch, "train_lr": 1e-4 if epoch < 10 else 1e-5}
            | {f"{part}_loss": 30 / (1 + epoch) + i for i, part in enumerate(("train", "test"))}
            | {"train_class_error": 90 - epoch / 4, "test_class_error": 95 - epoch / 4}
        )
        if epoch % every == 0:
            stats = [-1.0] * 12
            stats[:2] = [0.4 - 0.001 * abs(epoch - best), 0.6]
            log[-1]["test_coco_eval_bbox"] = stats
    return log


def points(panel):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in panel.lines}


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("count", [1, 20, 300])
def test_the_figure_has_the_points_of_the_log(count):
    log = records(count)
    figure = training_curves_figure({"baseline": log})
    loss, error, precision, rate = figure.axes
    epochs = range(count)
    assert points(loss) == {
        "training": [(e, log[e]["train_loss"]) for e in epochs],
        "validation": [(e, log[e]["test_loss"]) for e in epochs],
    }
    assert points(error) == {
        "training": [(e, 90 - e / 4) for e in epochs],
        "validation": [(e, 95 - e / 4) for e in epochs],
    }
    drawn = points(precision)
    assert drawn["AP (IoU 0.50:0.95)"] == [(e, 0.4 - 0.001 * abs(e - 7)) for e in epochs]
    assert drawn["AP50 (IoU 0.50)"] == [(e, 0.6) for e in epochs]
    assert points(rate) == {"learning rate": [(e, 1e-4 if e < 10 else 1e-5) for e in epochs]}
    best = (0, "0.393") if count == 1 else (7, "0.400")
    assert figure.get_suptitle().strip() == f"baseline: best AP {best[1]} in epoch {best[0]}"
    for panel in figure.axes:
        left, right = panel.get_xlim()
        assert left < 0
        assert right > count - 1
        assert {line.get_marker() for line in panel.lines} == {"" if count == 300 else "o"}
        for line in panel.lines:
            bottom, top = panel.get_ylim()
            assert all(bottom <= y <= top for y in line.get_ydata())


def test_epochs_without_a_number_leave_the_line_whole():
    log = records(9, every=4)
    log[3]["train_loss"] = None  # log.txt writes NaN so
    log[4]["train_loss"] = math.nan
    log[4]["test_coco_eval_bbox"] = [-1.0] * 12  # no annotated box: COCO says -1
    loss, _, precision, _ = training_curves_figure({"baseline": log}).axes
    assert [epoch for epoch, _ in points(loss)["training"]] == [0, 1, 2, 5, 6, 7, 8]
    assert [epoch for epoch, _ in points(precision)["AP50 (IoU 0.50)"]] == [0, 8]


def test_a_log_that_repeats_an_epoch_shows_the_last_one():
    log = [{"epoch": e, "train_loss": float(i)} for i, e in enumerate((0, 1, 2, 1, 2))]
    figure = training_curves_figure({"resumed": log})
    assert points(figure.axes[0]) == {"training": [(0, 0.0), (1, 3.0), (2, 4.0)]}
    assert [t.get_text() for t in figure.axes[2].texts] == ["not logged"]


def test_several_runs_differ_in_colour_and_have_a_legend():
    runs = {"_a$b$": records(30), "b" * 60: records(12), "no evaluation": records(5)}
    for record in runs["no evaluation"]:
        del record["test_coco_eval_bbox"]
    figure = training_curves_figure(runs)
    lines = figure.axes[0].lines
    colors = [line.get_color() for line in lines]
    assert colors[::2] == colors[1::2]
    assert len(set(colors)) == 3
    assert [line.get_linestyle() for line in lines] == ["-", "--"] * 3
    (legend,) = figure.legends
    assert [line.get_color() for line in legend.get_lines()] == colors[::2]
    shown = [text.strip() for text in texts(legend)]
    assert shown[0] == r"_a\$b\$: best AP 0.400 in epoch 7"
    assert shown[1].startswith("\N{HORIZONTAL ELLIPSIS}bbb")
    assert shown[2] == "no evaluation"
    assert texts(figure.axes[0].get_legend()) == ["training", "validation"]


def test_png_of_one_and_of_several_logs(tmp_path):
    for name, count in (("first", 3), ("second", 30)):
        (tmp_path / name).mkdir()
        lines = [json.dumps(record) for record in records(count)]
        (tmp_path / name / "log.txt").write_text("\n".join(lines) + "\n")
    logs = [tmp_path / name / "log.txt" for name in ("first", "second")]
    one, both = tmp_path / "new" / "one.png", tmp_path / "both.png"
    plot_training_curves(str(logs[0]), one)
    plot_training_curves(logs, both)
    for path in (one, both):
        with Image.open(path) as picture:
            assert picture.size == (1200, 760)
        assert path.stat().st_size < 300_000
    assert one.read_bytes() != both.read_bytes()
    assert [path.name for path in one.parent.iterdir()] == ["one.png"]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no run to draw"):
        training_curves_figure({})
    with pytest.raises(ValueError, match="log of baseline has no epoch"):
        training_curves_figure({"baseline": [{"note": "x"}]})


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"detr-fast\[train\]"):
        training_curves_figure({"baseline": records(1)})
