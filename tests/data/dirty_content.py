# SPDX-License-Identifier: Apache-2.0
"""A small content in the COCO format, and ways to spoil it."""

import copy

from detr_fast.data.annotations import CocoAnnotations
from detr_fast.data.validate import DataReport

CONTENT = {
    "images": [
        {"id": 2, "file_name": "2.png", "height": 10, "width": 20},
        {"id": 5, "file_name": "5.png", "height": 30, "width": 30},
        {"id": 7, "file_name": "7.png"},
    ],
    "categories": [{"id": 0, "name": "cat"}, {"id": 9, "name": "dog"}],
    "annotations": [
        {"id": 21, "image_id": 5, "category_id": 0, "bbox": [1, 2, 3, 4]},
        {"id": 22, "image_id": 2, "category_id": 9, "bbox": [0, 0, 20, 10], "area": 150},
        {"id": 23, "image_id": 7, "category_id": 9, "bbox": [500, 0, 2, 2], "iscrowd": 1},
        {"id": 24, "image_id": 2, "category_id": 0, "bbox": [5, 5, 5, 5]},
    ],
}
BOXES = {a["id"]: a["bbox"] for a in CONTENT["annotations"]}
NAN, HUGE = float("nan"), 10**400


def read(edit):
    content = copy.deepcopy(CONTENT)
    edit(content)
    report = DataReport("boxes.json")
    return CocoAnnotations.from_dict(content, "boxes.json", report), report


def image(at, **values):
    return lambda c: c["images"][at].update(values)


def box(at, **values):
    return lambda c: c["annotations"][at].update(values)


def category(at, **values):
    return lambda c: c["categories"][at].update(values)


def more(key, **values):
    return lambda c: c[key].append(values)


def kept_ids(annotations):
    """Ids in CONTENT of the annotations that are left, told by their boxes."""
    boxes = annotations.boxes.tolist()
    return sorted(i for i, written in BOXES.items() if written in boxes)
