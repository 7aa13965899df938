# SPDX-License-Identifier: Apache-2.0
"""COCO average precision and recall of boxes, by hotcoco or by pycocotools.

hotcoco computes the numbers of pycocotools in a small part of the time; pycocotools is kept as
the referee. Both read the same columns, and tests hold them equal.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_fast.data.coco import CocoAnnotations

Predictions = Mapping[int, Mapping[str, Tensor]]

# what each of the 12 numbers of COCO measures: kind, IoU, area, detections per image and class
SUMMARY = (
    ("AP", "0.50:0.95", "all", 100),
    ("AP", "0.50", "all", 100),
    ("AP", "0.75", "all", 100),
    ("AP", "0.50:0.95", "small", 100),
    ("AP", "0.50:0.95", "medium", 100),
    ("AP", "0.50:0.95", "large", 100),
    ("AR", "0.50:0.95", "all", 1),
    ("AR", "0.50:0.95", "all", 10),
    ("AR", "0.50:0.95", "all", 100),
    ("AR", "0.50:0.95", "small", 100),
    ("AR", "0.50:0.95", "medium", 100),
    ("AR", "0.50:0.95", "large", 100),
)
PARAMETERS = (
    "imgIds",
    "catIds",
    "iouThrs",
    "recThrs",
    "maxDets",
    "areaRng",
    "areaRngLbl",
    "useCats",
    "iouType",
)
CURVES = ("precision", "recall", "scores")


@dataclass(frozen=True)
class CocoResult:
    """What an evaluation found.

    Attributes:
        stats (list[float]): the 12 numbers of COCO in their usual order; -1 where no ground truth
            falls into the class of boxes
        eval (dict): pycocotools' ``COCOeval.eval`` as tensors and plain data, so that
            ``torch.load`` reads a saved copy with ``weights_only=True``: precision and scores
            (float64 Tensor[T, R, K, A, M]: IoU thresholds, recall thresholds, categories, areas,
            detection limits), recall (float64 Tensor[T, K, A, M]), counts, date, and params, an
            ``OrderedDict`` whose entries are attributes too: ``eval["params"].recThrs`` works as
            in the original
        class_names (dict[int, str]): category id to name
        rows (float64[N, 7]): image id, x, y, width, height, score, category id per detection
    """

    stats: list[float]
    eval: dict[str, Any]
    class_names: dict[int, str]
    rows: np.ndarray

    def table(self) -> str:
        """The 12 numbers in the form that pycocotools prints, under a heading."""
        lines = ["IoU metric: bbox"]
        for (kind, iou, area, limit), value in zip(SUMMARY, self.stats, strict=True):
            name = {"AP": "Average Precision", "AR": "Average Recall"}[kind]
            lines.append(
                f" {name:<18} ({kind}) @[ IoU={iou:<9} | area={area:>6} | maxDets={limit:>3} ]"
                f" = {value:0.3f}"
            )
        return "\n".join(lines)

    def per_class(self) -> dict[str, dict[str, float]]:
        """``AP`` and ``AP50`` of each class by name; -1 for a class without ground truth.

        Where two categories share a name, their ids are added to it.
        """
        precision = self.eval["precision"][:, :, :, 0, -1]
        repeated = Counter(self.class_names.values())
        scores = {}
        for k, label in enumerate(self.eval["params"]["catIds"]):
            name = self.class_names[label]
            key = name if repeated[name] == 1 else f"{name} ({label})"
            of_class = precision[:, :, k]
            scores[key] = {"AP": _mean(of_class), "AP50": _mean(of_class[0])}
        return scores

    @property
    def detections(self) -> list[dict[str, Any]]:
        """The detections in COCO's results format (boxes as x, y, width, height)."""
        columns = zip(
            self.rows[:, 0].astype(int).tolist(),
            self.rows[:, 6].astype(int).tolist(),
            self.rows[:, 1:5].tolist(),
            self.rows[:, 5].tolist(),
            strict=True,
        )
        keys = ("image_id", "category_id", "bbox", "score")
        return [dict(zip(keys, row, strict=True)) for row in columns]


