# SPDX-License-Identifier: Apache-2.0
"""From the JSON of the COCO format to columns, whatever stands in its fields."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from detr_fast.data.columns import Column, integers, measures, objects, quadruples, switches
from detr_fast.data.validate import DataReport, DatasetError, one_line

LONGEST_NAME = 1024  # characters; each name in the array takes the room of the longest

Error = Callable[[int], str]  # what to say of entry i

_SUSPICIOUS = re.compile(r"^[/\\]|^[A-Za-z]:|\.\.|\0")
_SEPARATORS = re.compile(r"[/\\]")
_BRIEF = reprlib.Repr()
_BRIEF.maxdict, _BRIEF.maxlevel, _BRIEF.maxstring = 8, 3, 60


def read_columns(content: Any, source: str, report: DataReport | None) -> dict[str, Any]:
    """The fields of `CocoAnnotations`; see its ``from_dict``."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DatasetError(
                f"{source}: no list {key!r}; expected a COCO instances file "
                "(images, annotations, categories)"
            )
    images = _Images(content["images"], source, report)
    annotations = _Annotations(content["annotations"], source, report, images.name_of)
    categories = _Categories(content["categories"], source, report)
    used = annotations.categories.values[annotations.categories.valid]
    categories.leave_out_grouping(set(np.unique(used).tolist()))
    return {
        **images.columns(),
        **annotations.columns(images, list(categories.names)),
        "class_names": categories.names,
        "source": source,
    }


def leaves_folder(name: str) -> bool:
    """Whether a file name may lead out of the folder it is relative to, on any platform."""
    if not _SUSPICIOUS.search(name):
        return False
    if name[0] in "/\\" or name[1:2] == ":" or "\0" in name:
        return True
    return _climbs(name.split("/")) or _climbs(_SEPARATORS.split(name))


def _climbs(parts: Sequence[str]) -> bool:
    depth = 0
    for part in parts:
        if part == "..":
            depth -= 1
        elif part not in ("", "."):
            depth += 1
        if depth < 0:
            return True
    return False


class _Entries:
    """The entries of one list: which of them are kept, and what is said about the others.

    With a report, entries with faults are left out and counted. Without one, a fault that has an
    ``error`` is raised, and others pass.
    """

    name: str

    def __init__(self, entries: list[Any], source: str, report: DataReport | None):
        self.entries, self.source, self.report = entries, source, report
        self.objects = objects(entries)
        self.kept = np.ones(len(entries), dtype=bool)
        self.ids = integers(self.objects, "id")

    def culprit(self, at: int) -> str:
        """What entry ``at`` is called in a report."""
        if not self.ids.valid[at]:
            return f"{self.name}[{at}]"
        return f"{self.name.removesuffix('s')} {self.ids.values[at]}"

    def note(self, faulty: np.ndarray, kind: str, error: Error | None = None) -> None:
        """Report those of the kept entries where ``faulty`` (bool[N])."""
        rows = np.flatnonzero(faulty & self.kept).tolist()
        if rows and self.report is not None:
            self.report.add(kind, map(self.culprit, rows))
        elif rows and error:
            raise DatasetError(f"{self.source}: {error(rows[0])}")

    def leave_out(self, faulty: np.ndarray, kind: str, error: Error | None = None) -> None:
        """Report them, and keep them no longer."""
        self.note(faulty, f"{kind} (left out)", error)
        if self.report is not None:
            self.kept &= ~faulty

    def require(self, column: Column, key: str, what: str) -> None:
        """Leave out the entries without a valid ``key``."""
        kind = f"{self.name} without {what} as {key!r}"
        self.leave_out(~column.valid, kind, self.needs(key, what))

    def needs(self, key: str, what: str) -> Error:
        """The error of an entry whose ``key`` is not what it must be."""
        return lambda at: (
            f"{self.name}[{at}] needs {key!r} ({what}), found {_brief(self.entries[at])}"
        )


