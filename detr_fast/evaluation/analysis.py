# SPDX-License-Identifier: Apache-2.0
"""What AP does not tell: which threshold to take, what is confused, what goes wrong and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from detr_fast.data.coco import CocoAnnotations
from detr_fast.evaluation.coco import CocoResult, hotcoco_eval

IOU = 0.5  # from which a detection counts as that of an object

# the kinds of errors of TIDE (Bolya et al., ECCV 2020), section 2.2
KINDS = {
    "Cls": "right place, wrong class",
    "Loc": "right class, box too far off (IoU 0.1 to 0.5)",
    "Both": "wrong class and box too far off",
    "Dupe": "a second detection of an object that was found",
    "Bkg": "nothing annotated there",
    "Miss": "annotated, but not found by any of the above",
}


class OperatingPoint(NamedTuple):
    """A score threshold of a class, with precision and recall at it."""

    threshold: float
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


class ImageErrors(NamedTuple):
    """How many detections of an image are right and false, and how many objects were missed."""

    image_id: int
    right: int
    false: int
    missed: int


class Doubt(NamedTuple):
    """A confident detection that disagrees with the annotations: they may be wrong, too."""

    image_id: int
    found: str
    score: float
    annotated: str | None  # class of the box there; None where there is none


@dataclass(frozen=True)
class Errors:
    """What went wrong in an evaluation.

    Attributes:
        threshold (float): the least score of the detections in `confusion` and `images`
        confusion (int64[K + 1, K + 1]): objects by annotated (row) and detected class (column), in
            the order of `category_ids`; the last row counts detections of nothing, the last column
            objects that were missed
        category_ids (list[int]): of the K rows
        lost_ap (dict[str, float]): of `KINDS` -> what AP50 would gain without such errors
        counts (dict[str, int]): of `KINDS` -> number of such errors, at any score
        images (list[ImageErrors]): those with an error, from the least F1 on; of equal F1 the one
            with more errors comes first
        doubts (list[Doubt]): the most confident ones first
    """

    threshold: float
    confusion: np.ndarray
    category_ids: list[int]
    lost_ap: dict[str, float]
    counts: dict[str, int]
    images: list[ImageErrors]
    doubts: list[Doubt]

    def most_confused(self, limit: int) -> list[tuple[int, int, int]]:
        """The most frequent mistakes between two classes: annotated, detected, how often."""
        between = self.confusion[:-1, :-1].copy()
        np.fill_diagonal(between, 0)
        order = np.argsort(-between, axis=None, kind="stable")[:limit]
        pairs = zip(*np.unravel_index(order, between.shape), strict=True)
        ids = self.category_ids
        return [(ids[i], ids[j], int(between[i, j])) for i, j in pairs if between[i, j]]


def find_errors(truth: CocoAnnotations, result: CocoResult, threshold: float = 0.5) -> Errors:
    """Compare detections with annotations, box by box (hotcoco).

    In the confusion matrix detections take the object that they overlap most, of whatever class,
    the most confident detection first; an IoU of 0.5 is needed. Crowd regions are no objects.

    Args:
        truth (CocoAnnotations): what `result` was scored against.
        result (CocoResult): the evaluation.
        threshold (float): the least score in the confusion matrix and in the counts of images.
    """
    image_ids = result.eval["params"]["imgIds"]
    every = hotcoco_eval(truth, image_ids, result.rows)
    every.evaluate()
    tide = every.tide_errors(pos_thr=IOU)
    kept = hotcoco_eval(truth, image_ids, result.rows[result.rows[:, 5] >= threshold])
    kept.evaluate()
    confusion = kept.confusion_matrix(iou_thr=IOU)
    found = kept.image_diagnostics(iou_thr=IOU, score_thr=threshold)
    return Errors(
        threshold=threshold,
        confusion=confusion["matrix"].astype(np.int64),
        category_ids=list(confusion["cat_ids"]),
        lost_ap={kind: tide["delta_ap"][kind] for kind in KINDS},
        counts={kind: tide["counts"][kind] for kind in KINDS},
        images=_worst_first(
            ImageErrors(image_id, counts["tp"], counts["fp"], counts["fn"])
            for image_id, counts in found["img_summary"].items()
        ),
        doubts=sorted(
            (
                Doubt(d["image_id"], d["dt_category"], d["dt_score"], d["gt_category"])
                for d in found["label_errors"]
            ),
            key=lambda doubt: (-doubt.score, doubt.image_id),
        ),
    )


def _worst_first(images: Sequence[ImageErrors]) -> list[ImageErrors]:
    def order(image: ImageErrors) -> tuple[float, int, int]:
        errors = image.false + image.missed
        return image.right / (image.right + errors / 2), -errors, image.image_id

    return sorted((image for image in images if image.false or image.missed), key=order)


def operating_points(result: CocoResult) -> dict[int, OperatingPoint]:
    """Of each class with ground truth and detections, by category id: where its F1 is highest.

    At an IoU of 0.5, on the 101 recalls of COCO. Precision there is the best of any higher recall;
    the highest F1 stands where that recall itself is reached: only the grid makes it an estimate.
    """
    recalls = np.asarray(result.eval["params"]["recThrs"])
    points = {}
    for k, category_id in enumerate(result.eval["params"]["catIds"]):
        precision = result.eval["precision"][0, :, k, 0, -1].numpy()
        scores = result.eval["scores"][0, :, k, 0, -1].numpy()
        if precision.max() <= 0:
            continue
        f1 = 2 * precision * recalls / np.maximum(precision + recalls, 1e-12)
        best = int(np.flatnonzero(f1 == f1.max())[-1])
        points[category_id] = OperatingPoint(
            float(scores[best]), float(precision[best]), float(recalls[best])
        )
    return points