class CocoEvaluator:
    """Collects detections image by image and scores them against a COCO ground truth.

    As in the original, only the images that were handed to `update` count, with or without
    detections: a run over part of a data set scores that part.

    Args:
        ground_truth: dict in the COCO format, or the path of such a JSON file
        evaluator: ``"hotcoco"`` or ``"pycocotools"``
        category_ids: label of a detection -> category id of the ground truth; detections of other
            labels are left out. By default labels are category ids.

    Raises:
        DatasetError: the ground truth is missing or malformed.
        ImportError: the evaluator is not installed.
    """

    def __init__(
        self,
        ground_truth: dict[str, Any] | str | Path,
        evaluator: str = "hotcoco",
        category_ids: Mapping[int, int] | None = None,
    ):
        engines = {"hotcoco": _run_hotcoco, "pycocotools": _run_pycocotools}
        if evaluator not in engines:
            raise ValueError(f"evaluator {evaluator!r}: choose {' or '.join(engines)}")
        try:
            __import__(evaluator)
        except ImportError as error:
            raise ImportError(
                f'no evaluator {evaluator}: pip install "detr-fast[train]"'
            ) from error
        self._run = engines[evaluator]
        self._category_ids = category_ids
        if isinstance(ground_truth, dict):
            self._truth = CocoAnnotations.from_dict(ground_truth, "ground truth")
        else:
            self._truth = CocoAnnotations.read(ground_truth)
        self._known = set(self._truth.image_ids.tolist())
        self._counts: dict[int, int] = {}
        self._packed: list[Tensor] = []

    def update(self, predictions: Predictions) -> None:
        """Add the detections of some images.

        Nothing is copied to the host before `summarize`: an evaluation loop does not wait here.

        Args:
            predictions: per image id, boxes (Tensor[N, 4]) as corners in pixels of the original
                image, scores (Tensor[N]) of any floating-point type, labels (int64 Tensor[N]);
                N may be 0. Labels that the ground truth does not list do not count.

        Raises:
            ValueError: an image that the ground truth does not list or that was added before, or
                shapes that disagree; the evaluator is left as it was.
        """
        if unknown := sorted(set(predictions) - self._known):
            raise ValueError(
                f"image ids {unknown[:5]} ({len(unknown)} in all) are not in the ground truth of "
                f"{len(self._known)} images; evaluate against the annotations of the same images"
            )
        if again := sorted(set(predictions) & self._counts.keys()):
            raise ValueError(
                f"image ids {again[:5]} ({len(again)} in all) were added before; "
                "hand over each image once"
            )
        packed = [_pack(image_id, found) for image_id, found in predictions.items()]
        if packed:
            self._packed.append(torch.cat(packed))
        for image_id, rows in zip(predictions, packed, strict=True):
            self._counts[int(image_id)] = len(rows)

    def summarize(self) -> CocoResult:
        """Score all detections so far.

        Raises:
            ValueError: no image was added, or a box or score is not finite.
        """
        if not self._counts:
            raise ValueError("nothing to summarize: no image was handed to update()")
        found = torch.cat(self._packed).cpu().double().numpy()
        owners = np.repeat(list(self._counts), list(self._counts.values()))
        broken = ~np.isfinite(found).all(axis=1)
        if broken.any():
            raise ValueError(
                f"{broken.sum()} detections have a box or score that is not finite, first in image "
                f"id {owners[broken][0]}; has the training diverged?"
            )
        rows = np.column_stack((owners, found))
        if self._category_ids is not None:
            rows = _in_categories(rows, self._category_ids)
        listed = np.isin(rows[:, 6].astype(np.int64), list(self._truth.class_names))
        run = self._run(self._truth, sorted(self._counts), rows[listed])
        params = OrderedDict((name, _plain(getattr(run.params, name))) for name in PARAMETERS)
        params.__dict__.update(params)
        curves = run.eval
        return CocoResult(
            stats=_plain(run.stats),
            eval={
                "params": params,
                "counts": list(curves["counts"]),
                "date": curves["date"],
                **{key: torch.from_numpy(np.array(curves[key])) for key in CURVES},
            },
            class_names=self._truth.class_names,
            rows=rows,
        )


def _in_categories(rows: np.ndarray, category_ids: Mapping[int, int]) -> np.ndarray:
    """Rows with category ids in place of labels, without those of other labels."""
    labels = np.array(sorted(category_ids), dtype=np.int64)
    rows = rows[np.isin(rows[:, 6].astype(np.int64), labels)]
    ids = np.array([category_ids[label] for label in labels.tolist()], dtype=np.int64)
    rows[:, 6] = ids[np.searchsorted(labels, rows[:, 6].astype(np.int64))]
    return rows


def _pack(image_id: int, found: Mapping[str, Tensor]) -> Tensor:
    """One image's detections as rows x, y, width, height, score, label: Tensor[N, 6].

    float32 (an integer below 2^24 is exact in it), or float64 where the input has it.
    """
    boxes, scores, labels = (found[key].detach() for key in ("boxes", "scores", "labels"))
    if boxes.shape != (len(scores), 4) or scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"image id {image_id}: boxes {tuple(boxes.shape)}, scores {tuple(scores.shape)} and "
            f"labels {tuple(labels.shape)} must be (N, 4), (N) and (N)"
        )
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, scores.dtype), torch.float32)
    corners = boxes.to(dtype)
    extent = corners[:, 2:] - corners[:, :2]
    return torch.cat((corners[:, :2], extent, scores[:, None], labels[:, None]), 1).to(dtype)


def hotcoco_eval(truth: CocoAnnotations, image_ids: list[int], rows: np.ndarray) -> Any:
    """hotcoco's ``COCOeval`` of these images and detections (`CocoResult.rows`), not yet run."""
    import hotcoco

    ground_truth = hotcoco.COCO.from_arrays(
        truth.images,
        truth.categories,
        truth.owners,
        truth.labels,
        truth.boxes,
        ids=np.arange(1, len(truth.labels) + 1),
        area=truth.areas,
        iscrowd=truth.crowds,
    )
    run = hotcoco.COCOeval(ground_truth, ground_truth.load_res(rows), "bbox")
    run.params.imgIds = image_ids
    return run


def _run_hotcoco(truth: CocoAnnotations, image_ids: list[int], rows: np.ndarray) -> Any:
    return _score(hotcoco_eval(truth, image_ids, rows))


def _run_pycocotools(truth: CocoAnnotations, image_ids: list[int], rows: np.ndarray) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with _quiet():
        ground_truth, found = COCO(), COCO()
        ground_truth.dataset = truth.to_dict()
        ground_truth.createIndex()
        if len(rows):  # loadRes looks at the first detection
            found = ground_truth.loadRes(rows)
    run = COCOeval(ground_truth, found, "bbox")
    run.params.imgIds = image_ids
    return _score(run)


def _score(run: Any) -> Any:
    """Runs a COCOeval of either package; it then holds stats, eval and params."""
    with _quiet():
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Both packages report on stdout, which belongs to the caller's own table."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist()


def _mean(values: Tensor) -> float:
    """Mean over the settings that have ground truth (-1 marks those without)."""
    present = values[values > -1]
    return present.mean().item() if present.numel() else -1.0
