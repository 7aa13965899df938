# SPDX-License-Identifier: Apache-2.0
"""Data sets in the COCO format: annotations as columns, images read on demand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.data.annotations import CocoAnnotations, DatasetError
from detr_fast.data.augmentation import size_of
from detr_fast.data.cache import ImageCache
from detr_fast.data.image_folder import image_sizes
from detr_fast.data.images import KINDS, UnusableImage, check_image, read_image
from detr_fast.data.labels import LabelMap
from detr_fast.data.sampler import Draw
from detr_fast.data.validate import DataReport, one_line

# what becomes of an unusable image
INSTEAD = {"replace": "replaced by the next one", "skip": "left out"}


class CocoDetection(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and boxes of a folder with annotations in the COCO format.

    Image ``i`` is that of the ``i``-th smallest id. Its boxes are clamped to the image; crowd
    regions and boxes without extent are left out; an image without boxes is kept.

    Args:
        image_folder: holds the images under their ``file_name``
        annotations: a JSON file in the COCO instances format, which must be without faults, or
            what `CocoAnnotations.from_dict` made of one
        transforms: maps ``(image, target)``, with the image as uint8 (Tensor[3, h, w]), which it
            leaves as it is, and boxes (Tensor[N, 4]) as corners in pixels, to what ``dataset[i]``
            returns; for ``dataset[Draw(i, seed)]`` the seed is a third argument; see
            `detr_fast.data.transforms`
        labels: the model's labels; by default those of the annotations' own categories. Categories
            are matched by name, and annotations of the others are left out.
        unusable: what to do when opening an image finds its file missing, broken or of another
            size than annotated: ``"raise"``, ``"replace"`` by the next usable image, or
            ``"skip"``: ``dataset[i]`` is None
        report: counts the annotations that ``labels`` leaves out

    Attributes:
        labels (LabelMap): the model's labels
        class_names (dict[int, str]): label to name
        num_classes (int): size of the classifier without "no object" (91 for official COCO)
        category_ids (dict[int, int]): label to category id of the annotations
        annotations (CocoAnnotations): what is left of the annotations
        cache (ImageCache | None): keeps the images that ``dataset[i]`` decodes; None at first

    Raises:
        DatasetError: the folder or file is missing or malformed, or no image or no class is left;
            from ``dataset[i]``, no image is usable, or this one is not and ``unusable`` is
            ``"raise"``.
        ImportError: without pillow.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotations: str | Path | CocoAnnotations,
        transforms: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        *,
        labels: LabelMap | None = None,
        unusable: str = "raise",
        report: DataReport | None = None,
    ):
        if find_spec("PIL") is None:
            raise ImportError('reading images needs pillow: pip install "detr-fast[train]"')
        if unusable not in ("raise", *INSTEAD):
            raise ValueError(f"unusable {unusable!r}: choose raise, {' or '.join(INSTEAD)}")
        self.image_folder, self.transforms, self.unusable = Path(image_folder), transforms, unusable
        if not self.image_folder.is_dir():
            raise DatasetError(f"{self.image_folder}: no such image folder")
        if not isinstance(annotations, CocoAnnotations):
            annotations = CocoAnnotations.read(annotations)
        if not len(annotations.image_ids):
            raise DatasetError(f"{annotations.source}: 'images' is empty, or all were left out")
        unnamed = annotations.image_ids[annotations.file_names == ""]
        if len(unnamed):
            raise DatasetError(f"{annotations.source}: image id {unnamed[0]} has no 'file_name'")
        self.labels = labels or LabelMap.from_categories(annotations.class_names)
        self.class_names, self.num_classes = self.labels.names, self.labels.num_classes
        self.annotations = self._of_known_classes(annotations, report)
        self.category_ids = self.labels.category_ids_of(annotations.class_names)
        pairs = sorted(self.labels.labels_of(annotations.class_names).items())
        self._category_of, self._label_of = np.array(pairs, dtype=np.int64).T.copy()
        # a byte per image, key of KINDS or 0, which the loader's workers and this process share
        self._faults = torch.zeros(len(self), dtype=torch.uint8).share_memory_()
        self.cache: ImageCache | None = None

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Image and target after the transforms; None for an image that is skipped.

        Args:
            index: of the image; with a `Draw` its augmentation is that of the seed

        Returns:
            The image (Tensor[3, H, W] float32, normalised, or uint8, as the transforms have it) and
            a dict with boxes (Tensor[N, 4] float32: centre, width, height as shares of the image),
            labels (int64[N]), area (float32[N], square pixels of the returned image), iscrowd
            (int64[N], all 0), image_id (int64[1]), orig_size and size (int64[2]: height, width).
        """
        index, *seed = index if isinstance(index, Draw) else (index,)
        found = self._first_usable(range(len(self))[index])
        if found is None:
            return None
        index, image = found
        return self.transforms(image, self._target(index, *size_of(image)), *seed)

    def image_sizes(self) -> np.ndarray:
        """Height and width of all images (int64[N, 2]).

        Where the annotations do not give them, they are read from the headers of the files: some
        ten seconds for 100,000 images. An image whose header cannot be read counts as 480 x 640.
        """
        sizes = self.annotations.sizes.copy()
        unknown = np.flatnonzero(self.unknown_sizes)
        if len(unknown):
            names = self.annotations.file_names[unknown].tolist()
            found = image_sizes(self.image_folder, names, DataReport(self.annotations.source))
            sizes[unknown] = [size[::-1] if size else (480, 640) for size in found]
        return sizes

    @property
    def unknown_sizes(self) -> np.ndarray:
        """Of which images the annotations do not give height and width (bool[N])."""
        unknown: np.ndarray = (self.annotations.sizes <= 0).any(axis=1)
        return unknown

    def load_image(self, index: int) -> Tensor:
        """The image as it is on disk, upright (uint8 Tensor[3, H, W], RGB)."""
        try:
            return read_image(self._path(index), self._size(index))
        except UnusableImage as error:
            raise self._error(index, error) from error

    def fault(self, index: int) -> tuple[str, str] | None:
        """What keeps image ``index`` from being used, as kind and culprit for a `DataReport`."""
        try:
            check_image(self._path(index), self._size(index))
        except UnusableImage as error:
            return KINDS[error.kind], f"{self._name(index)} {error}"
        return None

    def index_of(self, image_id: int) -> int:
        """The index of an image by its id.

        Raises:
            KeyError: no image has this id.
        """
        index = int(np.searchsorted(self.annotations.image_ids, image_id))
        if index == len(self) or self.annotations.image_ids[index] != image_id:
            raise KeyError(f"{self.annotations.source}: no image id {image_id}")
        return index

    def box_counts(self) -> dict[int, int]:
        """Label to number of boxes to learn from, crowd regions excluded; 0 where none is."""
        counts = self.annotations.box_counts()
        of_label = {label: counts[i] for label, i in self.category_ids.items()}
        return {label: of_label.get(label, 0) for label in self.class_names}

    def unusable_report(self) -> DataReport:
        """The images that opening found unusable so far, in this process and in workers."""
        report = DataReport(self.annotations.source)
        for kind, text in KINDS.items():
            indices = (self._faults == kind).nonzero()[:, 0].tolist()
            if indices:
                report.add(f"{text} ({INSTEAD[self.unusable]})", map(self._name, indices))
        return report

    @property
    def ground_truth(self) -> dict[str, Any]:
        """All boxes, crowds included, as a COCO dict for the evaluator (made at each access).

        It has the category ids of the annotations, not labels.
        """
        return self.annotations.to_dict()

    def _of_known_classes(
        self, annotations: CocoAnnotations, report: DataReport | None
    ) -> CocoAnnotations:
        known = self.labels.labels_of(annotations.class_names)
        if not known:
            names, wanted = list(annotations.class_names.values()), list(self.class_names.values())
            raise DatasetError(
                f"{annotations.source}: none of its {len(names)} classes ({_few(names)}) is one of "
                f"the {len(wanted)} that the model knows ({_few(wanted)}); classes are matched by "
                "name"
            )
        if len(known) == len(annotations.class_names):
            return annotations
        if report is not None:
            rows = np.flatnonzero(~np.isin(annotations.labels, list(known)))
            pairs = zip(annotations.labels[rows], annotations.owners[rows], strict=True)
            report.add(
                "annotations of classes that the training data does not have (left out)",
                (f"{annotations.class_names[int(k)]!r} (image {i})" for k, i in pairs),
            )
        return annotations.keep_categories(known)

    def _first_usable(self, first: int) -> tuple[int, Tensor] | None:
        for index in chain(range(first, len(self)), range(first)):
            if not self._faults[index]:
                try:
                    return index, self._read(index)
                except UnusableImage as error:
                    if self.unusable == "raise":
                        raise self._error(index, error) from error
                    self._say(index, error)
            if self.unusable == "skip":
                return None
        raise DatasetError(
            f"{self.image_folder}: none of the {len(self)} images that {self.annotations.source} "
            "lists can be used; is it the folder of these annotations?"
        )

    def _read(self, index: int) -> Tensor:
        if self.cache is None:
            return read_image(self._path(index), self._size(index))
        image = self.cache.get(index)
        if image is None:
            image = read_image(self._path(index), self._size(index))
            self.cache.put(index, image)
        return image

    def _say(self, index: int, error: UnusableImage) -> None:
        self._faults[index] = error.kind
        line = f"warning: {self._path(index)}: {self._name(index)} {error}; it is "
        sys.stderr.write(one_line(line + INSTEAD[self.unusable]) + "\n")

    def _error(self, index: int, error: UnusableImage) -> DatasetError:
        return DatasetError(
            f"{self._path(index)}: image id {self.annotations.image_ids[index]} {error}; restore "
            f"the file or take the image out of {self.annotations.source}"
        )

    def _path(self, index: int) -> Path:
        return self.image_folder / str(self.annotations.file_names[index])

    def _size(self, index: int) -> list[int]:
        return self.annotations.sizes[index].tolist()

    def _name(self, index: int) -> str:
        table = self.annotations
        return f"image {table.image_ids[index]} ({table.file_names[index]})"

    def _target(self, index: int, height: int, width: int) -> dict[str, Tensor]:
        table = self.annotations
        rows = np.arange(*table.starts[index : index + 2])
        rows = rows[table.crowds[rows] == 0]
        boxes = table.boxes[rows].astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        rows = rows[keep]
        of_class = np.searchsorted(self._category_of, table.labels[rows])
        size = torch.tensor([height, width])
        return {
            "boxes": torch.from_numpy(boxes[keep]),
            "labels": torch.from_numpy(self._label_of[of_class]),
            "image_id": torch.from_numpy(table.image_ids[index : index + 1].copy()),
            "area": torch.from_numpy(table.areas[rows].astype(np.float32)),
            "iscrowd": torch.from_numpy(table.crowds[rows]),
            "orig_size": size,
            "size": size.clone(),
        }


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
