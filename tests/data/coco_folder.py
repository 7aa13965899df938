# SPDX-License-Identifier: Apache-2.0
"""A folder with three images and their annotations."""

import copy
import json

import numpy as np
from PIL import Image

from detr_fast.data.coco import CocoDetection
from detr_fast.data.transforms import eval_transforms

CONTENT = {
    "info": {"year": 2024},
    "images": [
        {"id": 9, "file_name": "nine.png", "height": 20, "width": 30},
        {"id": 2, "file_name": "two.png", "height": 10, "width": 10},
        {"id": 5, "file_name": "five.png", "height": 8, "width": 16},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}],
    "annotations": [
        {
            "id": 40,
            "image_id": 9,
            "category_id": 17,
            "bbox": [1, 2, 3, 4],
            "area": 7.5,
            "iscrowd": 0,
        },
        {
            "id": 41,
            "image_id": 2,
            "category_id": 3,
            "bbox": [-2, 4, 30, 3],
            "area": 90,
            "iscrowd": 0,
        },
        {
            "id": 42,
            "image_id": 9,
            "category_id": 3,
            "bbox": [0, 0, 20, 20],
            "area": 1,
            "iscrowd": 1,
        },
        {"id": 43, "image_id": 9, "category_id": 3, "bbox": [5, 5, 0, 4], "area": 0, "iscrowd": 0},
        {
            "id": 44,
            "image_id": 9,
            "category_id": 3,
            "bbox": [30, 5, 4, 4],
            "area": 16,
            "iscrowd": 0,
        },
        {"id": 45, "image_id": 9, "category_id": 3, "bbox": [0.5, 0, 29.5, 20]},
        {"id": 46, "image_id": 77, "category_id": 3, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0},
    ],
}


def as_read(image, target):
    return image.permute(1, 2, 0), target


def edited(edit):
    content = copy.deepcopy(CONTENT)
    edit(content)
    return content


def write_folder(folder):
    """The images of CONTENT, each filled with its id, and boxes.json."""
    for entry in CONTENT["images"]:
        pixels = np.full((entry["height"], entry["width"], 3), entry["id"], dtype=np.uint8)
        Image.fromarray(pixels).save(folder / entry["file_name"])
    (folder / "boxes.json").write_text(json.dumps(CONTENT))
    return folder


def official(root, split):
    """A split of a folder in COCO's own layout, as it is evaluated."""
    annotations = root / f"annotations/instances_{split}2017.json"
    return CocoDetection(root / f"{split}2017", annotations, eval_transforms())
