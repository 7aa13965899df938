# SPDX-License-Identifier: Apache-2.0
"""What whole models are compared by: a wrong loss or gradient is seen, a batch is what it says."""

import pytest
import torch

from benchmarks import default_run, gpu_check, whole_model
from benchmarks.bench_evaluation import generated
from benchmarks.bench_train_step import BFLOAT16, FLOAT32
from benchmarks.whole_model import OFF, REFERENCE, problem, random_weights, training_contender

CPU = torch.device("cpu")
SMALL = {"num_queries": 4}


@pytest.fixture(scope="module")
def found():
    """Outcomes of the fast and of the reference back end."""
    given = problem(CPU, [(64, 64), (48, 60)], 1, 3)
    weights = random_weights(SMALL)
    return [
        training_contender(CPU, SMALL | flags, weights, given).checked()
        for flags in (OFF, REFERENCE)
    ]


def test_back_ends_agree_and_planted_faults_are_seen(found):
    (losses, gradients), expected = found
    FLOAT32((losses, gradients), expected)
    fault = losses | {"loss_giou_0": losses["loss_giou_0"] * 1.001}
    with pytest.raises(AssertionError, match="loss_giou_0"):
        FLOAT32((fault, gradients), expected)
    name = max(gradients, key=lambda name: gradients[name].norm())
    with pytest.raises(AssertionError, match="relative error of the gradient"):
        FLOAT32((losses, gradients | {name: 1.01 * gradients[name]}), expected)
    with pytest.raises(AssertionError, match="relative error of the gradient"):
        BFLOAT16((losses, gradients | {name: -gradients[name]}), expected)
    with pytest.raises(AssertionError, match="other parameters"):
        FLOAT32((losses, {k: v for k, v in gradients.items() if k != name}), expected)


def test_a_step_leaves_the_weights_where_they_are():
    weights = random_weights(SMALL)
    given = problem(CPU, [(64, 64)], 1, 3)
    contender = training_contender(CPU, SMALL | OFF, weights, given)
    first = contender.run()["loss"].item()
    contender.run()
    assert contender.run()["loss"].item() == pytest.approx(first, rel=1e-6)


def test_a_batch_is_padded_as_it_says():
    given = problem(CPU, [(60, 64), (48, 100)], 64, 3)
    assert given.bytes.images.tensors.shape == (2, 3, 64, 128)
    assert given.bytes.images.tensors.dtype == torch.uint8
    assert given.floats.images.tensors.is_contiguous()
    assert given.padding == 2 * 64 * 128 / (60 * 64 + 48 * 100)
    assert not given.floats.images.tensors[1, :, 48:].any()
    assert [len(target["labels"]) for target in given.listed] == [1, 2]
    assert problem(CPU, [(64, 64)] * 2, 1, 3, still=True).floats.images.sizes is None


def test_generated_detections_are_coco_like():
    truth, detections = generated(40)
    assert len(truth["images"]) == len(detections) == 40
    assert len({entry["id"] for entry in truth["annotations"]}) == len(truth["annotations"])
    assert 4 < len(truth["annotations"]) / 40 < 11
    boxes = torch.stack([found["boxes"] for found in detections.values()])
    assert boxes.shape == (40, 100, 4)
    assert (boxes[..., 2:] > boxes[..., :2]).all()


@pytest.fixture
def short_default_run(monkeypatch):
    """The default run with a few of its pictures, and the names of the steps that train."""
    steps = []
    train = default_run.train_one_epoch

    def counted(step, batches, epoch, **options):
        steps.append((type(step).__name__, epoch, len(batches)))
        train(step, batches, epoch, **options)

    monkeypatch.setattr(default_run, "train_one_epoch", counted)
    monkeypatch.setattr("detr_fast.data.shapes.LENGTHS", {"train": 8, "val": 4})
    return steps


def test_default_run_trains_both_back_ends_in_turn_to_their_ends(short_default_run, capsys):
    line = "--epochs 2 --device cpu --batch_size 4 --num_queries 4"
    assert default_run.main(line.split()) == 0
    turns = [(name, epoch, 2) for epoch in (0, 1) for name in ("TrainingStep", "ReferenceStep")]
    assert short_default_run == turns
    printed, progress = capsys.readouterr()
    assert "| fast | 4 |" in printed
    assert "| reference | 4 |" in printed
    assert "fast over reference: " in printed
    assert progress.count("epoch 2 of 2: fast") == 1


def test_table_of_the_default_run_takes_whole_times_and_the_ratios_of_epochs():
    outcome = default_run.Outcome
    slow = outcome([4.0, 6.0, 20.0], steps=12, ap=0.5, ap50=0.75)
    page = default_run.table(
        {"fast": outcome([2.0, 3.0, 5.0], 12, 0.51, 0.74), "reference": slow}, 8
    )
    assert "| fast | 36 | 3.60 | 28.8 | 0.510 | 0.740 |" in page
    assert "fast over reference: 3.00 (median of 3 epochs 2.00, 2.00 to 4.00)" in page


def test_long_parts_come_last():
    assert tuple(gpu_check.parts())[-3:] == gpu_check.LONG


def test_peers_have_the_memory_of_a_process_without_us(monkeypatch):
    settings = []
    monkeypatch.setattr(whole_model, "keep_freed_memory", lambda *, kept: settings.append(kept))
    for fast in (True, False):
        whole_model.memory_of(torch.device("cpu"), fast=fast)()
    assert settings == [1 << 30, 64 << 20]
    assert whole_model.memory_of(torch.device("cuda"), fast=True) is None
