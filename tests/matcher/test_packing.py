# SPDX-License-Identifier: Apache-2.0
"""Target dicts to padded tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from detr_fast.matcher.packing import Targets, pack_targets


def target(labels, boxes):
    return {"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}


BOX = [0.5, 0.25, 0.125, 1.0]


def test_pads_with_zeros():
    labels, boxes, counts = pack_targets([target([3], [BOX]), target([1, 2], [BOX, BOX])])
    assert_close(labels, torch.tensor([[3, 0], [1, 2]]))
    assert_close(boxes, torch.tensor([[BOX, [0.0] * 4], [BOX, BOX]]))
    assert counts == [1, 2]


def test_takes_no_images_and_no_boxes():
    labels, boxes, counts = pack_targets([])
    assert (labels.shape, boxes.shape, counts) == ((0, 0), (0, 0, 4), [])
    labels, boxes, counts = pack_targets([target([], [])] * 2)
    assert (labels.shape, boxes.shape, counts) == ((2, 0), (2, 0, 4), [0, 0])
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_an_empty_integer_image_does_not_round_the_boxes_of_the_others(given, expected):
    empty = {"labels": torch.zeros(0, dtype=torch.int32), "boxes": torch.zeros(0, 4).long()}
    full = {"labels": torch.tensor([1], dtype=torch.int32), "boxes": torch.tensor([BOX])}
    full["boxes"] = full["boxes"].to(given)
    labels, boxes, _ = pack_targets([empty, full])
    assert labels.dtype == torch.int64
    assert_close(boxes[1], torch.tensor([BOX], dtype=expected))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_count(default):
    targets = [target([3], [BOX]), target([1, 2], [BOX, BOX])]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        within = Targets.from_list(targets), pack_targets([])
    finally:
        torch.set_default_dtype(before)
    for boxes in (within[0].boxes, within[1][1], Targets.from_list(targets).boxes):
        assert boxes.dtype == torch.float32


def test_nothing_is_kept_from_within_a_fake_mode():
    """As torch.export has it."""
    targets = [target([3], [BOX]), target([1, 2], [BOX, BOX])]
    with FakeTensorMode() as mode:
        Targets.from_list(
            [{key: mode.from_tensor(t) for key, t in image.items()} for image in targets]
        )
    assert type(Targets.from_list(targets).labels) is torch.Tensor


def test_labels_follow_the_boxes():
    targets = [target([3], [BOX]), target([1, 2], [BOX, BOX])]
    for image in targets:
        image["boxes"] = image["boxes"].to("meta")
    packed = Targets.from_list(targets)
    assert packed.labels.device == packed.boxes.device == torch.device("meta")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"boxes": torch.zeros(1, 4)}, r"targets\[1\] has no 'labels'; it holds boxes"),
        ({"labels": torch.zeros(1).long()}, r"targets\[1\] has no 'boxes'; it holds labels"),
        (target([1.0], [BOX]), r"targets\[1\]\['labels'\]: .* torch.float32 of shape \(1,\)"),
        (target([[1]], [BOX]), r"targets\[1\]\['labels'\]: .* of shape \(1, 1\)"),
        (target([True], [BOX]), r"targets\[1\]\['labels'\]: .* torch.bool"),
        (target([1], BOX), r"targets\[1\]\['boxes'\]: .* of shape \(4,\)"),
        (target([1], [[*BOX, 1.0]]), r"targets\[1\]\['boxes'\]: .* of shape \(1, 5\)"),
        (target([1], [[1, 2, 3, 4]]), r"targets\[1\]\['boxes'\]: .* torch.int64"),
        (target([1, 2], [BOX]), r"targets\[1\] has 2 labels for 1 boxes"),
        (target([], [BOX]), r"targets\[1\]\['labels'\]: .* torch.float32 of shape \(0,\)"),
    ],
    ids=[
        "no labels",
        "no boxes",
        "float labels",
        "2-d labels",
        "bool labels",
        "flat box",
        "five numbers",
        "integer boxes",
        "lengths",
        "empty labels",
    ],
)
def test_names_image_and_key(bad, message):
    with pytest.raises(ValueError, match=message):
        pack_targets([target([3], [BOX]), bad])
