# SPDX-License-Identifier: Apache-2.0
"""What a prediction leaves: pictures, COCO's results format, CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.predict.detections import Detections
from detr_fast.predict.detector import Prediction
from detr_fast.visualize.canvas import class_color

COLUMNS = ("image", "label", "name", "score", "x0", "y0", "x1", "y1")
READABLE, MOST_TIMES = 400, 8  # short side in pixels below which a picture is enlarged
QUALITY = 92  # of JPEG
GLOW = 0.65  # share of an attention map's colour where attention is highest


class Pictures:
    """Writes each image with its boxes, and its attention maps where there are any.

    Args:
        folder (Path): where to.
        ending (str): ``"jpg"`` or ``"png"``.
    """

    def __init__(self, folder: Path, ending: str = "jpg") -> None:
        self.folder, self.ending = folder, ending
        self._taken: set[str] = set()

    def write(self, prediction: Prediction) -> None:
        """Draw one image; of equal names the later ones get a number."""
        name = number = prediction.source.file
        count = 1
        while str(number).lower() in self._taken:
            count += 1
            number = f"{name}_{count}"
        self._taken.add(str(number).lower())
        image, found = enlarged(prediction.image, prediction.detections)
        self._save(boxes_on(image, found), number)
        for place, weights in enumerate(found.data.get("attention", ())):
            picture = boxes_on(glowing(image, weights), _one(found, place))
            self._save(picture, f"{number}_attention{place}")

    def _save(self, image: Tensor, name: str) -> None:
        from PIL import Image

        path = self.folder / f"{name}.{self.ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path, quality=QUALITY)


def _one(found: Detections, place: int) -> Detections:
    some = slice(place, place + 1)
    data = {"class_name": found.data["class_name"][some]}
    return Detections(
        found.xyxy[some], found.confidence[some], found.class_id[some], data, found.size
    )


def enlarged(image: Tensor, found: Detections) -> tuple[Tensor, Detections]:
    """A small image, and its boxes, as many times as large as names can be read on it."""
    height, width = image.shape[-2:]
    times = min(max(READABLE // min(height, width), 1), MOST_TIMES)
    if times == 1:
        return image, found
    image = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
    size = (times * height, times * width)
    return image, replace(found, xyxy=found.xyxy * times, size=size)


def boxes_on(image: Tensor, found: Detections) -> Tensor:
    """An image with the boxes, names and scores of its objects, as large as it is.

    Args:
        image (Tensor[3, H, W]): uint8.
        found (Detections): best first; the best ones are drawn on top.

    Returns:
        Tensor[3, H, W]: uint8.
    """
    from matplotlib import font_manager
    from torchvision.utils import draw_bounding_boxes

    if not len(found):
        return image
    height, width = image.shape[-2:]
    line = max(1, round(min(height, width) / 250))
    limit = torch.tensor([width, height, width, height])
    boxes = torch.from_numpy(found.xyxy).flip(0).clamp(min=0).minimum(limit)
    rows = [*zip(found.data["class_name"], found.confidence, found.class_id, strict=True)][::-1]
    colors = [tuple(round(255 * c) for c in class_color(int(label))) for *_, label in rows]
    return draw_bounding_boxes(
        image,
        boxes,
        labels=[f"{name} {score:.2f}" for name, score, _ in rows],
        colors=colors,
        width=line,
        font=font_manager.findfont("DejaVu Sans"),
        font_size=max(9, round(min(height, width) / 32)),
        fill_labels=True,
    )


def glowing(image: Tensor, weights: np.ndarray) -> Tensor:
    """An image that is red where a query looked, and pale elsewhere.

    Args:
        image (Tensor[3, H, W]): uint8.
        weights (ndarray[h, w]): attention of the cells.
    """
    size = (image.shape[-2], image.shape[-1])
    heat = torch.from_numpy(weights)[None, None] / max(float(weights.max()), 1e-12)
    heat = GLOW * F.interpolate(heat, size, mode="bilinear", align_corners=False)[0]
    pale = image.float().mean(0, keepdim=True).expand(3, -1, -1) * 0.8 + 25
    red = torch.tensor([255.0, 40.0, 0.0])[:, None, None]
    return (pale * (1 - heat) + red * heat).round().clamp(0, 255).to(torch.uint8)


class CocoResults:
    """Collects detections in COCO's results format; see `Detections.to_coco`.

    Args:
        image_ids (dict[str, int], optional): file name -> image id; default: the number that is
            the file's name, as COCO's are, else the place of the image.
        category_ids (dict[int, int], optional): label -> category id.
    """

    def __init__(
        self, image_ids: Mapping[str, int] | None, category_ids: Mapping[int, int] | None
    ) -> None:
        self._image_ids, self._category_ids = image_ids, category_ids
        self._entries: list[tuple[str, Detections]] = []

    def add(self, prediction: Prediction) -> None:
        """Take the objects of one image."""
        found = prediction.detections
        without_maps = Detections(found.xyxy, found.confidence, found.class_id, size=found.size)
        self._entries.append((prediction.source.name, without_maps))

    def write(self, path: Path) -> None:
        """Write the file."""
        ids = self._ids()
        results: list[dict[str, Any]] = []
        for (name, found), image_id in zip(self._entries, ids, strict=True):
            if image_id is not None:
                entries = found.to_coco(image_id, self._category_ids)
                results += [entry | {"file_name": Path(name).name} for entry in entries]
        path.write_text(json.dumps(results), encoding="utf-8")

    def _ids(self) -> list[int | None]:
        names = [Path(name) for name, _ in self._entries]
        if self._image_ids is not None:
            return [self._image_ids.get(name.name) for name in names]
        stems = [name.stem for name in names]
        if all(stem.isascii() and stem.isdigit() for stem in stems):
            numbers = [int(stem) for stem in stems]
            if len(set(numbers)) == len(numbers):
                return list(numbers)
        return list(range(len(names)))


class CsvTable:
    """Writes a line per object.

    Args:
        path (Path): of the file; is made at once, and grows.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)

    def write(self, found: Detections) -> None:
        """Add the objects of one image."""
        for entry in found.to_dicts():
            corners = [f"{x:.2f}" for x in entry["box"]]
            score = f"{entry['score']:.4f}"
            self._writer.writerow([found.source, entry["label"], entry["name"], score, *corners])

    def close(self) -> None:
        """Write what is left."""
        self._file.close()
