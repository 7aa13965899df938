# SPDX-License-Identifier: Apache-2.0
"""Three images whose errors can be counted by hand."""

import torch

from detr_fast.data.coco import CocoAnnotations
from detr_fast.evaluation import CocoEvaluator

CATEGORIES = {3: "cat", 7: "dog", 9: "<b>bird</b>"}


def box(number, image_id, category_id, corner, crowd=0, side=20):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [corner, corner, side, side],
        "area": side * side,
        "iscrowd": crowd,
    }


TRUTH = {
    "images": [{"id": i, "file_name": f"{i}.png", "height": 100, "width": 100} for i in (1, 2, 3)],
    "annotations": [
        box(1, 1, 3, 0),
        box(2, 1, 7, 50),
        box(3, 2, 3, 0),
        box(4, 2, 7, 50, crowd=1, side=50),
        box(5, 3, 7, 0),
    ],
    "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
}
FOUND = {  # image id -> corner, category, score
    1: [
        (0, 3, 0.9),  # right
        (50, 3, 0.8),  # a dog taken for a cat
        (50, 7, 0.6),  # the dog, which the box above it has taken in the confusion matrix
        (5, 3, 0.3),  # below the threshold
    ],
    2: [
        (60, 7, 0.7),  # in a crowd of dogs: neither right nor false
        (30, 9, 0.55),  # nothing is there
        (1, 3, 0.2),  # the cat, but below the threshold
    ],
    3: [(0, 7, 0.95)],  # right
}


def truth():
    return CocoAnnotations.from_dict(TRUTH)


def result(found=FOUND):
    scores = CocoEvaluator(TRUTH)
    scores.update(
        {
            image_id: {
                "boxes": torch.tensor([[c, c, c + 20, c + 20] for c, _, _ in rows]).view(-1, 4),
                "labels": torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
                "scores": torch.tensor([score for _, _, score in rows], dtype=torch.float32),
            }
            for image_id, rows in found.items()
        }
    )
    return scores.summarize()
