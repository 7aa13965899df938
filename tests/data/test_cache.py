# SPDX-License-Identifier: Apache-2.0
"""Decoded images in memory that all processes share."""

import copy
import multiprocessing
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from detr_fast.data import cache, coco
from detr_fast.data.cache import ImageCache, bytes_needed
from detr_fast.data.coco import CocoAnnotations, CocoDetection
from detr_fast.data.images import read_image
from tests.data.coco_folder import as_read, edited, write_folder

SIZES = np.array([[4, 6], [0, 0], [5, 3], [7, 0]])


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


@pytest.fixture
def dataset(folder):
    dataset = CocoDetection(folder, folder / "boxes.json", as_read, unusable="replace")
    dataset.cache = ImageCache(dataset.annotations.sizes)
    return dataset


def random_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def test_images_return_as_they_were():
    kept = ImageCache(SIZES)
    images = {0: random_image(4, 6), 2: random_image(5, 3, seed=1)}
    assert [kept.get(i) for i in range(4)] == [None] * 4
    for index, image in images.items():
        kept.put(index, image)
    assert len(kept) == 2
    for index, image in images.items():
        assert torch.equal(kept.get(index), image)
        assert kept.get(index).stride() == (1, 3 * image.shape[2], 3)


@pytest.mark.parametrize(("index", "size"), [(1, (4, 6)), (2, (3, 5)), (3, (7, 3)), (0, (8, 3))])
def test_image_of_another_size_than_announced_is_not_kept(index, size):
    kept = ImageCache(SIZES)
    kept.put(index, random_image(*size))
    assert len(kept) == 0
    assert kept.get(index) is None


def test_memory_is_taken_when_images_come():
    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[2])  # of files and shared memory
        return pages * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc: only Linux tells what is resident")
    before = resident()
    sizes = np.full((10_000, 2), 1_000)
    kept = ImageCache(sizes)
    assert bytes_needed(sizes) == 3 * 10**10
    kept.put(9_999, torch.zeros(1000, 1000, 3, dtype=torch.uint8).permute(2, 0, 1))
    assert 3e6 <= resident() - before < 5e6
    assert len(kept) == 1


def test_what_a_worker_sends_is_one_image():
    """torch sends whole storages: that of an image shall not be that of the cache."""
    kept = ImageCache(SIZES)
    kept.put(0, random_image(4, 6))
    assert kept.get(0).untyped_storage().nbytes() == 4 * 6 * 3


@pytest.mark.parametrize("how", ["copied", "pickled for a process"])
def test_copies_share_the_images(how):
    kept = ImageCache(SIZES)
    again = copy.deepcopy if how == "copied" else lambda c: pickle.loads(ForkingPickler.dumps(c))
    other = again(kept)
    kept.put(0, random_image(4, 6))
    other.put(2, random_image(5, 3))
    assert len(kept) == len(other) == 2
    assert torch.equal(kept.get(2), random_image(5, 3))
    assert torch.equal(other.get(0), random_image(4, 6))
    del kept
    assert len(other) == 2


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("forkserver", 1), ("spawn", 1)])
def test_workers_share_one_cache(folder, dataset, method, workers):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot start processes by {method}")
    first = dataset[0][0].clone()
    (folder / "two.png").unlink()
    loader = DataLoader(
        dataset, num_workers=workers, batch_size=None, multiprocessing_context=method
    )
    of_workers = [(image.clone(), int(target["image_id"])) for image, target in loader]
    assert [image_id for _, image_id in of_workers] == [2, 5, 9]
    assert torch.equal(of_workers[0][0], first)
    assert len(dataset.cache) == 3
    for name in ("five.png", "nine.png"):
        (folder / name).unlink()
    assert all(torch.equal(dataset[i][0], image) for i, (image, _) in enumerate(of_workers))


@pytest.fixture
def reads(monkeypatch):
    """The paths of the images that are read."""
    paths = []

    def read(path, size):
        paths.append(path.name)
        return read_image(path, size)

    monkeypatch.setattr(coco, "read_image", read)
    return paths


def test_an_image_is_decoded_once(dataset, reads):
    for _ in range(3):
        for index in range(3):
            dataset[index]
    assert sorted(reads) == ["five.png", "nine.png", "two.png"]
    dataset.cache = None
    dataset[0]
    assert len(reads) == 4


def test_unusable_images_are_replaced_and_not_kept(folder, dataset):
    (folder / "two.png").unlink()
    for _ in range(2):
        assert int(dataset[0][1]["image_id"]) == 5
    assert len(dataset.cache) == 1
    assert len(dataset.unusable_report()) == 1


def test_image_of_unknown_size_is_decoded_anew(folder, reads):
    content = edited(lambda c: c["images"][1].update(height=0, width=0))
    dataset = CocoDetection(folder, CocoAnnotations.from_dict(content), as_read)
    dataset.cache = ImageCache(dataset.annotations.sizes)
    for _ in range(2):
        assert dataset[0][0].shape == (10, 10, 3)
        assert dataset[1][0].shape == (8, 16, 3)
    assert sorted(reads) == ["five.png", "two.png", "two.png"]


GB = 10**9


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


@pytest.mark.parametrize(
    ("lines", "group", "names", "free"),
    [
        ("0::/", "", ("memory__max", "memory__current", "inactive_file"), 3 * GB),
        ("0::/job/step", "job", ("memory__max", "memory__current", "inactive_file"), 3 * GB),
        (
            "9:cpu:/\n4:memory:/job\n0::/",
            "memory/job",
            ("memory__limit_in_bytes", "memory__usage_in_bytes", "total_inactive_file"),
            3 * GB,
        ),
        (
            "4:cpu,memory:/of/the/host",
            "memory",
            ("memory__limit_in_bytes", "memory__usage_in_bytes", "total_inactive_file"),
            3 * GB,
        ),
    ],
)
def test_limits_of_control_groups(tmp_path, lines, group, names, free):
    limit, usage, reclaimable = names
    (tmp_path / "cgroup").write_text(lines + "\n")
    root = tmp_path / "fs"
    assert [f for f in cache._free_of_groups(tmp_path / "cgroup", root) if f is not None] == []
    stat = {"memory__stat": f"anon 5\n{reclaimable} {GB}\n"}
    write(root / group, **{limit: 10 * GB, usage: 8 * GB}, **stat)
    found = cache._free_of_groups(tmp_path / "cgroup", root)
    assert {f for f in found if f is not None} == {free}
    write(root / group, **{"memory__max": "max"})
    if "memory__max" in names:
        assert set(cache._free_of_groups(tmp_path / "cgroup", root)) == {None}


def test_the_least_of_all_limits_counts(monkeypatch):
    monkeypatch.setattr(cache, "_free_of_system", lambda: 7)
    for groups, free in (([], 7), ([None], 7), ([None, 9, 4], 4), ([-3], 0)):
        monkeypatch.setattr(cache, "_free_of_groups", lambda groups=groups: groups)
        assert cache.free_memory() == free


def test_memory_of_this_machine():
    assert 2**20 < cache.free_memory() < 2**50
