# SPDX-License-Identifier: Apache-2.0
"""The worst images of an evaluation, drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.engine.output import annotated_pictures
from detr_fast.evaluation.analysis import ImageErrors
from detr_fast.evaluation.coco import CocoResult
from detr_fast.visualize import detections_figure
from detr_fast.visualize.canvas import encoded


def worst_pictures(
    dataset: Dataset, result: CocoResult, images: Sequence[ImageErrors], threshold: float
) -> list[bytes]:
    """JPEG files of images with what is annotated and what was detected.

    Args:
        dataset (Dataset): the evaluated one.
        result (CocoResult): its evaluation.
        images (list[ImageErrors]): what to draw.
        threshold (float): the least score to draw.
    """
    labels = {category: label for label, category in dataset.category_ids.items()}
    ids = [image.image_id for image in images]
    files = []
    for image_id, picture, target in zip(ids, *annotated_pictures(dataset, ids), strict=True):
        figure = detections_figure(
            [picture],
            [_detections(result, image_id, labels)],
            dataset.class_names,
            targets=[target],
            threshold=threshold,
            columns=1,
            titled=False,
        )
        files.append(encoded(figure, "JPEG"))
    return files


def _detections(result: CocoResult, image_id: int, labels: dict[int, int]) -> dict[str, Tensor]:
    """The detections of an image, as the model makes them."""
    rows = torch.from_numpy(result.rows[result.rows[:, 0] == image_id])
    boxes = rows[:, 1:5].clone()
    boxes[:, 2:] += boxes[:, :2]
    found = torch.tensor([labels[int(category)] for category in rows[:, 6]], dtype=torch.int64)
    return {"boxes": boxes, "scores": rows[:, 5], "labels": found}
