# SPDX-License-Identifier: Apache-2.0
"""Padding, collation and packed targets."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from detr_fast.data import ImageBatch, Targets, collate, pad_images
from tests.matcher.published import random_batch


def test_pad_images_fills_right_and_bottom_with_zeros():
    images = [torch.full((3, 2, 4), 1.0), torch.full((3, 3, 1), 2.0)]
    batch = pad_images(images)
    assert batch.tensors.shape == (2, 3, 3, 4)
    assert batch.mask.dtype == torch.bool
    real = [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], [[1, 0, 0, 0]] * 3
    assert_close(~batch.mask, torch.tensor(real).bool())
    assert batch.sizes.dtype == torch.int32
    assert batch.sizes.tolist() == [[2, 4], [3, 1]]
    for image, padded, mask in zip(images, batch.tensors, batch.mask, strict=True):
        assert_close(padded[:, ~mask], image.flatten(1))
        assert not padded[:, mask].any()


def test_images_of_one_size_have_no_padding():
    images = [torch.ones(3, 2, 4), torch.zeros(3, 2, 4)]
    batch = pad_images(images)
    assert batch.sizes is None
    assert_close(batch.tensors, torch.stack(images))
    assert batch.mask.shape == (2, 2, 4)
    assert not batch.mask.any()
    assert batch.to("meta").sizes is None


def test_pad_images_keeps_the_dtype():
    assert pad_images([torch.ones(3, 2, 2, dtype=torch.uint8)]).tensors.dtype == torch.uint8


@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_sizes_are_rounded_up_and_stated(multiple):
    images = [torch.full((3, 2, 5), 7, dtype=torch.uint8), torch.full((3, 4, 3), 9).byte()]
    batch = pad_images(images, multiple)
    height, width = (-(-side // multiple) * multiple for side in (4, 5))
    assert batch.tensors.shape == (2, 3, height, width)
    assert batch.tensors.dtype == torch.uint8
    assert batch.sizes.tolist() == [[2, 5], [4, 3]]
    plain = pad_images(images).tensors
    assert torch.equal(batch.tensors[:, :, :4, :5], plain)
    assert int(batch.tensors.sum()) == int(plain.sum())
    # also where no image has any padding
    assert pad_images([torch.ones(3, 4, 4)], 4).sizes.tolist() == [[4, 4]]


def test_channels_that_lie_together_stay_so():
    """As decoders give them: no transposition on the way to the device."""
    images = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in ((4, 6), (5, 3))]
    together = pad_images([image.permute(2, 0, 1) for image in images], 8)
    assert together.tensors.is_contiguous(memory_format=torch.channels_last)
    planes = pad_images([image.permute(2, 0, 1).contiguous() for image in images], 8)
    assert planes.tensors.is_contiguous()
    assert torch.equal(together.tensors, planes.tensors)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_worker_writes_into_the_memory_that_is_sent(layout):
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    samples = [(image[:, : 5 - i], {}) for i, image in enumerate(images.to(memory_format=layout))]
    shared = []

    def watched(batch):
        result = collate(batch, 4)
        shared.append(result[0].tensors.is_shared())
        return *result, torch.tensor(shared[-1])

    loader = DataLoader(samples, batch_size=4, collate_fn=watched, num_workers=1)
    ((batch, _, in_place),) = loader
    assert bool(in_place)
    assert torch.equal(batch.tensors, collate(samples, 4)[0].tensors)
    assert not collate(samples, 4)[0].tensors.is_shared()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        ([torch.ones(3, 2, 2), torch.ones(2, 2)], r"images\[1\]: .* got \(2, 2\)"),
        ([torch.ones(3, 2, 2), torch.ones(1, 2, 2)], r"images\[1\] has 1 channels"),
        ([torch.ones(3, 2, 2), torch.ones(3, 2, 2).int()], r"images\[1\] .* torch.int32"),
    ],
    ids=["none", "dims", "channels", "dtype"],
)
def test_pad_images_names_the_image(images, message):
    with pytest.raises(ValueError, match=message):
        pad_images(images)


def test_image_batch_moves_as_one():
    moved = pad_images([torch.ones(3, 2, 2), torch.ones(3, 1, 2)]).to("meta")
    assert isinstance(moved, ImageBatch)
    assert moved.tensors.is_meta
    assert moved.sizes.is_meta
    assert moved.mask.is_meta


def test_collate_serves_a_data_loader():
    samples = [
        (torch.full((3, 2 + i, 4), float(i)), {"image_id": torch.tensor([i])}) for i in (0, 1)
    ]
    ((batch, targets),) = DataLoader(samples, batch_size=2, collate_fn=collate)
    assert isinstance(batch, ImageBatch)
    assert batch.tensors.shape == (2, 3, 3, 4)
    assert [t["image_id"].item() for t in targets] == [0, 1]


@pytest.mark.parametrize(
    ("counts", "capacity"),
    [
        ([0], 8),
        ([0, 0], 8),
        ([1, 3], 8),
        ([8], 8),
        ([2, 9], 16),
        ([16], 16),
        ([33, 1], 64),
        ([65], 128),
    ],
    ids=str,
)
def test_targets_hold_the_list(counts, capacity):
    _, listed = random_batch(counts, 1, 9)
    targets = Targets.from_list(listed)
    assert len(targets) == len(counts)
    assert targets.labels.shape == (len(counts), capacity)
    assert targets.boxes.shape == (len(counts), capacity, 4)
    assert targets.labels.dtype == torch.int64
    assert targets.boxes.dtype == torch.float32
    assert_close(targets.count, torch.tensor(counts, dtype=torch.int32))
    assert targets.count_host == tuple(counts)
    for image, n in enumerate(counts):
        assert not targets.labels[image, n:].any()
        assert not targets.boxes[image, n:].any()
    assert_close(targets.to_list(), listed)


def test_targets_name_image_and_key():
    _, listed = random_batch([2, 3], 1, 9)
    listed[1]["boxes"] = listed[1]["boxes"][:, :3]
    with pytest.raises(ValueError, match=r"targets\[1\]\['boxes'\]"):
        Targets.from_list(listed)


def test_targets_of_no_image():
    targets = Targets.from_list([])
    assert len(targets) == 0
    assert targets.to_list() == []


def test_targets_move_and_pin_every_tensor(monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)  # page-locking needs a GPU
    targets = Targets.from_list(random_batch([2, 3], 1, 9)[1])
    again = targets.pin_memory()
    assert {id(t) for t in pinned} == {
        id(t) for t in (targets.labels, targets.boxes, targets.count)
    }
    assert_close(again.to_list(), targets.to_list())
    moved = targets.to("meta")
    assert all(t.is_meta for t in (moved.labels, moved.boxes, moved.count))
    assert moved.count_host == targets.count_host
