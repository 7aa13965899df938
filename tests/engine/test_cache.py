# SPDX-License-Identifier: Apache-2.0
"""``--cache``: what it does, says and refuses."""

import pytest

from detr_fast.command_line import parse
from detr_fast.config import UsageError, configure
from detr_fast.data.coco import CocoDetection
from detr_fast.data.shapes import ShapesDetection
from detr_fast.engine import cache
from tests.data.coco_folder import as_read, write_folder

NEEDED = 3 * (20 * 30 + 10 * 10 + 8 * 16)  # of the three images


@pytest.fixture
def dataset(tmp_path):
    folder = write_folder(tmp_path)
    return CocoDetection(folder, folder / "boxes.json", as_read)


@pytest.fixture
def run(dataset, monkeypatch, capsys):
    def run(flags, free, datasets=(dataset,)):
        monkeypatch.setattr(cache, "free_memory", lambda: free)
        config = configure(parse("", "", ["--coco_path", "data", *flags.split()]))
        cache.cache_images(config, datasets)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("flags", "free", "kept", "said"),
    [
        ("", 2 * NEEDED, True, "decoded once and kept in memory: 2.48e-06 GB of 4.97e-06 GB"),
        ("", 2 * NEEDED - 1, False, "decoded anew in every epoch: all of them take 2.48e-06 GB"),
        ("--cache auto --epochs 1", 10 * NEEDED, False, ""),
        ("--cache ram --epochs 1", NEEDED, True, "decoded once and kept"),
        ("--cache off", 10 * NEEDED, False, ""),
    ],
)
def test_what_is_kept(run, dataset, flags, free, kept, said):
    lines = run(flags, free)
    assert (dataset.cache is not None) == kept
    assert said in lines
    assert lines.count("\n") == bool(said)


def test_too_little_memory_is_named(run, dataset):
    with pytest.raises(UsageError, match=r"--cache ram: .* take 2.48e-06 GB, of memory 1e-06 GB"):
        run("--cache ram", 1000)
    assert dataset.cache is None


def test_both_splits_count(run, dataset):
    assert "decoded anew" in run("", 3 * NEEDED, [dataset, dataset])
    assert "4.97e-06 GB of" in run("", 4 * NEEDED, [dataset, dataset])


def test_generated_images_keep_themselves(run):
    assert run("--cache ram", 0, [ShapesDetection("val", length=2)]) == ""


def test_systems_without_shared_files(run, dataset, monkeypatch):
    monkeypatch.setattr(cache.os, "name", "nt")
    assert run("", 10 * NEEDED) == ""
    assert dataset.cache is None
    with pytest.raises(UsageError, match="--cache ram: not on this system"):
        run("--cache ram", 10 * NEEDED)
