# SPDX-License-Identifier: Apache-2.0
"""The boxes of a data set as a few flat arrays, read from the COCO format."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from detr_fast.data.coco_format import read_columns
from detr_fast.data.validate import DataReport, DatasetError

__all__ = ["CocoAnnotations", "DatasetError", "read_json"]


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DatasetError: no such file, empty, cut off, no JSON, or no object.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and not text.strip():
            raise DatasetError(f"{path}: is empty; write or copy it again") from error
        raise DatasetError(f"{path}: no valid JSON ({error}); is the copy complete?") from error
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path}: holds no JSON object; expected "
            '{"images": [...], "annotations": [...], "categories": [...]}'
        )
    return content


@dataclass(frozen=True)
class CocoAnnotations:
    """The boxes of a COCO annotation file as a few flat arrays.

    A parsed ``instances_train2017.json`` is some gigabytes of small Python objects, which every
    forked loader worker would copy page by page as it counts references, and every spawned one
    would receive through a pipe. The arrays are some 60 MB, and shared.

    Annotations are ordered by image (in file order within one): those of image ``i`` are
    ``starts[i]:starts[i + 1]``.

    Attributes:
        image_ids (int64[I]): ascending
        file_names (str[I]): relative to the image folder; empty where the file gives none
        sizes (int64[I, 2]): height and width in pixels; 0 where the file gives none
        starts (int64[I + 1]): first annotation of each image
        boxes (float64[A, 4]): x, y, width, height in pixels, as written
        labels (int64[A]): raw category ids
        areas (float64[A]): square pixels; width * height where the file gives none
        crowds (int64[A]): 1 for a crowd region
        class_names (dict[int, str]): category id to name
        source (str): what the data set is called in messages
    """

    image_ids: np.ndarray
    file_names: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    class_names: dict[int, str]
    source: str = "annotations"

    @classmethod
    def read(cls, path: str | Path) -> CocoAnnotations:
        """Parse an annotation file.

        Raises:
            DatasetError: no such file, no JSON, or not the COCO format.
        """
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(
        cls,
        content: dict[str, Any],
        source: str = "annotations",
        report: DataReport | None = None,
    ) -> CocoAnnotations:
        """Take the columns from a dict in the COCO format; ``source`` is its name in messages.

        Only what detection needs is kept: no segmentations, captions or licences. Annotations of
        images that are not listed are left out, so that a subset may be made by shortening
        ``images``. Categories that only group others, as Roboflow lists one, are no classes.

        With a report, each entry that cannot be used is left out of the result and counted there;
        any JSON value may stand in any field. Without one, the first entry that cannot be read is
        an error, and boxes are kept as written, with or without extent, as pycocotools would.

        Raises:
            DatasetError: not the COCO format, no category, or categories whose ids are malformed
                or given to two classes; without a report also malformed or repeated image ids,
                unlisted categories, file names that leave the image folder, malformed values.
        """
        return cls(**read_columns(content, source, report))

    @property
    def owners(self) -> np.ndarray:
        """Image id of each annotation (int64[A])."""
        return np.repeat(self.image_ids, np.diff(self.starts))

    def box_counts(self) -> dict[int, int]:
        """Category id to number of boxes to learn from: with extent, and no crowd regions."""
        useful = (self.crowds == 0) & (self.boxes[:, 2:] > 0).all(axis=1)
        found, counts = np.unique(self.labels[useful], return_counts=True)
        return dict.fromkeys(self.class_names, 0) | dict(
            zip(found.tolist(), counts.tolist(), strict=True)
        )

    def keep_images(self, keep: np.ndarray) -> CocoAnnotations:
        """The images where ``keep`` (bool[I]) and their annotations."""
        counts = np.diff(self.starts)
        rows = np.repeat(keep, counts)
        return replace(
            self._keep_rows(rows, counts[keep]),
            image_ids=self.image_ids[keep],
            file_names=self.file_names[keep],
            sizes=self.sizes[keep],
        )

    def keep_categories(self, category_ids: Collection[int]) -> CocoAnnotations:
        """All images, with the annotations of these categories alone."""
        rows = np.isin(self.labels, list(category_ids))
        before = np.append(0, np.cumsum(rows))
        names = {i: name for i, name in self.class_names.items() if i in category_ids}
        counts = np.diff(before[self.starts])
        return replace(self._keep_rows(rows, counts), class_names=names)

    def _keep_rows(self, rows: np.ndarray, counts: np.ndarray) -> CocoAnnotations:
        return replace(
            self,
            starts=np.append(0, np.cumsum(counts)),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            crowds=self.crowds[rows],
        )

    @property
    def images(self) -> list[dict[str, Any]]:
        """The ``images`` of the COCO format."""
        rows = zip(
            self.image_ids.tolist(), self.file_names.tolist(), self.sizes.tolist(), strict=True
        )
        return [{"id": i, "file_name": f, "height": h, "width": w} for i, f, (h, w) in rows]

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The ``categories`` of the COCO format."""
        return [{"id": label, "name": name} for label, name in self.class_names.items()]

    def to_dict(self) -> dict[str, Any]:
        """The dict in the COCO format; annotation ids count from 1.

        (pycocotools takes an annotation of id 0 for unmatched and merges equal ids.)
        """
        columns = (self.owners, self.boxes, self.labels, self.areas, self.crowds)
        keys = ("id", "image_id", "bbox", "category_id", "area", "iscrowd")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        annotations = [dict(zip(keys, (i, *row), strict=True)) for i, row in enumerate(rows, 1)]
        return {"images": self.images, "annotations": annotations, "categories": self.categories}
