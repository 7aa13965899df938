# SPDX-License-Identifier: Apache-2.0
"""YOLO data sets: a text file of boxes per image, read into the COCO format."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from detr_fast.data.annotations import DatasetError
from detr_fast.data.coco_format import leaves_folder
from detr_fast.data.image_folder import (
    SPLIT_FOLDERS,
    LabelledImage,
    coco_content,
    image_sizes,
    in_threads,
    is_image,
    list_images,
)
from detr_fast.data.validate import DataReport

YAML_SUFFIXES = (".yaml", ".yml")
NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "labels/train/classes.txt")
MOST_CLASSES = 100_000  # a larger number is a mistake: large vocabularies have some 20,000

Row = tuple[int, list[float]]  # class and box: centre, width, height as shares of the image


@dataclass
class YoloFolder:
    """A YOLO data set on disk.

    Attributes:
        path (Path): what describes it: the yaml file, or the folder
        root (Path): names in a list of images may be relative to it
        splits (dict[str, list[Path]]): folders of images and lists of images (``.txt``)
        missing (dict[str, str]): why a split cannot be read
        names (dict[int, str]): class to name; empty: the numbers found in the labels are the names
        names_from (str): the file with the names; empty without
        keypoints (int): numbers per object that follow the box
    """

    path: Path
    root: Path
    splits: dict[str, list[Path]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    names_from: str = ""
    keypoints: int = 0

    @property
    def said(self) -> str:
        """What was recognised, in one line."""
        classes = f"{len(self.names)} classes" if self.names else "class numbers taken as names"
        source = f" ({self.names_from})" if self.names_from else ""
        return f"data: YOLO{source}, {classes}, boxes as shares of the image"

    def images(self, split: str) -> Path:
        """The folder that file names of a split are relative to."""
        entries = self.splits[split]
        folders = [self.root if entry.suffix == ".txt" else entry for entry in entries]
        return folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders))

    def annotations(self, split: str) -> Path:
        """What messages about the labels of a split name."""
        entry = self.splits[split][0]
        if len(self.splits[split]) > 1:
            return self.path
        return entry if entry.suffix == ".txt" else Path(label_path(entry / "*")).parent

    @cached_property
    def categories(self) -> dict[int, str]:
        """Class to name; without names the numbers of all splits in ascending order."""
        if self.names:
            return self.names
        found = set()
        unused = DataReport("")  # the reading of each split reports
        for split in self.splits:
            names = [n for n in self._listed(split, unused) if not leaves_folder(n)]
            for rows in self._labels(split, names, unused):
                found.update(number for number, _ in rows or ())
        return {number: str(number) for number in sorted(found)}

    def read(self, split: str, report: DataReport) -> dict[str, Any]:
        """A split in the COCO format; what is left out goes into the report.

        Raises:
            DatasetError: no image, or no image with a label file.
            ImportError: without pillow.
        """
        folder = self.images(split)
        names = self._listed(split, report)
        inside = [name for name in names if not leaves_folder(name)]
        if not names:
            raise DatasetError(f"{self.splits[split][0]}: holds no images")
        # kept, for the check of file names to refuse; nothing outside the folder is opened
        images = [LabelledImage(name, (0, 0), []) for name in names if leaves_folder(name)]
        sizes = image_sizes(folder, inside, report)
        labels = self._labels(split, inside, report)
        for name, size, rows in zip(inside, sizes, labels, strict=True):
            if size is not None:
                width, height = size
                boxes = [
                    (number, [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height])
                    for number, (x, y, w, h) in rows or ()
                ]
                images.append(LabelledImage(name, size, boxes))
        if inside and all(rows is None for rows in labels):
            raise DatasetError(
                f"{folder}: none of {len(inside)} images has a label file; the first was looked "
                f"for at {label_path(folder / inside[0])}"
            )
        return coco_content(images, self.categories)

    def _listed(self, split: str, report: DataReport) -> list[str]:
        """Names of a split's images relative to its folder; as written where outside of it."""
        folder = self.images(split)
        names: dict[str, None] = {}
        repeated = []
        for entry in self.splits[split]:
            for written, path in self._entries(entry, report):
                name = os.path.relpath(path, folder)
                name = written if leaves_folder(name) else Path(name).as_posix()
                if name in names:
                    repeated.append(f"{entry}: {written}")
                names[name] = None
        report.add("images listed twice (taken once)", repeated)
        return sorted(names)

    def _entries(self, entry: Path, report: DataReport) -> Iterator[tuple[str, str]]:
        """What a folder or list names: as written, and as a path."""
        if entry.suffix != ".txt":
            for name in list_images(entry):
                yield name, os.path.join(entry, name)
            return
        lines = [line.strip() for line in _text(entry).splitlines()]
        strange = [f"{entry}:{at}" for at, line in enumerate(lines, 1) if line and not _named(line)]
        report.add("lines that name no image (left out)", strange)
        lines = [line for line in lines if _named(line)]
        # beside the list, or from the root of the data set: the first line tells for all
        beside = bool(lines) and (entry.parent / lines[0]).exists()
        for line in lines:
            yield line, os.path.normpath((entry.parent if beside else self.root) / line)

    def _labels(
        self, split: str, names: Iterable[str], report: DataReport
    ) -> list[list[Row] | None]:
        """Rows of the label file of each image; None without a file."""
        folder = self.images(split)
        paths = [label_path(os.path.join(folder, name)) for name in names]
        return [
            None if text is None else self._rows(path, text, report)
            for path, text in zip(paths, in_threads(_label_text, paths), strict=True)
        ]

    def _rows(self, path: str, text: str | OSError, report: DataReport) -> list[Row]:
        if isinstance(text, OSError):
            report.add("label files that cannot be read", [f"{path} ({text.strerror})"])
            return []
        rows = []
        for at, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                number, box = _parse(line.split(), self.keypoints)
            except ValueError as error:
                report.add("malformed label lines (left out)", [f"{path}:{at} ({error})"])
                continue
            if self.names and number not in self.names:
                kind = f"label lines of classes that {self.names_from} does not list (left out)"
                report.add(kind, [f"{path}:{at} (class {number})"])
            else:
                rows.append((number, box))
        return rows


