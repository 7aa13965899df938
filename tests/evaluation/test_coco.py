# SPDX-License-Identifier: Apache-2.0
import json
import sys

import numpy as np
import pytest
import torch

from detr_fast.data.coco import DatasetError
from detr_fast.evaluation import CocoEvaluator, CocoResult

EVALUATORS = ("hotcoco", "pycocotools")


@pytest.fixture(params=EVALUATORS)
def evaluator(request):
    return request.param


def make_truth(boxes, *, classes=2, images=(1, 2), **keys):
    """A ground truth of (image id, label, x, y, w, h) rows on 640 x 480 images."""
    annotations = [
        {
            "id": i,
            "image_id": row[0],
            "category_id": row[1],
            "bbox": list(row[2:]),
            "area": row[4] * row[5],
            "iscrowd": 0,
        }
        | {key: values[i] for key, values in keys.items()}
        for i, row in enumerate(boxes)
    ]
    return {
        "images": [{"id": i, "width": 640, "height": 480} for i in images],
        "annotations": annotations,
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)],
    }


def make_prediction(rows, dtype=torch.float32):
    """Detections from (score, label, x0, y0, x1, y1) rows."""
    rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    return {
        "scores": rows[:, 0].to(dtype),
        "labels": rows[:, 1].long(),
        "boxes": rows[:, 2:].to(dtype),
    }


def evaluate(truth, predictions, evaluator):
    run = CocoEvaluator(truth, evaluator)
    run.update(predictions)
    return run.summarize()


def test_published_numbers(test_data, evaluator, capfd):
    folder = test_data / "evaluator"
    expected = json.loads((folder / "expected.json").read_text())
    rows = {
        image["id"]: [] for image in json.loads((folder / expected["gt"]).read_text())["images"]
    }
    for found in json.loads((folder / expected["dt"]).read_text()):
        x, y, w, h = found["bbox"]
        row = (found["score"], found["category_id"], x, y, x + w, y + h)
        rows[found["image_id"]].append(row)

    run = CocoEvaluator(folder / expected["gt"], evaluator)
    for image_id, some in rows.items():
        run.update({image_id: make_prediction(some, torch.float64)})
    result = run.summarize()
    np.testing.assert_allclose(result.stats, list(expected["stats"].values()), rtol=0, atol=1e-9)
    assert capfd.readouterr() == ("", "")  # neither evaluator talks


def test_table_to_the_byte():
    stats = [0.42, 0.6244, 0.4416, 0.205, 0.458, 0.61, 0.3331, 0.533, 0.574, -1.0, 0.628, 1.0]
    table = CocoResult(stats, {}, {}, np.zeros((0, 7))).table()
    assert table.splitlines() == [
        "IoU metric: bbox",
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.420",
        " Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.624",
        " Average Precision  (AP) @[ IoU=0.75      | area=   all | maxDets=100 ] = 0.442",
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area= small | maxDets=100 ] = 0.205",
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=medium | maxDets=100 ] = 0.458",
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area= large | maxDets=100 ] = 0.610",
        " Average Recall     (AR) @[ IoU=0.50:0.95 | area=   all | maxDets=  1 ] = 0.333",
        " Average Recall     (AR) @[ IoU=0.50:0.95 | area=   all | maxDets= 10 ] = 0.533",
        " Average Recall     (AR) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.574",
        " Average Recall     (AR) @[ IoU=0.50:0.95 | area= small | maxDets=100 ] = -1.000",
        " Average Recall     (AR) @[ IoU=0.50:0.95 | area=medium | maxDets=100 ] = 0.628",
        " Average Recall     (AR) @[ IoU=0.50:0.95 | area= large | maxDets=100 ] = 1.000",
    ]


