# SPDX-License-Identifier: Apache-2.0
"""Batches in two pieces of memory."""

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from detr_fast.data.batch import collate
from detr_fast.data.packed import PackedCollate
from detr_fast.matcher.packing import Targets


def sample(image_id, height=2, boxes=1):
    return torch.full((3, height, 4), image_id, dtype=torch.uint8), {
        "image_id": torch.tensor([image_id]),
        "orig_size": torch.tensor([10 * height, 40]),
        "labels": torch.arange(boxes),
        "boxes": torch.rand(boxes, 4),
        "area": torch.ones(boxes),
    }


def assert_holds(packed, samples):
    images, annotations = collate(samples)
    assert_close(packed.images, images)
    expected = Targets.from_list(annotations)
    assert packed.targets.count_host == expected.count_host
    for name in ("labels", "boxes", "count"):
        assert_close(getattr(packed.targets, name), getattr(expected, name), rtol=0, atol=0)
    assert len(packed) == len(samples)
    assert packed.image_ids == tuple(int(target["image_id"]) for target in annotations)
    for of_image, target in zip(packed, annotations, strict=True):
        assert of_image.keys() == {"image_id", "orig_size", "labels", "boxes"}
        assert_close(of_image, {name: target[name] for name in of_image}, rtol=0, atol=0)


SAMPLES = {
    "of one size": [sample(7, boxes=2), sample(3, boxes=0)],
    "padded": [sample(7, height=3, boxes=9), sample(3), sample(5)],
    "without boxes": [sample(1, boxes=0)],
}


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_packed_batch_is_what_was_packed(samples):
    packed = PackedCollate(collate)(samples)
    assert_holds(packed, samples)
    assert (packed.images.sizes is None) == (len({image.shape for image, _ in samples}) == 1)
    for targets in (packed.targets.labels, packed.targets.boxes, packed.targets.count):
        assert targets.storage_offset() * targets.itemsize % 64 == 0


def test_nothing_usable_stays_nothing():
    assert PackedCollate(collate)([None, None]) is None


def test_a_mistake_in_a_target_is_named():
    _, target = sample(1)
    with pytest.raises(ValueError, match=r"targets\[0\]\['boxes'\]"):
        PackedCollate(collate)([(sample(1)[0], {**target, "boxes": target["boxes"][:, :3]})])


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_a_message_between_processes_has_one_tensor(samples, monkeypatch):
    shared = []
    share = torch.UntypedStorage._share_fd_cpu_
    monkeypatch.setattr(
        torch.UntypedStorage, "_share_fd_cpu_", lambda s: shared.append(s) or share(s)
    )
    message = ForkingPickler.dumps(PackedCollate(collate)(samples))
    assert len(shared) == 1
    assert len(message) < 3000
    assert_holds(pickle.loads(message), samples)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_packed_batches(workers):
    samples = [sample(i, height=1 + i % 3, boxes=i) for i in range(6)]
    loader = DataLoader(
        samples, batch_size=3, num_workers=workers, collate_fn=PackedCollate(collate)
    )
    for number, packed in enumerate(loader):
        assert_holds(packed, samples[3 * number : 3 * number + 3])


def test_both_pieces_move_and_are_pinned(monkeypatch):
    packed = PackedCollate(collate)(SAMPLES["padded"])
    moved = packed.to("meta")
    assert moved.images.tensors.is_meta
    assert all(t.is_meta for t in (moved.images.sizes, moved.targets.boxes, moved.targets.count))
    assert moved.targets.count_host == packed.targets.count_host
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    assert_holds(torch.utils.data._utils.pin_memory.pin_memory(packed), SAMPLES["padded"])
    assert [id(t) for t in pinned] == [id(packed.pixels), id(packed.record)]
