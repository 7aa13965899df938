# SPDX-License-Identifier: Apache-2.0
"""Data sets in the COCO format: annotations as columns, images read on demand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.data.transforms import eval_transforms, train_transforms

if TYPE_CHECKING:
    from PIL.Image import Image

LAYOUT = "--coco_path must hold train2017/, val2017/ and annotations/instances_{train,val}2017.json"


class DatasetError(ValueError):
    """A data set on disk is incomplete or malformed; the message names the file and the remedy."""


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
        path = Path(path)
        try:
            with path.open(encoding="utf-8") as file:
                content = json.load(file)
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise DatasetError(f"{path}: no valid JSON ({error}); is the copy complete?") from error
        return cls.from_dict(content, str(path))

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "annotations") -> CocoAnnotations:
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


class CocoDetection(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and boxes of a folder with a COCO annotation file.

    Image ``i`` is that of the ``i``-th smallest id. Its boxes are clamped to the image; crowd
    regions and boxes without extent are left out; an image without boxes is kept. Labels are the
    raw category ids, as DETR's published weights have them.

    Args:
        image_folder: holds the images under their ``file_name``
        annotation_file: JSON in the COCO instances format
        transforms: maps ``(PIL image, target)``, with boxes (Tensor[N, 4]) as corners in pixels,
            to what ``dataset[i]`` returns; see `detr_fast.data.transforms`

    Attributes:
        class_names (dict[int, str]): label to name
        num_classes (int): highest label + 1 (91 for COCO)
        annotations (CocoAnnotations): the file's content

    Raises:
        DatasetError: the folder or file is missing or malformed; from ``dataset[i]``, an image
            is missing or unreadable.
        ImportError: without pillow.
    """

    def __init__(
        self,
        image_folder: str | Path,
        annotation_file: str | Path,
        transforms: Callable[[Image, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]],
    ):
        if find_spec("PIL") is None:
            raise ImportError('reading images needs pillow: pip install "detr-fast[train]"')
        self.image_folder, self.annotation_file = Path(image_folder), Path(annotation_file)
        self.transforms = transforms
        if not self.image_folder.is_dir():
            raise DatasetError(f"{self.image_folder}: no such image folder")
        self.annotations = CocoAnnotations.read(annotation_file)
        if not len(self):
            raise DatasetError(f"{annotation_file}: 'images' is empty")
        unnamed = self.annotations.image_ids[self.annotations.file_names == ""]
        if len(unnamed):
            raise DatasetError(f"{annotation_file}: image id {unnamed[0]} has no 'file_name'")
        self.class_names = self.annotations.class_names
        self.num_classes = max(self.class_names) + 1

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image and target after the transforms.

        Returns:
            The image (Tensor[3, H, W] float32, normalised) and a dict with boxes (Tensor[N, 4]
            float32: centre, width, height as shares of the image), labels (int64[N]), area
            (float32[N], square pixels of the returned image), iscrowd (int64[N], all 0),
            image_id (int64[1]), orig_size and size (int64[2]: height, width).
        """
        image = self._open(index)
        return self.transforms(image, self._target(index, image.width, image.height))

    def load_image(self, index: int) -> Tensor:
        """The image as it is on disk (uint8 Tensor[3, H, W], RGB)."""
        return torch.from_numpy(np.array(self._open(index))).permute(2, 0, 1).contiguous()

    @property
    def ground_truth(self) -> dict[str, Any]:
        """All boxes, crowds included, as a COCO dict for the evaluator (made at each access)."""
        return self.annotations.to_dict()

    def _open(self, index: int) -> Image:
        from PIL.Image import DecompressionBombError, open

        path = self.image_folder / str(self.annotations.file_names[index])
        try:
            with open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
            found = "is missing" if not path.exists() else f"cannot be decoded ({error})"
            raise DatasetError(
                f"{path}: image id {self.annotations.image_ids[index]} {found}; restore the file "
                f"or take the image out of {self.annotation_file}"
            ) from error

    def _target(self, index: int, width: int, height: int) -> dict[str, Tensor]:
        table = self.annotations
        rows = np.arange(*table.starts[index : index + 2])
        rows = rows[table.crowds[rows] == 0]
        boxes = table.boxes[rows].astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        rows = rows[keep]
        size = torch.tensor([height, width])
        return {
            "boxes": torch.from_numpy(boxes[keep]),
            "labels": torch.from_numpy(table.labels[rows]),
            "image_id": torch.from_numpy(table.image_ids[index : index + 1].copy()),
            "area": torch.from_numpy(table.areas[rows].astype(np.float32)),
            "iscrowd": torch.from_numpy(table.crowds[rows]),
            "orig_size": size,
            "size": size.clone(),
        }


def build_coco(image_set: str, coco_path: str | Path) -> CocoDetection:
    """COCO 2017 in its official layout, with DETR's augmentation or evaluation resize.

    Args:
        image_set: ``"train"`` or ``"val"``
        coco_path: folder with ``train2017/``, ``val2017/`` and ``annotations/``

    Raises:
        DatasetError: part of the layout is missing, or a file is malformed.
    """
    transforms = {"train": train_transforms, "val": eval_transforms}
    if image_set not in transforms:
        raise ValueError(f"image_set {image_set!r}: choose train or val")
    images = Path(coco_path) / f"{image_set}2017"
    annotations = Path(coco_path) / "annotations" / f"instances_{image_set}2017.json"
    for path in (images, annotations):
        if not path.exists():
            raise DatasetError(f"{path} does not exist: {LAYOUT}")
    return CocoDetection(images, annotations, transforms[image_set]())
