# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC data sets: an XML file per image, read into the COCO format."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError

from detr_fast.data.annotations import DatasetError
from detr_fast.data.coco_format import leaves_folder
from detr_fast.data.image_folder import (
    SPLIT_FOLDERS,
    LabelledImage,
    coco_content,
    image_sizes,
    is_image,
    list_images,
)
from detr_fast.data.validate import DataReport

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    name: str
    corners: list[float]  # as written
    difficult: bool


class _Annotation(NamedTuple):
    file: Path
    image: str  # relative to the folder of images
    size: tuple[int, int]  # width, height; 0 where the file gives none
    objects: list[_Object]


class _Split(NamedTuple):
    annotations: list[_Annotation]
    problems: list[tuple[str, str]]  # kind and culprit


@dataclass
class VocFolder:
    """A Pascal VOC data set on disk.

    The order of the classes and the number that pixels are counted from show only when the XML
    files of all splits are read: the first ``read`` does so, and keeps what it has read.

    Attributes:
        path (Path): the folder
        splits (dict[str, Path]): the list of names (``.txt``) or the folder of a split
        missing (dict[str, str]): why a split cannot be read
        names_from (Path | None): the file that lists the class names
        remove_difficult (bool): leave out objects that are marked as difficult
    """

    path: Path
    splits: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    names_from: Path | None = None
    remove_difficult: bool = False

    @property
    def said(self) -> str:
        """What was recognised, in one line."""
        lists = ", ".join(f"{split}: {path.name}" for split, path in self.splits.items())
        classes = f"classes of {self.names_from.name}" if self.names_from else "classes by name"
        difficult = "left out" if self.remove_difficult else "kept"
        return f"data: Pascal VOC ({lists}), {classes}, difficult objects {difficult}"

    def images(self, split: str) -> Path:
        """The folder that file names of a split are relative to."""
        path = self.splits[split]
        return self.path / "JPEGImages" if path.suffix == ".txt" else path

    def annotations(self, split: str) -> Path:
        """What messages about the annotations of a split name."""
        return self.splits[split]

    def read(self, split: str, report: DataReport) -> dict[str, Any]:
        """A split in the COCO format; what is left out goes into the report.

        Raises:
            DatasetError: no XML file, or no class.
            ImportError: without defusedxml or pillow.
        """
        annotations, problems = self._parsed[split]
        for kind, culprit in problems:
            report.add(kind, [culprit])
        if not annotations:
            first = f"; the first problem: {problems[0][1]}" if problems else ""
            raise DatasetError(f"{self.splits[split]}: no annotation can be read{first}")
        labels = {name: label for label, name in enumerate(self.class_names)}
        images = []
        for annotation, size in self._sized(split, annotations, report):
            objects = []
            for at, (name, corners, difficult) in enumerate(annotation.objects, 1):
                if name not in labels:
                    report.add(
                        f"objects of classes that {self.names_from} does not list (left out)",
                        [f"{annotation.file}: object {at} ({name!r:.80})"],
                    )
                elif not (difficult and self.remove_difficult):
                    left, top, right, bottom = corners
                    left, top = left - self.first_pixel, top - self.first_pixel
                    objects.append((labels[name], [left, top, right - left, bottom - top]))
            images.append(LabelledImage(annotation.image, size, objects))
        report.note(f"{self.splits[split]}: coordinates are counted from {self.first_pixel}")
        return coco_content(images, dict(enumerate(self.class_names)))

    @cached_property
    def class_names(self) -> list[str]:
        """As a file lists them, else those of all splits in alphabetical order."""
        if self.names_from is not None:
            return _read_names(self.names_from)
        return sorted({thing.name for thing in self._objects})

    @cached_property
    def first_pixel(self) -> int:
        """1 as in Pascal VOC; 0 where a corner shows that the tool counted from 0."""
        return int(all(min(thing.corners[:2]) >= 1 for thing in self._objects))

    @property
    def _objects(self) -> list[_Object]:
        every = [entry for split in self._parsed.values() for entry in split.annotations]
        return [thing for entry in every for thing in entry.objects]

    @cached_property
    def _parsed(self) -> dict[str, _Split]:
        return {split: self._parse(split) for split in self.splits}

    def _parse(self, split: str) -> _Split:
        annotations: list[_Annotation] = []
        problems: list[tuple[str, str]] = []
        images = list_images(self.images(split))
        unclaimed = set(images)
        by_stem: dict[str, list[str]] = defaultdict(list)
        for image in images:
            by_stem[os.path.splitext(image)[0]].append(image)
        for stem, file in self._files(split, problems):
            same = by_stem.get(stem, [])
            unclaimed.difference_update(same)
            try:
                written, size, objects = _read_xml(file, problems)
            except ValueError as error:
                problems.append(("XML files that cannot be read (image left out)", str(error)))
                continue
            # <filename> is often stale: the files were renamed, or moved from another machine
            image = written if not same or written in same else same[0]
            annotations.append(_Annotation(file, image, size, objects))
            unclaimed.discard(image)
        if self.splits[split].suffix != ".txt":
            folder = self.images(split)
            kind = "images without an XML file (left out)"
            problems += [(kind, str(folder / image)) for image in sorted(unclaimed)]
        return _Split(annotations, problems)

    def _files(self, split: str, problems: list[tuple[str, str]]) -> list[tuple[str, Path]]:
        """Name without suffix and XML file of each image of a split."""
        path = self.splits[split]
        if path.suffix != ".txt":
            files = [file for file in sorted(path.iterdir()) if file.suffix.lower() == ".xml"]
            return [(file.stem, file) for file in files if not file.name.startswith(".")]
        found: dict[str, Path] = {}
        for at, line in enumerate(_lines(path), 1):
            name = os.path.splitext(line)[0] if is_image(os.path.basename(line)) else line
            file = self.path / "Annotations" / f"{name}.xml"
            if not name:
                continue
            if name in found:
                problems.append(("images listed twice (taken once)", f"{path}:{at}"))
            elif leaves_folder(name):
                problems.append(("names that leave the folder (left out)", f"{path}:{at}"))
            elif not file.is_file():
                problems.append(("images without an XML file (left out)", f"{path}:{at} ({file})"))
            else:
                found[name] = file
        return list(found.items())

    def _sized(
        self, split: str, annotations: list[_Annotation], report: DataReport
    ) -> list[tuple[_Annotation, tuple[int, int]]]:
        """Annotations with the size of their image, from its header where the XML gives none."""
        unsized = [a.image for a in annotations if min(a.size) < 1 and not leaves_folder(a.image)]
        sizes = dict(zip(unsized, image_sizes(self.images(split), unsized, report), strict=True))
        found = [(a, sizes.get(a.image, a.size)) for a in annotations]
        return [(annotation, size) for annotation, size in found if size is not None]


