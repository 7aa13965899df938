# SPDX-License-Identifier: Apache-2.0
"""The page itself: what was found, as the template wants it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from detr_fast.data.coco import CocoAnnotations
from detr_fast.evaluation.analysis import KINDS, Errors, operating_points
from detr_fast.evaluation.coco import CocoResult
from detr_fast.visualize import (
    confusion_figure,
    precision_recall_figure,
    size_figure,
    training_curves_figure,
)
from detr_fast.visualize.canvas import encoded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# heading of the summary -> place in COCO's 12 numbers
SUMMARIZED = {
    "AP": 0,
    "AP50": 1,
    "AP75": 2,
    "AP small": 3,
    "AP medium": 4,
    "AP large": 5,
    "AR": 8,
}
LISTED = 20  # confused pairs and doubts of a run


class Scored(NamedTuple):
    """An evaluated checkpoint, and JPEG files of its worst images."""

    file: Path
    epoch: int | None
    result: CocoResult
    truth: CocoAnnotations
    errors: Errors
    pictures: list[bytes]


class Run(NamedTuple):
    """A run, the records of its ``log.txt``, and its evaluation; one of the two may be missing."""

    name: str
    records: list[dict[str, Any]]
    scored: Scored | None


def page(runs: Sequence[Run], threshold: float) -> str:
    """The HTML of a report, complete in itself: nothing is loaded from elsewhere.

    Args:
        runs (list[Run]): in the order of the page.
        threshold (float): the least score of the detections that were counted and drawn.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError('a report needs jinja2: pip install "detr-fast[train]"') from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    logs = {run.name: run.records for run in runs if run.records}
    scored = {run.name: run.scored for run in runs if run.scored}
    results = {name: run.result for name, run in scored.items()}
    template = (files("detr_fast.report") / "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        names=[run.name for run in runs],
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        version=version("detr-fast"),
        threshold=threshold,
        curves=_source(training_curves_figure(logs)) if logs else None,
        without_log=[run.name for run in runs if not run.records],
        summary=_summary(scored),
        precision_recall=_source(precision_recall_figure(results)) if results else None,
        sizes=_source(size_figure(results)) if results else None,
        classes=_classes(results) if len(results) > 1 else None,
        sections=[_section(name, run) for name, run in scored.items()],
    )


def _number(value: float | None) -> str:
    """Three digits; a dash where there is none (COCO writes -1 for that)."""
    return "\N{EN DASH}" if value is None or value < 0 else f"{value:.3f}"


def _source(figure: Figure) -> str:
    return _data(encoded(figure), "png")


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _evaluated(run: Scored) -> CocoAnnotations:
    """What is annotated in the images that a run was scored on."""
    return run.truth.keep_images(np.isin(run.truth.image_ids, run.result.eval["params"]["imgIds"]))


def _summary(scored: dict[str, Scored]) -> dict[str, Any]:
    """A row for each run; the best number of each column, where they can be compared."""
    rows, data = [], set()
    for name, run in scored.items():
        truth = _evaluated(run)
        data.add((truth.image_ids.tobytes(), truth.boxes.tobytes(), truth.labels.tobytes()))
        rows.append(
            {
                "name": name,
                "file": run.file.name,
                "epoch": run.epoch,
                "images": len(truth.image_ids),
                "boxes": int((truth.crowds == 0).sum()),
                "values": [run.result.stats[place] for place in SUMMARIZED.values()],
            }
        )
    columns = zip(*(row["values"] for row in rows), strict=True)
    return {
        "different": len(data) > 1,
        "headings": list(SUMMARIZED),
        "rows": rows,
        "best": [max(column) if len(rows) > 1 == len(data) else None for column in columns],
    }


def _classes(results: dict[str, CocoResult]) -> dict[str, Any]:
    """AP and AP50 of each class in each run; a class may be missing in some."""
    tables = [result.per_class() for result in results.values()]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = []
    for name in names:
        cells = [table.get(name, {"AP": -1.0, "AP50": -1.0}) for table in tables]
        rows.append({"name": name, "values": [cell[key] for cell in cells for key in cell]})
    return {"runs": list(results), "rows": rows}


def _section(name: str, run: Scored) -> dict[str, Any]:
    """What the page says of one evaluated run."""
    result, errors, truth = run.result, run.errors, _evaluated(run)
    classes = result.class_names
    points, counts = operating_points(result), truth.box_counts()
    table = []
    for category_id, (shown, values) in zip(
        result.eval["params"]["catIds"], result.per_class().items(), strict=True
    ):
        point = points.get(category_id)
        table.append(
            {
                "name": shown,
                "boxes": counts[category_id],
                **values,
                "threshold": point and point.threshold,
                "precision": point and point.precision,
                "recall": point and point.recall,
                "f1": point and point.f1,
            }
        )
    files = dict(zip(truth.image_ids.tolist(), truth.file_names.tolist(), strict=True))
    worst = [
        {**image._asdict(), "file": files[image.image_id], "source": _data(picture, "jpeg")}
        for image, picture in zip(errors.images, run.pictures, strict=False)
    ]
    matrix = confusion_figure(errors.confusion, [classes[i] for i in errors.category_ids])
    return {
        "name": name,
        "classes": table,
        "confusion": _source(matrix),
        "confused": [(classes[i], classes[j], n) for i, j, n in errors.most_confused(LISTED)],
        "errors": [
            (text, errors.counts[kind], errors.lost_ap[kind]) for kind, text in KINDS.items()
        ],
        "wrong_images": len(errors.images),
        "worst": worst,
        "doubts": [
            {**doubt._asdict(), "file": files[doubt.image_id]} for doubt in errors.doubts[:LISTED]
        ],
    }