class _Images(_Entries):
    name = "images"

    def __init__(self, entries: list[Any], source: str, report: DataReport | None):
        super().__init__(entries, source, report)
        given = [entry.get("file_name") for entry in self.objects]
        self.names = [name if isinstance(name, str) else "" for name in given]
        self.require(self.ids, "id", "a number")
        self.listed = np.unique(self.ids.values[self.kept])
        rows = np.flatnonzero(self.ids.valid)
        self.name_of = {int(self.ids.values[row]): self.names[row] for row in rows}

        kind = "images without a 'file_name'"
        no_text = _mask(name is not None and not isinstance(name, str) for name in given)
        too_long = _mask(len(name) > LONGEST_NAME for name in self.names)
        text = self.needs("file_name", f"a text of at most {LONGEST_NAME} characters")
        self.leave_out(no_text | too_long, kind, text)
        self.leave_out(_mask(not name for name in self.names), kind)
        self.leave_out(
            _mask(map(leaves_folder, self.names)),
            "images whose 'file_name' leaves the image folder",
            lambda at: (
                f"image id {self.ids.values[at]}: 'file_name' {_brief(self.names[at])} "
                "leaves the image folder; write it relative to that folder"
            ),
        )
        self._leave_out_repeated()

    def culprit(self, at: int) -> str:
        image = super().culprit(at)
        return f"{image} ({self.names[at]:.100})" if self.names[at] else image

    def _leave_out_repeated(self) -> None:
        first: dict[int, str] = {}
        unclear: set[int] = set()
        again = np.zeros_like(self.kept)
        for at in _sharing(self.ids.values, self.kept):
            image_id = int(self.ids.values[at])
            again[at] = image_id in first
            if first.setdefault(image_id, self.names[at]) != self.names[at]:
                unclear.add(image_id)

        def error(at: int) -> str:
            return f"image id {self.ids.values[at]} is listed more than once"

        differ = np.isin(self.ids.values, list(unclear))
        self.leave_out(differ, "images of one id that name different files", error)
        self.leave_out(again, "images that are listed again", error)

    def columns(self) -> dict[str, np.ndarray]:
        """The images that are kept, by their ids."""
        sizes = [integers(self.objects, key, default=0, low=0) for key in ("height", "width")]
        for key, size in zip(("height", "width"), sizes, strict=True):
            kind = f"images with a malformed {key!r} (taken as unknown)"
            self.note(~size.valid, kind, self.needs(key, "a number of pixels"))
        rows = np.flatnonzero(self.kept)
        rows = rows[np.argsort(self.ids.values[rows], kind="stable")]
        self.image_ids = self.ids.values[rows]
        self.sizes = np.stack([size.values[rows] for size in sizes], axis=1)
        return {
            "image_ids": self.image_ids,
            "file_names": np.array([self.names[row] for row in rows.tolist()], dtype=str),
            "sizes": self.sizes,
        }


class _Annotations(_Entries):
    name = "annotations"

    def __init__(
        self,
        entries: list[Any],
        source: str,
        report: DataReport | None,
        file_name_of: Mapping[int, str],
    ):
        super().__init__(entries, source, report)
        self.file_name_of = file_name_of
        self.owners = integers(self.objects, "image_id")
        self.categories = integers(self.objects, "category_id")
        self.boxes = quadruples(self.objects, "bbox")
        self.require(self.owners, "image_id", "a number")
        self.require(self.boxes, "bbox", "4 finite numbers")
        self.require(self.categories, "category_id", "a number")

    def culprit(self, at: int) -> str:
        if not self.owners.valid[at]:
            return super().culprit(at)
        image = int(self.owners.values[at])
        # readers of other layouts number images themselves: the file is what a user knows
        name = self.file_name_of.get(image)
        return f"{super().culprit(at)} (image {image}{f', {name:.100}' if name else ''})"

    def columns(self, images: _Images, category_ids: list[int]) -> dict[str, np.ndarray]:
        """The annotations that are kept, by image."""
        owners, labels, boxes = self.owners.values, self.categories.values, self.boxes.values
        self.leave_out(
            ~np.isin(labels, category_ids),
            "annotations of categories that are not listed",
            lambda at: (
                f"annotations[{at}] has category_id {labels[at]}, which 'categories' does not list"
            ),
        )
        known = np.isin(owners, images.image_ids)
        self.leave_out(~np.isin(owners, images.listed), "annotations of images that are not listed")
        self.leave_out(~known, "annotations of images that cannot be used")
        self._leave_out_boxes(images)
        self._leave_out_repeated()

        areas, crowds = measures(self.objects, "area"), switches(self.objects, "iscrowd")
        kind = "annotations with a malformed 'area' (width * height is taken)"
        self.note(~areas.valid, kind, self.needs("area", "a number of 0 or more"))
        kind = "annotations with a malformed 'iscrowd' (0 is taken)"
        self.note(~crowds.valid, kind, self.needs("iscrowd", "0 or 1"))
        extent = np.abs(boxes[:, 2] * boxes[:, 3])
        area = np.where(np.isnan(areas.values), extent, areas.values)

        rows = np.flatnonzero(self.kept & known)
        rows = rows[np.argsort(owners[rows], kind="stable")]
        return {
            "starts": np.append(np.searchsorted(owners[rows], images.image_ids), len(rows)),
            "boxes": boxes[rows],
            "labels": labels[rows],
            "areas": area[rows],
            "crowds": crowds.values[rows],
        }

    def _leave_out_boxes(self, images: _Images) -> None:
        x, y, width, height = self.boxes.values.T
        empty = (width <= 0) | (height <= 0)
        self.leave_out(empty, "boxes whose width or height is not above 0")
        if not len(images.image_ids):
            return
        image = np.searchsorted(images.image_ids, self.owners.values)
        sizes = images.sizes[image.clip(max=len(images.image_ids) - 1)].astype(np.float64)
        image_height, image_width = np.where(sizes > 0, sizes, np.inf).T
        outside = (x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0)
        self.leave_out(outside, "boxes outside of their image")
        beyond = np.maximum(x + width - image_width, y + height - image_height)
        beyond = np.maximum(beyond, np.maximum(-x, -y)) > 1
        kind = "boxes that reach over the edge of their image by more than a pixel (clipped)"
        self.note(beyond, kind)

    def _leave_out_repeated(self) -> None:
        if self.report is None:
            return
        seen: dict[int, set[tuple[float, ...]]] = {}
        again, other = np.zeros_like(self.kept), np.zeros_like(self.kept)
        rows = _sharing(self.ids.values, self.kept & self.ids.valid)
        table = (self.owners.values, self.categories.values, *self.boxes.values.T)
        contents = zip(*(column[rows].tolist() for column in table), strict=True)
        for at, content in zip(rows, contents, strict=True):
            same_id = seen.setdefault(int(self.ids.values[at]), set())
            again[at] = content in same_id
            other[at] = bool(same_id)
            same_id.add(content)
        self.leave_out(again, "annotations that are listed again")
        self.note(other, "annotations with the id of another one (kept)")


