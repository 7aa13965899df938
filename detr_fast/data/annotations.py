# SPDX-License-Identifier: Apache-2.0
"""The boxes of a data set as a few flat arrays, read from the COCO format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from detr_fast.data.validate import DataReport


class DatasetError(ValueError):
    """A data set on disk is incomplete or malformed; the message names the file and the remedy."""


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
            f"{path}: holds a JSON {type(content).__name__} where an object is expected "
            '({"images": ..., "annotations": ..., "categories": ...})'
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
        """Take the columns from a dict in the COCO format; ``source`` is its name in errors.

        Only what detection needs is kept: no segmentations, captions or licences. Annotations of
        images that are not listed are left out, so that a subset may be made by shortening
        ``images``.

        Raises:
            DatasetError: missing or malformed keys, repeated ids, unlisted categories.
        """
        for key in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise DatasetError(
                    f"{source}: no list {key!r}; expected a COCO instances file "
                    "(images, annotations, categories)"
                )
        images, categories = content["images"], content["categories"]
        table = _Columns(images, "images", source)
        image_ids = table.read("id", np.int64)
        order = np.argsort(image_ids, kind="stable")
        image_ids = image_ids[order]
        _reject_repeated(image_ids, "image", source)
        file_names = np.array([str(image.get("file_name", "")) for image in images], dtype=str)
        sizes = [table.read(key, np.int64, default=0) for key in ("height", "width")]

        category_ids = _Columns(categories, "categories", source).read("id", np.int64)
        _reject_repeated(np.sort(category_ids), "category", source)
        if not len(category_ids) or category_ids.min() < 0:
            raise DatasetError(f"{source}: 'categories' must list ids of 0 or more")
        names = {int(c["id"]): str(c.get("name", c["id"])) for c in categories}

        table = _Columns(content["annotations"], "annotations", source)
        owners = table.read("image_id", np.int64)
        boxes = table.read("bbox", np.float64, width=4)
        labels = table.read("category_id", np.int64)
        unlisted = ~np.isin(labels, category_ids)
        if unlisted.any():
            at = int(unlisted.argmax())
            raise DatasetError(
                f"{source}: annotations[{at}] has category_id {labels[at]}, "
                "which 'categories' does not list"
            )
        areas = table.read("area", np.float64, default=np.nan)
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
        crowds = table.read("iscrowd", np.int64, default=0)

        rows = np.argsort(owners, kind="stable")
        rows = rows[np.isin(owners[rows], image_ids)]
        return cls(
            image_ids=image_ids,
            file_names=file_names[order],
            sizes=np.stack(sizes, axis=1)[order],
            starts=np.append(np.searchsorted(owners[rows], image_ids), len(rows)),
            boxes=boxes[rows],
            labels=labels[rows],
            areas=areas[rows],
            crowds=crowds[rows],
            class_names=names,
        )

    @property
    def owners(self) -> np.ndarray:
        """Image id of each annotation (int64[A])."""
        return np.repeat(self.image_ids, np.diff(self.starts))

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


class _Columns:
    """Reads one key of every entry of a list into an array, and names the entry that has none."""

    def __init__(self, entries: Sequence[dict[str, Any]], name: str, source: str):
        self.entries, self.name, self.source = entries, name, source

    def read(self, key: str, dtype: type, *, width: int = 0, default: Any = None) -> np.ndarray:
        """Entries' values of ``key``: dtype[N], or dtype[N, width]; finite unless optional."""

        def convert(entries: Sequence[dict[str, Any]]) -> np.ndarray | None:
            required = default is None
            try:
                values = [entry[key] if required else entry.get(key, default) for entry in entries]
                column: np.ndarray = np.array(values, dtype=dtype)
                column = column.reshape(len(values), *([width] if width else []))
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
                return None
            return None if required and not np.isfinite(column).all() else column

        column = convert(self.entries)
        if column is not None:
            return column
        at = next(at for at, entry in enumerate(self.entries) if convert([entry]) is None)
        raise DatasetError(
            f"{self.source}: {self.name}[{at}] needs {key!r} "
            f"({f'{width} finite numbers' if width else 'a number'}), "
            f"found {self.entries[at]!r:.200}"
        )


def _reject_repeated(ascending: np.ndarray, kind: str, source: str) -> None:
    repeated = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(repeated):
        raise DatasetError(f"{source}: {kind} id {repeated[0]} is listed more than once")