def test_table_is_what_pycocotools_prints(capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = make_truth([(1, 1, 10, 10, 50, 50), (2, 2, 0, 0, 20, 20), (2, 2, 100, 0, 200, 99)])
    for number, annotation in enumerate(truth["annotations"], 1):
        annotation["id"] = number  # 0 would be taken for unmatched
    predictions = {
        1: make_prediction([(0.9, 1, 10, 10, 60, 60)]),
        2: make_prediction([(0.8, 2, 0, 0, 20, 18), (0.3, 2, 300, 0, 320, 20)]),
    }
    result = evaluate(truth, predictions, "pycocotools")

    ground_truth = COCO()
    ground_truth.dataset = truth
    ground_truth.createIndex()
    run = COCOeval(ground_truth, ground_truth.loadRes(result.detections), "bbox")
    run.evaluate()
    run.accumulate()
    capsys.readouterr()
    run.summarize()
    assert result.table() == "IoU metric: bbox\n" + capsys.readouterr().out.rstrip("\n")
    assert result.stats == run.stats.tolist()


def test_hand_computed_precision(evaluator):
    # class 1: two boxes; found are one exactly, then a false alarm, then the other at IoU 0.8
    truth = make_truth([(1, 1, 0, 0, 100, 100), (2, 1, 0, 0, 100, 100), (2, 2, 200, 0, 20, 20)])
    predictions = {
        1: make_prediction([(0.9, 1, 0, 0, 100, 100), (0.8, 1, 300, 300, 400, 400)]),
        2: make_prediction([(0.7, 1, 0, 0, 100, 80)]),
    }
    result = evaluate(truth, predictions, evaluator)
    found_both = (51 + 50 * 2 / 3) / 101  # 101 recall points: precision 1 up to 0.5, then 2 / 3
    found_one = 51 / 101
    of_class = (7 * found_both + 3 * found_one) / 10  # IoU 0.8 passes .50, .55, ... .80
    per_class = result.per_class()
    assert per_class["class 1"]["AP"] == pytest.approx(of_class)
    assert per_class["class 1"]["AP50"] == pytest.approx(found_both)
    assert per_class["class 2"] == {"AP": 0, "AP50": 0}
    assert result.stats[0] == pytest.approx(of_class / 2)
    assert result.stats[1] == pytest.approx(found_both / 2)
    assert result.stats[3] == 0  # small: the missed box alone
    assert result.stats[4] == -1  # no medium box
    assert result.stats[8] == pytest.approx((7 * 1 + 3 * 0.5) / 10 / 2)


def random_case(seed):
    """Overlapping boxes with crowds, equal scores, crowded and empty images, unlisted labels."""
    rng = np.random.default_rng(seed)
    truth_rows, crowds, predictions = [], [], {}
    for image_id in range(1, 13):
        count = 0 if image_id == 4 else int(rng.integers(1, 12))
        corners = rng.uniform(0, 350, (count, 2))
        extents = np.exp(rng.uniform(1.5, 5.5, (count, 2)))
        labels = rng.integers(1, 4, count)
        boxes = np.concatenate((corners, extents), axis=1)
        truth_rows += [
            (image_id, int(k), *map(float, b)) for k, b in zip(labels, boxes, strict=True)
        ]
        crowds += (rng.random(count) < 0.15).astype(int).tolist()

        queries = {5: 0, 6: 700}.get(image_id, 60)  # none at all; beyond 100 of one class
        if count:
            picked = rng.integers(0, count, queries)
            near, kinds = boxes[picked], labels[picked]
        else:
            near, kinds = rng.uniform(5, 300, (queries, 4)), np.ones(queries)
        near = near * rng.choice([1, 1, 1, 0.95, 1.1], (queries, 1))
        moved = near + rng.normal(0, 2, (queries, 4))
        moved[:, 2:] = moved[:, :2] + np.abs(moved[:, 2:])
        scores = np.round(rng.random(queries), 2)  # many ties, within and between images
        # 4 has no boxes, 5 is not listed
        kinds = np.where(rng.random(queries) < 0.8, kinds, rng.integers(1, 6, queries))
        predictions[image_id] = make_prediction(np.column_stack((scores, kinds, moved)))
    areas = [row[4] * row[5] * rng.uniform(0.3, 1) for row in truth_rows]
    truth = make_truth(truth_rows, classes=4, images=range(1, 13), iscrowd=crowds, area=areas)
    return truth, predictions


SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 100))]


@pytest.mark.parametrize("seed", SEEDS)
def test_evaluators_agree(seed):
    truth, predictions = random_case(seed)
    fast, referee = (evaluate(truth, predictions, name) for name in EVALUATORS)
    assert 0.02 < referee.stats[0] < 0.98
    np.testing.assert_allclose(fast.stats, referee.stats, rtol=0, atol=1e-12)
    for key in ("precision", "recall", "scores"):
        torch.testing.assert_close(fast.eval[key], referee.eval[key], rtol=0, atol=1e-12)
    assert fast.eval["counts"] == referee.eval["counts"] == [10, 101, 4, 4, 3]
    assert fast.eval["params"] == referee.eval["params"]
    wanted = referee.per_class()
    assert fast.per_class() == {name: pytest.approx(of_class) for name, of_class in wanted.items()}
    assert fast.detections == referee.detections


def test_order_and_grouping_of_updates_do_not_matter(evaluator):
    truth, predictions = random_case(9)
    at_once = evaluate(truth, predictions, evaluator)
    run = CocoEvaluator(truth, evaluator)
    for image_id in reversed(predictions):
        run.update({image_id: predictions[image_id]})
    assert run.summarize().stats == at_once.stats


