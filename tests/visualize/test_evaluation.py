# SPDX-License-Identifier: Apache-2.0
"""Pictures of an evaluation: what was computed stands in them."""

import numpy as np
import pytest

from detr_fast.visualize import confusion_figure, precision_recall_figure, size_figure
from tests.evaluation.scenes import result


def test_precision_over_recall_is_the_mean_of_the_classes():
    one = result()
    figure = precision_recall_figure({"a": one})
    for axes, ap in zip(figure.axes, (one.stats[1], one.stats[2], one.stats[0]), strict=True):
        *classes, mean = axes.lines
        assert len(classes) == 2  # cats and dogs; there is no bird
        assert np.allclose(mean.get_ydata(), np.mean([c.get_ydata() for c in classes], axis=0))
        assert np.mean(mean.get_ydata()) == pytest.approx(ap)
        [text] = axes.get_legend().get_texts()
        assert text.get_text().strip() == f"a: {ap:.3f}"


def test_several_runs_have_a_colour_and_no_curves_of_classes():
    figure = precision_recall_figure({"a": result(), "_b$": result({1: [], 2: [], 3: []})})
    for axes in figure.axes:
        assert len({line.get_color() for line in axes.lines}) == len(axes.lines) == 2
        assert axes.get_legend().get_texts()[1].get_text().strip() == r"_b\$: 0.000"


def test_bars_are_the_numbers_of_coco():
    both = {"a": result(), "b": result({1: [], 2: [], 3: []})}
    precision, recall = size_figure(both).axes
    for axes, places in ((precision, (0, 3, 4, 5)), (recall, (8, 9, 10, 11))):
        heights = [bar.get_height() for bar in axes.patches]
        wanted = [max(run.stats[place], 0) for run in both.values() for place in places]
        assert heights == pytest.approx(wanted)
        texts = [text.get_text() for text in axes.texts]
        assert texts.count("none") == 4  # no object is medium or large
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "all",
            "small",
            "medium",
            "large",
        ]


@pytest.mark.parametrize("count", [1, 30, 150])
def test_a_matrix_has_as_much_text_as_is_readable(count):
    matrix = np.zeros((count + 1, count + 1), dtype=np.int64)
    matrix[0] = 3
    matrix[0, 0] = 9
    names = [f"class {i}" for i in range(count)]
    figure = confusion_figure(matrix, names)
    axes = figure.axes[0]
    shares = axes.images[0].get_array()
    assert shares[0, 0] == pytest.approx(9 / (9 + 3 * count))
    assert not shares[1].any()
    assert (len(axes.texts) == 2) == (count == 1)
    named = [label.get_text().strip() for label in axes.get_yticklabels()]
    assert (named[: count + 1] == [*names, "(nothing)"]) == (count < 100)
    assert max(figure.get_size_inches() * figure.dpi) <= 1200


def test_wrong_calls_name_the_remedy():
    for draw in (precision_recall_figure, size_figure):
        with pytest.raises(ValueError, match="no run to draw: evaluate at least one"):
            draw({})
    with pytest.raises(ValueError, match=r"2 class names need a matrix of 3 x 3, found \(2, 2\)"):
        confusion_figure(np.zeros((2, 2)), ["a", "b"])
