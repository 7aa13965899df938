# SPDX-License-Identifier: Apache-2.0
"""Batches copied to the device while it computes: streams, events and memory, by a fake of CUDA."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from detr_fast.criterion import SetCriterion
from detr_fast.data.batch import collate
from detr_fast.data.packed import PackedCollate
from detr_fast.engine.batch import DeviceBatches
from detr_fast.engine.prefetch import Prefetch

CPU = torch.device("cpu")


class Event:
    """A moment of a stream: all that the stream and those it waited for had been given by then."""

    def __init__(self, seen):
        self.seen = frozenset(seen)


class Stream:
    def __init__(self):
        self.seen = set()

    def wait_event(self, event):
        self.seen |= event.seen

    def record_event(self):
        return Event(self.seen)


class Cuda:
    """Streams that remember what their work comes after; copies are seen by `Tensor.copy_`."""

    def __init__(self, monkeypatch):
        self.compute, self.current, self.copies, self.used = Stream(), None, [], []
        self.current = self.compute
        copy = Tensor.copy_

        def copied(into, tensor, non_blocking=False):
            if self.current is self.compute:  # no business of the prefetch
                return copy(into, tensor)
            assert non_blocking
            self.current.seen.add(("copy", into.untyped_storage().data_ptr(), len(self.copies)))
            self.copies.append((into.untyped_storage().data_ptr(), frozenset(self.current.seen)))
            return copy(into, tensor)

        def recorded(tensor, stream):
            self.used.append((tensor.untyped_storage().data_ptr(), stream))

        monkeypatch.setattr(Tensor, "copy_", copied)
        monkeypatch.setattr(Tensor, "record_stream", recorded)

    def Stream(self, device):
        return Stream()

    def current_stream(self, device):
        return self.compute

    @contextmanager
    def stream(self, stream):
        self.current = stream
        yield
        self.current = self.compute


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def batch(number, height=8, boxes=1, layout=torch.contiguous_format):
    image = torch.full((3, height, 16), number, dtype=torch.uint8)
    target = {
        "image_id": torch.tensor([number]),
        "orig_size": torch.tensor([height, 16]),
        "labels": torch.full((boxes,), number % 4),
        "boxes": torch.full((boxes, 4), 0.25),
    }
    images, targets = collate([(image, target)] * 2)
    images = images._replace(tensors=images.tensors.contiguous(memory_format=layout))
    return PackedCollate(lambda _: (images, targets))([])


@pytest.fixture
def batches():
    return [batch(number) for number in range(6)]


def test_batches_arrive_in_order_in_two_places(cuda, batches):
    prefetch = Prefetch(CPU, cuda)
    places = []
    for number, arrived in enumerate(prefetch(batches)):
        assert (arrived.pixels == number).all()
        assert arrived.image_ids == (number, number)
        assert (arrived.targets.labels[:, 0] == number % 4).all()
        places.append(arrived.pixels.data_ptr())
    assert len(places) == 6
    assert len(set(places)) == 2
    assert places[:2] * 3 == places


def test_steps_and_copies_wait_for_each_other_on_the_device(cuda, batches):
    prefetch = Prefetch(CPU, cuda)
    for number, _ in enumerate(prefetch(batches)):
        copies = {entry[2] for entry in cuda.compute.seen if entry[0] == "copy"}
        assert {2 * number, 2 * number + 1} <= copies  # the step sees its own batch
        assert 2 * number + 2 not in copies  # and does not wait for the next one
        assert len(cuda.copies) == min(2 * (number + 2), 12)  # which is already on its way
        cuda.compute.seen.add(("step", number))
    for number in range(2, 6):
        _, before = cuda.copies[2 * number]
        assert ("step", number - 2) in before  # its memory is free
        assert ("step", number - 1) not in before  # it runs while that step does
    assert {stream for _, stream in cuda.used} == {cuda.compute}
    assert {p for p, _ in cuda.used} == {s.memory.data_ptr() for s in prefetch.slots}


def test_a_loop_that_is_left_leaves_its_memory_to_the_next(cuda, batches):
    prefetch = Prefetch(CPU, cuda)
    for number, _ in enumerate(prefetch(batches)):
        cuda.compute.seen.add(("step", number))
        if number == 2:
            break
    cuda.copies.clear()
    for number, arrived in enumerate(prefetch(batches)):
        assert (arrived.pixels == number).all()
    for place, before in cuda.copies[:4]:
        steps = {entry[1] for entry in before if entry[0] == "step"}
        last = max(range(3), key=lambda n: (place == cuda.used[n][0], n))
        assert last in steps


def test_memory_grows_to_the_largest_batch(cuda):
    heights = [8, 8, 4, 32, 8, 8, 16, 32]
    sizes = []
    prefetch = Prefetch(CPU, cuda)
    for height, arrived in zip(
        heights, prefetch([batch(n, height) for n, height in enumerate(heights)]), strict=True
    ):
        assert arrived.pixels.shape[2] == height
        sizes.append(sum(len(slot.memory) for slot in prefetch.slots))
    assert sizes == sorted(sizes)
    assert sizes[-1] <= 2 * (2 * 3 * 32 * 16 + 2048)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(cuda, layout):
    sent = batch(3, layout=layout)
    [arrived] = Prefetch(CPU, cuda)([sent])
    assert arrived.pixels.stride() == sent.pixels.stride()
    assert torch.equal(arrived.pixels, sent.pixels)


@pytest.mark.parametrize("prefetched", [True, False])
def test_batches_of_a_loader(monkeypatch, prefetched):
    loader = [batch(0), None, batch(1), batch(2), None]
    criterion = SetCriterion(4, torch.nn.Identity(), {}, 0.1, [])
    prefetch = Prefetch(CPU, Cuda(monkeypatch)) if prefetched else None
    found = DeviceBatches(loader, criterion, CPU, prefetch)
    assert len(found) == 5
    for _ in range(2):
        ids = []
        for number, arrived in zip((0, None, 1, 2, None), found, strict=True):
            ids.append(arrived and arrived.image_ids)
            if arrived is not None:
                assert (arrived.images.tensors == number).all()
                assert arrived.annotations[0]["orig_size"].tolist() == [8, 16]
        assert ids == [[0, 0], None, [1, 1], [2, 2], None]


def test_a_label_out_of_range_is_named_before_it_travels(monkeypatch):
    criterion = SetCriterion(2, torch.nn.Identity(), {}, 0.1, [])
    cuda = Cuda(monkeypatch)
    found = DeviceBatches([batch(3)], criterion, CPU, Prefetch(CPU, cuda))
    with pytest.raises(ValueError, match=r"image 0: label 3 is outside of \[0, 2\)"):
        list(found)
    assert not cuda.copies


def test_batches_of_another_loader(monkeypatch):
    image = torch.rand(3, 4, 4)
    target = {
        "image_id": torch.tensor([5]),
        "orig_size": torch.tensor([4, 4]),
        "labels": torch.tensor([1]),
        "boxes": torch.rand(1, 4),
    }
    criterion = SetCriterion(2, torch.nn.Identity(), {}, 0.1, [])
    [found] = DeviceBatches([collate([(image, target)])], criterion, CPU)
    assert found.image_ids == [5]
    assert torch.equal(found.images.tensors[0], image)
    assert found.targets.count_host == (1,)