def test_only_images_that_were_seen_count(evaluator):
    truth = make_truth([(1, 1, 0, 0, 50, 50), (2, 1, 0, 0, 50, 50)])
    found = make_prediction([(0.5, 1, 0, 0, 50, 50)])
    assert evaluate(truth, {1: found}, evaluator).stats[0] == pytest.approx(1)
    assert evaluate(truth, {1: found, 2: make_prediction([])}, evaluator).stats[0] < 0.6
    assert evaluate(truth, {1: found}, evaluator).eval["params"]["imgIds"] == [1]


def test_hundred_detections_of_a_class_count(evaluator):
    truth = make_truth([(1, 1, 0, 0, 50, 50)])
    false_alarms = [(0.9, 1, 300, 300, 400, 400)] * 99
    right = (0.1, 1, 0, 0, 50, 50)
    of_other_class = [(0.8, 2, 0, 0, 50, 50)] * 20
    within = evaluate(
        truth, {1: make_prediction([*false_alarms, right, *of_other_class])}, evaluator
    )
    assert within.stats[0] == pytest.approx(1 / 100)
    beyond = make_prediction([*false_alarms, (0.2, 1, 300, 300, 400, 400), right])
    assert evaluate(truth, {1: beyond}, evaluator).stats[0] == 0


def test_nothing_found(evaluator):
    truth = make_truth([(1, 1, 0, 0, 50, 50)])
    result = evaluate(truth, {1: make_prediction([]), 2: make_prediction([])}, evaluator)
    assert result.stats == [0, 0, 0, -1, 0, -1, 0, 0, 0, -1, 0, -1]
    assert result.detections == []
    assert result.per_class() == {
        "class 1": {"AP": 0, "AP50": 0},
        "class 2": {"AP": -1, "AP50": -1},
    }
    assert result.table().count("= -1.000") == 4


def test_nothing_to_find(evaluator):
    found = make_prediction([(0.5, 1, 0, 0, 50, 50)])
    result = evaluate(make_truth([]), {1: found}, evaluator)
    assert result.stats == [-1] * 12


def test_labels_that_are_not_listed_do_not_count(evaluator, capfd):
    truth = make_truth([(1, 1, 0, 0, 50, 50)])
    found = make_prediction([(0.9, 77, 0, 0, 50, 50), (0.5, 1, 0, 0, 50, 50)])
    result = evaluate(truth, {1: found}, evaluator)
    assert result.stats[0] == pytest.approx(1)
    assert [row["category_id"] for row in result.detections] == [77, 1]
    only_unlisted = make_prediction([(0.9, 77, 0, 0, 50, 50)])
    assert evaluate(truth, {1: only_unlisted}, evaluator).stats[0] == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_types(evaluator, dtype):
    truth = make_truth([(1, 1, 0.25, 8, 1000, 32)])
    found = make_prediction([(0.7, 1, 0.25, 8, 1001, 40)], dtype)
    result = evaluate(truth, {1: found}, evaluator)
    assert result.stats[0] == pytest.approx(1)
    x0, y0, x1, y1 = found["boxes"][0].tolist()
    box = [x0, y0, x1 - x0, y1 - y0]  # 1000.75 has no float16: the difference is taken in float32
    score = found["scores"].item()
    assert result.detections == [{"image_id": 1, "category_id": 1, "bbox": box, "score": score}]


def test_annotation_ids_may_be_missing_equal_or_zero(evaluator):
    boxes = [(1, 1, 0, 0, 50, 50), (1, 1, 100, 0, 50, 50)]
    found = make_prediction([(0.9, 1, 0, 0, 50, 50), (0.8, 1, 100, 0, 150, 50)])
    for ids in ([0, 1], [5, 5]):
        truth = make_truth(boxes, id=ids)
        assert evaluate(truth, {1: found}, evaluator).stats[0] == pytest.approx(1)
    for annotation in truth["annotations"]:
        del annotation["id"]
    assert evaluate(truth, {1: found}, evaluator).stats[0] == pytest.approx(1)


def test_classes_of_one_name_are_told_apart():
    truth = make_truth([(1, 1, 0, 0, 50, 50)], classes=3)
    truth["categories"][1]["name"] = truth["categories"][2]["name"] = "class"
    result = evaluate(truth, {1: make_prediction([])}, "hotcoco")
    assert list(result.per_class()) == ["class 1", "class (2)", "class (3)"]


def test_eval_survives_a_safe_load(tmp_path, evaluator):
    result = evaluate(*random_case(3), evaluator)
    torch.save(result.eval, tmp_path / "eval.pth")
    loaded = torch.load(tmp_path / "eval.pth", weights_only=True)
    assert loaded["precision"].shape == (10, 101, 4, 4, 3)
    assert loaded["recall"].shape == (10, 4, 4, 3)
    assert torch.equal(loaded["scores"], result.eval["scores"])
    # as plot_precision_recall of the original reads it
    assert loaded["params"].recThrs == pytest.approx(np.linspace(0, 1, 101).tolist())
    assert loaded["params"].iouThrs == loaded["params"]["iouThrs"]
    precision = loaded["precision"][0, :, :, 0, -1].mean(1)
    assert len(precision) == len(loaded["params"].recThrs)
    assert f"{precision.mean() * 100: 05.1f}".strip()
    json.dumps(loaded["params"])