def _label_text(path: str) -> str | OSError | None:
    """Content of a label file; None where there is none: the image has no objects."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error


def label_path(image: str | Path) -> str:
    """Label file of an image: the last folder ``images`` becomes ``labels``; else beside it."""
    stem, _ = os.path.splitext(os.path.abspath(image))
    before, found, below = stem.rpartition(f"{os.sep}images{os.sep}")
    return (os.path.join(before, "labels", below) if found else stem) + ".txt"


def _parse(fields: list[str], keypoints: int) -> Row:
    try:
        numbers = [float(text) for text in fields]
    except ValueError:
        raise ValueError("not numbers") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError("not finite")
    if not (numbers[0].is_integer() and 0 <= numbers[0] < MOST_CLASSES):
        raise ValueError(f"class {fields[0]} is no class number")
    number, *values = numbers
    if len(values) == 4 + keypoints:
        return int(number), values[:4]
    if keypoints or len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(fields)} numbers")
    left, top, right, bottom = (pick(values[at::2]) for pick in (min, max) for at in (0, 1))
    return int(number), [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def find_yolo(path: Path) -> YoloFolder | None:
    """A YOLO data set at a folder or yaml file; None where there is none.

    Raises:
        DatasetError: a yaml file is malformed, or several describe a data set.
        ImportError: there is a yaml file, but no PyYAML.
    """
    if path.is_file():
        return _from_yaml(path, _load(path))
    files = sorted(entry for entry in path.iterdir() if entry.suffix in YAML_SUFFIXES)
    found = []
    for file in files:
        try:
            content = _load(file)
        except DatasetError:
            if file.stem == "data":
                raise
            continue  # of another tool: with tags of its own, for instance
        if _describes_data(content):
            found.append((file, content))
    found = [pair for pair in found if pair[0].stem == "data"] or found
    if len(found) > 1:
        raise DatasetError(
            f"{path}: {', '.join(file.name for file, _ in found)} describe a data set each; "
            "name the one to use: --coco_path FILE"
        )
    return _from_yaml(*found[0]) if found else _from_folders(path)


def _from_yaml(file: Path, content: Any) -> YoloFolder:
    if not _describes_data(content):
        raise DatasetError(
            f"{file}: expected a YOLO data file with 'train', 'val' and 'names' (or 'nc')"
        )
    root = file.parent / str(content.get("path") or "")
    if not root.is_dir():  # it was written on another machine, or for another working directory
        root = file.parent
    data = YoloFolder(file, root, names=_names(file, content), names_from=file.name)
    shape = content.get("kpt_shape")
    if isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape):
        data.keypoints = math.prod(shape)
    for split, keys in SPLIT_FOLDERS.items():
        written = next((content[key] for key in keys if content.get(key)), None)
        entries = written if isinstance(written, list) else [written]
        if not all(isinstance(entry, str) for entry in entries):
            data.missing[split] = f"{file}: {split!r} names no folder of images"
            continue
        tried = [_resolve(entry, root, file.parent) for entry in entries]
        absent = [str(options[0]) for options in tried if not any(o.exists() for o in options)]
        if absent:
            data.missing[split] = f"{', '.join(absent)} (named by {file}) does not exist"
            continue
        data.splits[split] = [next(o for o in options if o.exists()) for options in tried]
    return data


def _resolve(entry: str, root: Path, beside: Path) -> list[Path]:
    """Where an entry may lie; Roboflow writes ``../train`` for what is beside the yaml."""
    options = [root / entry, beside / entry, beside / entry.lstrip("./")]
    return [Path(os.path.normpath(option)) for option in options]


def _from_folders(path: Path) -> YoloFolder | None:
    """``images/train`` with ``labels/train``, or ``train/images`` with ``train/labels``."""
    data = YoloFolder(path, path)
    for split, folders in SPLIT_FOLDERS.items():
        pairs = [(path / "images" / name, path / "labels" / name) for name in folders]
        pairs += [(path / name / "images", path / name / "labels") for name in folders]
        data.missing[split] = f"{pairs[0][0]} and {pairs[0][1]} do not exist"
        for images, labels in pairs:
            if images.is_dir() and labels.is_dir():
                data.splits[split] = [images]
                del data.missing[split]
                break
            if images.is_dir():
                data.missing[split] = f"{labels} does not exist"
                break
    if not data.splits:
        return None
    files = (path / name for name in (*NAME_FILES, "train/classes.txt", "train/labels/classes.txt"))
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        lines = [line.strip() for line in _text(file).splitlines()]
        data.names = dict(enumerate(line for line in lines if line))
        data.names_from = file.relative_to(path).as_posix()
    return data


def _describes_data(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and any(key in content for keys in SPLIT_FOLDERS.values() for key in keys)
        and ("names" in content or "nc" in content)
    )


def _names(file: Path, content: dict[Any, Any]) -> dict[int, str]:
    names, count = content.get("names"), content.get("nc")
    if names is None:
        if type(count) is not int or not 0 < count <= MOST_CLASSES:
            raise DatasetError(f"{file}: 'nc' must be the number of classes, found {count!r:.80}")
        return {number: str(number) for number in range(count)}
    found = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(found, dict) or not found or not all(map(_is_class, found.items())):
        raise DatasetError(f"{file}: 'names' must list the class names, found {names!r:.80}")
    if count is not None and count != len(found):
        raise DatasetError(f"{file}: 'nc' is {count!r:.80}, but 'names' lists {len(found)}")
    return {key: str(found[key]) for key in sorted(found)}


def _is_class(entry: tuple[Any, Any]) -> bool:
    key, name = entry
    return type(key) is int and 0 <= key < MOST_CLASSES and isinstance(name, str | int | float)


def _load(file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f'{file} needs PyYAML: pip install "detr-fast[train]"') from error
    try:
        return yaml.safe_load(_text(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise DatasetError(f"{file}: no valid YAML ({said:.200})") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read ({error.strerror})") from error


def _named(line: str) -> bool:
    return is_image(os.path.basename(line))
