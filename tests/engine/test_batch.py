# SPDX-License-Identifier: Apache-2.0
"""Targets are checked before they travel."""

import pytest
import torch

from detr_fast.criterion import SetCriterion
from detr_fast.data.batch import ImageBatch
from detr_fast.engine.batch import DeviceBatches

TARGETS = [
    {"labels": torch.tensor([0, 3]), "boxes": torch.rand(2, 4)},
    {"labels": torch.tensor([4]), "boxes": torch.rand(1, 4)},
]


def criterion_of(classes):
    return SetCriterion(classes, torch.nn.Identity(), {}, 0.1, [])


def first_of(targets, classes):
    images = ImageBatch(torch.zeros(len(targets), 3, 32, 32), None)
    seen = {"orig_size": torch.tensor([32, 32]), "image_id": torch.tensor(7)}
    loader = [(images, [target | seen for target in targets])]
    batches = DeviceBatches(loader, criterion_of(classes), torch.device("cpu"))
    return next(iter(batches)).targets


@pytest.mark.parametrize(("label", "image"), [(5, 1), (-1, 0)])
def test_a_label_out_of_range_is_named(label, image):
    targets = [{**target, "labels": target["labels"].clone()} for target in TARGETS]
    targets[image]["labels"][-1] = label
    with pytest.raises(ValueError, match=rf"image {image}: label {label} is outside of \[0, 5\)"):
        first_of(targets, 5)


def test_images_without_boxes_pass():
    empty = [{"labels": torch.tensor([]), "boxes": torch.tensor([])}]
    assert first_of(empty, 1).count_host == (0,)
