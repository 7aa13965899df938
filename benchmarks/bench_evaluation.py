# SPDX-License-Identifier: Apache-2.0
"""COCO AP: the evaluator of this package by hotcoco, its default, against pycocotools.

Timed is all that an evaluation adds to the forward passes: ground truth read from a COCO dict,
detections handed over in batches of 16 images, the 12 numbers.  Numbers of boxes, sizes and classes
are drawn after COCO's statistics: 7 boxes an image on average, 80 classes, 1 % crowds; 100
detections an image, of which some hit.  The
time is that of the processor, of all threads of a library together.
"""

import functools
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Case, Contender, Missing, Setup, on_cpu, optional, within
from detr_fast.evaluation.coco import CocoEvaluator

WIDTH, HEIGHT, CLASSES, DETECTIONS, BATCH = 640, 480, 80, 100, 16
FLOORS = {"pycocotools": 20.0}
SMALL = 60


def cases(device: torch.device, quick: bool) -> list[Case]:
    """One case, whatever the device: the evaluation runs on the host."""
    images = SMALL if quick else 5000
    return [
        Case(
            f"COCO AP, {images} images x {DETECTIONS} detections",
            functools.partial(evaluation, images),
            small=functools.partial(evaluation, SMALL),
            check=within(atol=1e-9),
            floors=on_cpu(device, FLOORS),
            images=images,
            in_graph=False,
        )
    ]


def test_evaluation(case, bench):
    bench(case)


def evaluation(images: int) -> Setup:
    """The 12 numbers of COCO."""
    truth, detections = generated(images)
    ids = list(detections)
    batches = [
        {image: detections[image] for image in ids[first : first + BATCH]}
        for first in range(0, len(ids), BATCH)
    ]

    def run(evaluator: str) -> Any:
        scores = CocoEvaluator(truth, evaluator)
        for batch in batches:
            scores.update(batch)
        return torch.tensor(scores.summarize().stats, dtype=torch.float64)

    def contender(name: str) -> Contender | Missing:
        missing = optional(name)
        return missing if isinstance(missing, Missing) else Contender(lambda: run(name))

    contenders = {name: contender(name) for name in ("hotcoco", "pycocotools")}
    return Setup(lambda: run("pycocotools"), contenders)


def generated(images: int) -> tuple[dict[str, Any], dict[int, dict[str, torch.Tensor]]]:
    """A ground truth, and detections by image id."""
    random = np.random.default_rng(0)
    frame = np.array([WIDTH, HEIGHT])
    annotations: list[dict[str, Any]] = []
    detections = {}
    for image in range(1, images + 1):
        count = min(random.geometric(1 / 7), 60)
        extent = np.exp(random.normal(np.log(70), 0.9, (count, 2))).clip(4, frame - 40)
        corner = random.random((count, 2)) * (frame - extent)
        labels = random.integers(1, CLASSES + 1, count)
        crowds = random.random(count) < 0.01
        annotations += [
            {
                "id": len(annotations) + number,
                "image_id": image,
                "category_id": int(label),
                "bbox": [*xy.tolist(), *wh.tolist()],
                "area": float(0.6 * wh.prod()),
                "iscrowd": int(crowd),
            }
            for number, (xy, wh, label, crowd) in enumerate(
                zip(corner, extent, labels, crowds, strict=True), 1
            )
        ]
        detections[image] = _found(random, np.hstack([corner, corner + extent]), labels)
    names = [{"id": label, "name": f"class {label}"} for label in range(1, CLASSES + 1)]
    table = [
        {"id": image, "width": WIDTH, "height": HEIGHT, "file_name": f"{image}.jpg"}
        for image in detections
    ]
    return {"images": table, "annotations": annotations, "categories": names}, detections


def _found(
    random: np.random.Generator, boxes: np.ndarray, labels: np.ndarray
) -> dict[str, torch.Tensor]:
    """Detections of one image: each box once, a little off, its class mostly right; then noise."""
    count = len(boxes)
    found = random.random((DETECTIONS, 4)) * [WIDTH / 2, HEIGHT / 2, WIDTH / 2, HEIGHT / 2]
    found[:, 2:] += found[:, :2]
    extent = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    found[:count] = boxes + 0.08 * extent * random.normal(size=(count, 4))
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    classes = random.integers(1, CLASSES + 1, DETECTIONS)
    right = random.random(count) < 0.8
    classes[:count] = np.where(right, labels, classes[:count])
    scores = 0.5 * random.random(DETECTIONS)
    scores[:count] += 0.5 * random.random(count)
    return {
        "boxes": torch.from_numpy(found).float(),
        "scores": torch.from_numpy(scores).float(),
        "labels": torch.from_numpy(classes),
    }
