# SPDX-License-Identifier: Apache-2.0
"""Errors that were counted by hand."""

import pytest
import torch

from detr_fast.evaluation import CocoEvaluator, find_errors, operating_points
from tests.evaluation.scenes import FOUND, box, result, truth


def test_errors_of_three_images():
    errors = find_errors(truth(), result(), 0.5)
    assert errors.category_ids == [3, 7, 9]
    assert errors.confusion.tolist() == [
        [1, 0, 0, 1],  # cats: one found, one missed
        [1, 1, 0, 0],  # dogs: one taken for a cat, one found
        [0, 0, 0, 0],  # there is no bird
        [0, 2, 1, 0],  # of nothing: the dog whose box was taken, the one in the crowd; a bird
    ]
    assert errors.most_confused(5) == [(7, 3, 1)]
    # by class, as in AP: image 1 has both right and a false cat, image 3 is without an error
    assert errors.images == [(2, 0, 1, 1), (1, 2, 1, 0)]
    [bird] = errors.doubts
    assert bird == (2, "<b>bird</b>", pytest.approx(0.55), None)
    assert errors.counts["Cls"] == 1
    assert errors.counts["Bkg"] == 1
    assert errors.counts["Miss"] == 0  # at any score: the cat of image 2 counts as found


def test_the_threshold_decides_what_is_counted():
    low, high = (find_errors(truth(), result(), threshold) for threshold in (0.0, 0.99))
    assert low.confusion[0, 0] == 2
    assert high.confusion[:, :3].sum() == 0
    assert high.confusion[:, 3].tolist() == [2, 2, 0, 0]
    assert sorted(image.missed for image in high.images) == [1, 1, 2]
    assert low.counts == high.counts


def test_doubts_start_with_the_most_confident():
    found = {1: [(50, 3, 0.8), (0, 3, 0.4)], 2: FOUND[2], 3: [(0, 9, 0.95)]}
    doubts = [(d.image_id, d.annotated) for d in find_errors(truth(), result(found), 0.5).doubts]
    assert doubts == [(3, "dog"), (1, "dog"), (2, None)]


def test_of_images_that_were_not_evaluated_nothing_counts():
    errors = find_errors(truth(), result({3: FOUND[3]}), 0.5)
    assert errors.confusion.sum() == 1
    assert errors.images == []


def test_nothing_detected_is_missed():
    errors = find_errors(truth(), result({1: [], 2: [], 3: []}), 0.5)
    assert errors.confusion[:, 3].tolist() == [2, 2, 0, 0]
    assert errors.doubts == []
    assert operating_points(result({1: [], 2: [], 3: []})) == {}


def test_operating_points_are_those_of_the_best_f1():
    points = operating_points(result())
    assert set(points) == {3, 7}  # birds have no ground truth
    # cats: at 0.9 one of two, precision 1; at 0.2 two of two, precision 2/4
    assert points[3].threshold == pytest.approx(0.9) or points[3].recall == 1
    assert points[3].f1 == pytest.approx(2 / 3, abs=0.01)
    # dogs: 0.95 right, 0.7 in the crowd, 0.6 right
    assert points[7].threshold == pytest.approx(0.6)
    assert points[7].precision == pytest.approx(1)
    assert points[7].recall == pytest.approx(1)


def test_operating_points_of_every_threshold_one_by_one():
    """Against a search through all thresholds, with random detections of one class."""
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(100, generator=generator) < torch.linspace(0.95, 0.05, 100)
    total = int(right.sum()) + 30  # some are never found
    corners = torch.where(right, 30 * (right.cumsum(0) - 1), 30 * total + 50)
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 9999, "width": 9999}],
        "annotations": [box(1 + i, 1, 1, 30 * i) for i in range(total)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    scores = torch.linspace(0.99, 0.01, 100)
    boxes = corners[:, None] + torch.tensor([0, 0, 20, 20])
    order = torch.randperm(100, generator=generator)
    evaluator = CocoEvaluator(content)
    labels = torch.ones(100, dtype=torch.int64)
    evaluator.update({1: {"boxes": boxes[order], "labels": labels, "scores": scores[order]}})
    f1 = 2 * right.cumsum(0) / (torch.arange(1, 101) + total)
    point = operating_points(evaluator.summarize())[1]
    assert point.f1 == pytest.approx(f1.max().item(), abs=0.01)
    assert point.threshold == pytest.approx(scores[f1.argmax()].item(), abs=0.05)
