# SPDX-License-Identifier: Apache-2.0
"""Recognises how a data set is laid out on disk, and gives each split in the COCO format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from detr_fast.data.annotations import DatasetError, read_json
from detr_fast.data.image_folder import SPLIT_FOLDERS
from detr_fast.data.validate import DataReport
from detr_fast.data.voc import VocFolder, find_voc
from detr_fast.data.yolo import YoloFolder, find_yolo

YEARS = ("2017", "2014", "")
ROBOFLOW_FILE = "_annotations.coco.json"
LISTED = 8  # entries of a folder that a message names
LOOKED_FOR = (
    "annotations/instances_{train,val}2017.json with train2017/ and val2017/ (COCO), "
    f"train/{ROBOFLOW_FILE} (Roboflow), data.yaml or images/train/ with labels/train/ (YOLO), "
    "Annotations/ with ImageSets/Main/ or train/*.xml (Pascal VOC)"
)
REMEDY = "name the files with --train_images, --train_annotations, --val_images, --val_annotations"


class Source(NamedTuple):
    """One split of a data set.

    Attributes:
        images (Path): the folder that file names are relative to
        annotations (Path): the file or folder that messages name
        read (Callable[[DataReport], dict]): gives the content in the COCO format; what is left
            out goes into the report. Raises `DatasetError` where nothing can be used.
    """

    images: Path
    annotations: Path
    read: Callable[[DataReport], dict[str, Any]]


class Layout(NamedTuple):
    """A data set that was recognised.

    Attributes:
        name (str): "COCO", "Roboflow COCO", "YOLO" or "Pascal VOC"
        sources (dict[str, Source]): "train" and "val", as far as they are there
        said (str): what was recognised and how it is read, a line for the log
        missing (dict[str, str]): for each other split, what was not found
    """

    name: str
    sources: dict[str, Source]
    said: str
    missing: dict[str, str]

    def source(self, split: str) -> Source:
        """The split ``"train"`` or ``"val"``.

        Raises:
            DatasetError: it is not there; names the missing path.
        """
        if split not in self.sources:
            raise DatasetError(self.missing[split])
        return self.sources[split]


def find_layout(path: str | Path, *, remove_difficult: bool = False) -> Layout:
    """Recognise a data set: COCO, Roboflow's COCO export, YOLO or Pascal VOC, in this order.

    Only folders are listed and a yaml file is read; `Source.read` reads the annotations.

    Args:
        path: a folder, or the yaml file of a YOLO data set
        remove_difficult: leave out objects that Pascal VOC marks as difficult

    Raises:
        DatasetError: nothing is recognised, or a yaml file is malformed.
        ImportError: without PyYAML, where there is a yaml file.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"{path} does not exist: name the folder of a data set, or {REMEDY}")
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise DatasetError(
                f"{path}: neither a folder nor a YOLO yaml file; name the folder, or {REMEDY}"
            )
        return _find_yolo(path)
    incomplete = None
    find_voc_here = partial(_find_voc, remove_difficult=remove_difficult)
    for find in (_find_official, _find_roboflow, _find_yolo, find_voc_here):
        layout = find(path)
        if layout is not None and layout.sources:
            return layout
        incomplete = incomplete or layout
    if incomplete is not None:
        return incomplete
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    entries = [entry.name + "/" * entry.is_dir() for entry in entries]
    held = ", ".join(entries[:LISTED]) + ", ..." * (len(entries) > LISTED)
    raise DatasetError(
        f"{path}: no data set recognised; looked for {LOOKED_FOR}; the folder "
        f"{f'holds {held}' if entries else 'is empty'}; {REMEDY}"
    )


def _find_official(path: Path) -> Layout | None:
    """The layout of COCO; for 2017 and 2014 also where only a part is there."""

    def pieces(year: str) -> dict[str, tuple[Path, Path]]:
        return {split: _official_pieces(path, split, year) for split in SPLIT_FOLDERS}

    def completeness(year: str) -> tuple[int, int]:
        found = [(images.is_dir(), file.is_file()) for images, file in pieces(year).values()]
        # a folder `train` alone says nothing: it may belong to any layout
        telling = [file or (images and year != "") for images, file in found]
        return sum(map(all, found)), sum(telling)

    year = max(YEARS, key=completeness)
    if completeness(year) == (0, 0):
        return None
    sources, missing = {}, {}
    for split, (images, file) in pieces(year).items():
        absent = [str(images)] * (not images.is_dir()) + [str(file)] * (not file.is_file())
        if absent:
            missing[split] = (
                f"{' and '.join(absent)} {'do' if absent[1:] else 'does'} not exist: --coco_path "
                f"must hold train{year}/, val{year}/ and "
                f"annotations/instances_{{train,val}}{year}.json"
            )
        else:
            sources[split] = Source(images, file, partial(_read_coco, file))
    said = f"data: COCO (annotations/instances_*{year}.json), boxes in pixels"
    return Layout("COCO", sources, said, missing)


def _official_pieces(path: Path, split: str, year: str) -> tuple[Path, Path]:
    folders = path / f"{split}{year}", path / "images" / f"{split}{year}"
    images = next((folder for folder in folders if folder.is_dir()), folders[0])
    return images, path / "annotations" / f"instances_{split}{year}.json"


def _find_roboflow(path: Path) -> Layout | None:
    sources, missing = {}, {}
    for split, names in SPLIT_FOLDERS.items():
        files = [path / name / ROBOFLOW_FILE for name in names]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            missing[split] = f"{files[0]} does not exist: the split of a Roboflow COCO export"
        else:
            sources[split] = Source(file.parent, file, partial(_read_coco, file))
    if not sources:
        return None
    folders = ", ".join(source.images.name for source in sources.values())
    said = f"data: Roboflow COCO ({folders}, each with {ROBOFLOW_FILE}), boxes in pixels"
    return Layout("Roboflow COCO", sources, said, missing)


def _read_coco(file: Path, report: DataReport) -> dict[str, Any]:
    """The content of a JSON file as it is: `CocoAnnotations.from_dict` reports."""
    return read_json(file)


def _find_yolo(path: Path) -> Layout | None:
    return _of_reader("YOLO", find_yolo(path))


def _find_voc(path: Path, remove_difficult: bool) -> Layout | None:
    return _of_reader("Pascal VOC", find_voc(path, remove_difficult=remove_difficult))


def _of_reader(name: str, data: YoloFolder | VocFolder | None) -> Layout | None:
    if data is None:
        return None
    sources = {
        split: Source(data.images(split), data.annotations(split), partial(data.read, split))
        for split in data.splits
    }
    return Layout(name, sources, data.said, data.missing)
