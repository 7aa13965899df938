# SPDX-License-Identifier: Apache-2.0
"""Data sets in the COCO format: annotations as columns, images read on demand."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.data.annotations import CocoAnnotations, DatasetError
from detr_fast.data.transforms import eval_transforms, train_transforms

if TYPE_CHECKING:
    from PIL.Image import Image

LAYOUT = "--coco_path must hold train2017/, val2017/ and annotations/instances_{train,val}2017.json"


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