def test_detections_are_what_pycocotools_reads(tmp_path):
    truth, predictions = random_case(2)
    result = evaluate(truth, predictions, "hotcoco")
    rows = json.loads(json.dumps(result.detections))
    image_id = 7
    boxes = predictions[image_id]["boxes"]
    extents = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)
    of_image = [row for row in rows if row["image_id"] == image_id]
    assert [row["bbox"] for row in of_image] == extents.tolist()
    assert [row["score"] for row in of_image] == predictions[image_id]["scores"].tolist()
    assert [row["category_id"] for row in of_image] == predictions[image_id]["labels"].tolist()
    assert len(rows) == sum(len(found["scores"]) for found in predictions.values())


def test_updates_read_no_values(evaluator):
    # a tensor on "meta" has none: whatever would wait for the device raises here
    found = {
        key: value.to("meta") for key, value in make_prediction([(0.5, 1, 0, 0, 9, 9)]).items()
    }
    CocoEvaluator(make_truth([]), evaluator).update({1: found, 2: found})


def test_refused_updates_leave_the_evaluator_as_it_was(evaluator):
    truth = make_truth([(1, 1, 0, 0, 50, 50)])
    found = make_prediction([(0.5, 1, 0, 0, 50, 50)])
    run = CocoEvaluator(truth, evaluator)
    run.update({1: found})
    with pytest.raises(
        ValueError, match=r"image ids \[98, 99\] \(2 in all\) are not in the ground"
    ):
        run.update({2: found, 99: found, 98: found})
    with pytest.raises(ValueError, match=r"image ids \[1\] \(1 in all\) were added before"):
        run.update({2: found, 1: found})
    with pytest.raises(
        ValueError, match=r"image id 2: boxes \(1, 4\), scores \(1,\) and labels \(0,\)"
    ):
        run.update({2: found | {"labels": torch.zeros(0, dtype=torch.int64)}})
    with pytest.raises(ValueError, match=r"image id 2: boxes \(4,\)"):
        run.update({2: found | {"boxes": torch.zeros(4)}})
    result = run.summarize()
    assert result.stats[0] == pytest.approx(1)
    assert result.eval["params"]["imgIds"] == [1]


def test_values_that_are_not_finite_are_named(evaluator):
    run = CocoEvaluator(make_truth([]), evaluator)
    run.update({1: make_prediction([(0.5, 1, 0, 0, 9, 9)])})
    run.update({2: make_prediction([(0.5, 1, 0, 0, 9, 9), (float("nan"), 1, 0, 0, 9, 9)])})
    with pytest.raises(ValueError, match=r"1 detections .* not finite, first in image id 2"):
        run.summarize()


def test_summary_of_nothing(evaluator):
    run = CocoEvaluator(make_truth([]), evaluator)
    run.update({})
    with pytest.raises(ValueError, match="no image was handed"):
        run.summarize()


def test_bad_arguments(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="evaluator 'coco': choose hotcoco or pycocotools"):
        CocoEvaluator(make_truth([]), "coco")
    with pytest.raises(DatasetError, match=r"gone\.json: cannot be read"):
        CocoEvaluator(tmp_path / "gone.json")
    with pytest.raises(DatasetError, match="ground truth: no list 'images'"):
        CocoEvaluator({})
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(
        ImportError, match=r'no evaluator hotcoco: pip install "detr-fast\[train\]"'
    ):
        CocoEvaluator(make_truth([]))


@pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
def test_labels_are_mapped_to_category_ids(evaluator):
    """Ids that float32 cannot hold; detections of a label without category count for nothing."""
    large = 123_456_789
    truth = {
        "images": [{"id": 4, "file_name": "a.png", "width": 50, "height": 50}],
        "categories": [{"id": 7, "name": "cat"}, {"id": large, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": large, "bbox": [1, 2, 10, 10], "area": 100},
            {"id": 2, "image_id": 4, "category_id": 7, "bbox": [20, 20, 10, 10], "area": 100},
        ],
    }
    scores = CocoEvaluator(truth, evaluator, category_ids={0: 7, 2: large})
    boxes = torch.tensor([[1.0, 2, 11, 12], [20, 20, 30, 30], [1, 2, 11, 12]])
    labels = torch.tensor([2, 0, 1])
    scores.update({4: {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 1.0]), "labels": labels}})
    result = scores.summarize()
    assert result.stats[0] == pytest.approx(1)
    assert [d["category_id"] for d in result.detections] == [large, 7]