def find_voc(path: Path, *, remove_difficult: bool = False) -> VocFolder | None:
    """A Pascal VOC data set in a folder; None where there is none.

    ``test.txt`` is the validation split where there is no ``val.txt``, and then ``trainval.txt``
    the training split where there is no ``train.txt``: VOC 2007 is published so.

    Raises:
        DatasetError: the folder holds several data sets, or one without lists of its splits.
    """
    data = VocFolder(path, remove_difficult=remove_difficult)
    roots = [path, *sorted(path.glob("VOC[0-9]*")), *sorted(path.glob("VOCdevkit/VOC[0-9]*"))]
    roots = [root for root in roots if (root / "Annotations").is_dir()]
    # COCO's `annotations` is the same folder to some file systems
    roots = [root for root in roots if (root / "JPEGImages").is_dir()]
    if len(roots) > 1:
        raise DatasetError(f"{path}: holds {', '.join(map(str, roots))}; name one of them")
    if roots:
        data.path = roots[0]
        _find_lists(data)
    else:
        _find_side_by_side(data)
        if not data.splits:
            return None
    files = (data.path / name for name in ("classes.txt", "labelmap.txt"))
    data.names_from = next((file for file in files if file.is_file()), None)
    return data


def _find_lists(data: VocFolder) -> None:
    folder = data.path / "ImageSets" / "Main"
    lists = {split: folder / f"{split}.txt" for split in SPLIT_FOLDERS}
    if not lists["val"].is_file():  # else trainval.txt would hold the images of val.txt
        for split, other in (("train", "trainval.txt"), ("val", "test.txt")):
            if not lists[split].is_file() and (folder / other).is_file():
                lists[split] = folder / other
    for split, path in lists.items():
        if path.is_file():
            data.splits[split] = path
        else:
            data.missing[split] = f"{path} does not exist: it lists the images of the split"
    if not data.splits:
        raise DatasetError(f"{data.path}: Pascal VOC without its splits: {data.missing['train']}")


def _find_side_by_side(data: VocFolder) -> None:
    for split, names in SPLIT_FOLDERS.items():
        folders = [data.path / name for name in names]
        found = next((folder for folder in folders if next(folder.glob("*.xml"), None)), None)
        if found is not None:
            data.splits[split] = found
        else:
            data.missing[split] = f"{folders[0]} does not exist or holds no XML files"


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read ({error.strerror})") from error
    return [line.strip() for line in text.splitlines()]


def _read_names(file: Path) -> list[str]:
    """Class names, one a line; CVAT's ``labelmap.txt`` has ``name:color:parts:actions``."""
    lines = [line for line in _lines(file) if line and not line.startswith("#")]
    if file.name == "labelmap.txt":
        lines = [line.split(":")[0] for line in lines]
        lines = [line for line in lines if line != "background"]
    return list(dict.fromkeys(lines))


def _read_xml(
    file: Path, problems: list[tuple[str, str]]
) -> tuple[str, tuple[int, int], list[_Object]]:
    """File name of the image, width and height (0 where absent), and the objects.

    Raises:
        ValueError: no XML, XML with entities or other tricks, or no annotation of an image.
        ImportError: without defusedxml.
    """
    try:
        from defusedxml.ElementTree import fromstring
    except ImportError as error:
        raise ImportError(f'{file} needs defusedxml: pip install "detr-fast[train]"') from error
    try:
        root = fromstring(file.read_bytes())
    except (ParseError, LookupError, ValueError, OSError) as error:
        raise ValueError(f"{file} ({type(error).__name__}: {error})") from error
    if root.tag != "annotation":
        raise ValueError(f"{file} (holds <{root.tag:.80}>, not <annotation>)")
    objects = []
    for at, thing in enumerate(root.findall("object"), 1):
        name = (thing.findtext("name") or "").strip()
        corners = [_number(thing.find("bndbox"), corner) for corner in CORNERS]
        if not name or None in corners:
            problems.append(("objects without name or box (left out)", f"{file}: object {at}"))
            continue
        objects.append(_Object(name, corners, bool(_number(thing, "difficult"))))
    name = (root.findtext("filename") or "").strip() or f"{file.stem}.jpg"
    width, height = (_number(root.find("size"), key) or 0 for key in ("width", "height"))
    return name, (int(width), int(height)), objects


def _number(parent: Element | None, key: str) -> float | None:
    """A finite number in a child element; None where there is none."""
    try:
        number = float((parent.findtext(key) if parent is not None else None) or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