class _Categories(_Entries):
    name = "categories"

    def __init__(self, entries: list[Any], source: str, report: DataReport | None):
        super().__init__(entries, source, report)
        if not entries:
            raise DatasetError(f"{source}: 'categories' must list at least one class")
        invalid = ~self.ids.valid | (self.ids.values < 0)
        if invalid.any():
            at = int(invalid.argmax())
            raise DatasetError(
                f"{source}: 'categories' must list ids of 0 or more, found {_brief(entries[at])}"
            )
        self.names: dict[int, str] = {}
        again = np.zeros_like(self.kept)
        for at, category_id in enumerate(self.ids.values.tolist()):
            name = self.objects[at].get("name")
            name = one_line(name) if isinstance(name, str) and name.strip() else str(category_id)
            again[at] = category_id in self.names
            if self.names.setdefault(category_id, name) != name:
                raise DatasetError(
                    f"{source}: category id {category_id} is listed more than once, as "
                    f"{self.names[category_id]!r} and {name!r}; give each class its own id"
                )
        self.leave_out(
            again,
            "categories that are listed again",
            lambda at: f"category id {self.ids.values[at]} is listed more than once",
        )

    def culprit(self, at: int) -> str:
        return f"category {self.ids.values[at]}"

    def leave_out_grouping(self, used: set[int]) -> None:
        """Drop categories that only group others, and note each.

        Roboflow's exports start with one: no annotation is of it, and the classes name it as
        their supercategory.
        """
        members: dict[str, list[str]] = {}
        groups: dict[int, Any] = {}
        for entry, category_id in zip(self.objects, self.ids.values.tolist(), strict=True):
            if category_id in groups:  # listed again
                continue
            groups[category_id] = group = entry.get("supercategory")
            if isinstance(group, str):
                members.setdefault(one_line(group), []).append(self.names[category_id])
        listed = set(self.names.values())
        for category_id, name in list(self.names.items()):
            group = groups[category_id]
            grouped = isinstance(group, str) and one_line(group) in listed
            if name in members and category_id not in used and not grouped:
                del self.names[category_id]
                if self.report is not None:
                    self.report.note(
                        f"{self.source}: category {category_id} {name!r} is no class: it has no "
                        f"annotation and is the supercategory of {_brief(members[name])}"
                    )


def _mask(values: Iterable[bool]) -> np.ndarray:
    return np.fromiter(values, dtype=bool)


def _sharing(values: np.ndarray, among: np.ndarray) -> list[int]:
    """Rows, of those in ``among`` (bool[N]), whose value another such row has, too."""
    rows = np.flatnonzero(among)
    _, inverse, counts = np.unique(values[rows], return_inverse=True, return_counts=True)
    return rows[counts[inverse] > 1].tolist()


def _brief(value: Any) -> str:
    try:
        return _BRIEF.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a large {type(value).__name__}"
