# SPDX-License-Identifier: Apache-2.0
"""A dry run makes steps, says what it saw, and leaves nothing behind."""

import pytest
import torch

from detr_fast import cli
from detr_fast.config import configure
from detr_fast.data.sampler import BucketedBatches
from detr_fast.engine.train import Run
from tests.data.coco_folder import write_folder

SMALL = "--batch_size 1 --image_size 64 --model detr_tiny --backbone_weights none --num_workers 0"


@pytest.fixture
def folder(tmp_path):
    (folder := tmp_path / "data").mkdir()
    return write_folder(folder)


def lines(capsys, command, line, code=0):
    assert getattr(cli, command)(line.split()) == code
    return capsys.readouterr()


def test_two_steps_on_the_largest_batches(capsys, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    files = [
        f"--{split}_images {folder} --{split}_annotations {folder}/boxes.json"
        for split in ("train", "val")
    ]
    printed = lines(capsys, "train", f"{' '.join(files)} {SMALL} --dry_run --output_dir out").out
    assert "training step 1 of 2 (the largest batches of epoch 0): 1 image in " in printed
    assert "training step 2 of 2" in printed
    assert "validation batch 1 of " in printed
    assert "memory at peak: " in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_of_generated_images_and_their_evaluation(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = lines(capsys, "train", "--dry_run --batch_size 2").out
    assert "(the first batches of epoch 0): 2 images in 128x128" in printed
    assert not list(tmp_path.iterdir())


def test_an_evaluation(capsys, tmp_path):
    run = Run(configure({"dataset_file": "shapes", "output_dir": ""}), None)
    torch.save(run.state_dict(), file := tmp_path / "start.pth")
    printed = lines(capsys, "evaluate", f"--resume {file} --dry_run").out
    assert "validation batch 1 of " in printed
    assert "training step" not in printed


def test_too_little_memory_names_the_batch_and_the_remedy(capsys, monkeypatch):
    def step(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("detr_fast.engine.step.TrainingStep.__call__", step)
    told = lines(capsys, "train", "--dry_run --batch_size 2", code=2).err
    assert "too little GPU memory for a batch of 2 images in 128x128: lower --batch_size" in told


def test_the_largest_batch_is_found():
    sizes = torch.randint(100, 900, (64, 2), generator=torch.Generator().manual_seed(0)).numpy()
    batches = BucketedBatches(sizes, 4, seed=0, short_side=800)
    batches.begin(3)
    order, seeds, _ = batches._epoch_draws()
    planned = dict(zip(order.tolist(), batches._planned(order, seeds).tolist(), strict=True))
    areas = []
    for batch in batches:
        height, width = (max(s) for s in zip(*(planned[draw.index] for draw in batch), strict=True))
        areas.append((-(-height // 64) * 64) * (-(-width // 64) * 64))
    assert areas[batches.largest()] == max(areas)
