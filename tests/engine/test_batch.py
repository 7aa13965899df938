# SPDX-License-Identifier: Apache-2.0
"""Targets are checked and page-locked before they travel."""

import pytest
import torch

from detr_fast.criterion import SetCriterion
from detr_fast.engine.batch import packed_targets
from detr_fast.matcher.packing import Targets

TARGETS = [
    {"labels": torch.tensor([0, 3]), "boxes": torch.rand(2, 4)},
    {"labels": torch.tensor([4]), "boxes": torch.rand(1, 4)},
]


def criterion_of(classes):
    return SetCriterion(classes, torch.nn.Identity(), {}, 0.1, [])


def test_only_what_goes_to_a_gpu_is_page_locked(monkeypatch):
    pinned = []
    monkeypatch.setattr(Targets, "pin_memory", lambda self: pinned.append(self) or self)
    packed_targets(TARGETS, criterion_of(5), torch.device("cpu"))
    assert not pinned
    packed = packed_targets(TARGETS, criterion_of(5), torch.device("cuda"))
    assert pinned == [packed]
    assert packed.count_host == (2, 1)


@pytest.mark.parametrize(("label", "image"), [(5, 1), (-1, 0)])
def test_a_label_out_of_range_is_named(label, image):
    targets = [{**target, "labels": target["labels"].clone()} for target in TARGETS]
    targets[image]["labels"][-1] = label
    with pytest.raises(ValueError, match=rf"image {image}: label {label} is outside of \[0, 5\)"):
        packed_targets(targets, criterion_of(5), torch.device("cpu"))


def test_images_without_boxes_pass():
    empty = [{"labels": torch.tensor([]), "boxes": torch.tensor([])}]
    assert packed_targets(empty, criterion_of(1), torch.device("cpu")).count_host == (0,)
