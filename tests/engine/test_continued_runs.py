# SPDX-License-Identifier: Apache-2.0
"""What a resumed run takes over, what the flags change, and what does not fit."""

import json
import os
import signal

import pytest
import torch

from detr_fast import cli
from detr_fast.engine import output, random_state, train
from detr_fast.models.checkpoint import read_checkpoint, write_checkpoint
from tests.data.layout_writers import DATA, coco_json, write_coco

SMALL = (
    "--model detr_tiny --hidden_dim 32 --nheads 4 --dim_feedforward 32 --num_queries 8 "
    "--backbone_weights none --image_size 64 --batch_size 1 --num_workers 0 --device cpu "
)


@pytest.fixture
def run(tmp_path, capfd):
    """Train on a small data set; return the exit code, what was printed, and the checkpoint."""
    data = write_coco(tmp_path / "data")

    def run(flags):
        line = f"{SMALL} --data_path {data} --output_dir {tmp_path}/out {flags}"
        code = cli.train(line.split())
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        path = tmp_path / "out/checkpoint.pth"
        return code, printed.out + printed.err, read_checkpoint(path) if path.exists() else None

    return run


def rates(checkpoint):
    return [group["lr"] for group in checkpoint["optimizer"]["param_groups"]]


def test_the_learning_rate_follows_changed_flags(run, tmp_path):
    start = "--lr 1e-3 --lr_backbone 1e-4 --lr_drop 0.5"
    _, _, checkpoint = run(f"{start} --epochs 2")
    assert rates(checkpoint) == pytest.approx([1e-5, 1e-6])  # dropped after epochs 0 and 1
    # the share is now that of three times as many epochs
    run("--epochs 6 --resume auto")
    log = [json.loads(line) for line in (tmp_path / "out/log.txt").read_text().splitlines()]
    expected = [1e-3, 1e-4, 1e-3, 1e-4, 1e-4, 1e-4]
    assert [record["train_lr"] for record in log] == pytest.approx(expected)


def test_a_changed_rate_is_taken(run):
    run("--lr 1e-3 --epochs 1")
    _, _, checkpoint = run("--lr 5e-4 --epochs 2 --resume auto")
    assert rates(checkpoint)[0] == 5e-4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("transformer.decoder.layers.0", "transformer.decoder.layers.1"),  # equally many
        ("class_embed", "query_embed"),
    ],
)
def test_other_frozen_parts_are_an_error(run, before, after):
    run(f"--epochs 1 --freeze {before}")
    code, printed, _ = run(f"--epochs 2 --freeze {after} --resume auto")
    assert code == 2
    assert "not all the same: give the same --freeze" in printed
    assert run("--epochs 2 --resume auto")[0] == 0  # the flag comes back


def test_other_classes_end_with_the_remedy_and_leave_the_run_alone(run, tmp_path):
    run("--epochs 1")
    file = tmp_path / "data/annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["categories"].append({"id": 9, "name": "yacht"})
    file.write_text(json.dumps(content))
    code, printed, checkpoint = run("--epochs 2 --resume auto")
    assert code == 2
    assert "start from its weights with --finetune, into another --output_dir" in printed
    assert checkpoint["epoch"] == 0


def test_moments_of_another_shape_are_an_error(run, tmp_path):
    _, _, checkpoint = run("--epochs 1")
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    del checkpoint["sha256"]
    write_checkpoint(checkpoint, tmp_path / "odd.pth")
    code, printed, _ = run(f"--epochs 2 --resume {tmp_path}/odd.pth")
    assert code == 2
    assert "its training state does not fit" in printed


def test_killed_between_a_checkpoint_and_its_copies(run, tmp_path, monkeypatch):
    """The best checkpoint is written by the run that goes on."""
    write = output.write_checkpoint

    def killed(state, path, *keep):
        if path.name == "checkpoint.pth" and state["progress"]["batch"] == 0:
            raise KeyboardInterrupt
        write(state, path, *keep)

    monkeypatch.setattr(output, "write_checkpoint", killed)
    code, _, checkpoint = run("--epochs 1")
    assert (code, checkpoint["epoch"], checkpoint["progress"]["batch"]) == (130, -1, 3)
    (tmp_path / "out/checkpoint_best.pth").unlink()
    monkeypatch.undo()
    assert run("--epochs 1 --resume auto")[2]["epoch"] == 0
    assert (tmp_path / "out/checkpoint_best.pth").exists()
    assert len((tmp_path / "out/log.txt").read_text().splitlines()) == 1


def test_leftovers_of_a_killed_write_are_removed(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.checkpoint.pth.123.tmp").write_bytes(b"half")
    run("--epochs 1")
    assert not list((tmp_path / "out").glob(".*"))


def test_a_log_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.txt").write_text("my notes\nof yesterday\n")
    code, printed, _ = run("--epochs 1")
    assert code == 2
    assert "holds a log of something else" in printed
    assert (tmp_path / "out/log.txt").read_text() == "my notes\nof yesterday\n"


def test_an_evaluation_is_broken_off_by_sigterm(run, monkeypatch):
    evaluate = train.evaluate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", interrupted)
    code, printed, checkpoint = run("--epochs 1")
    assert code == 128 + signal.SIGTERM
    assert "IoU metric" not in printed
    assert (checkpoint["epoch"], checkpoint["progress"]["batch"]) == (-1, 3)


def test_no_usable_image_to_evaluate(run, tmp_path):
    for path in (tmp_path / "data/val2017").iterdir():
        path.write_bytes(b"")
    code, printed, _ = run("--epochs 1")
    assert code == 2
    assert "error: no image to evaluate can be used" in printed


def test_auto_finds_the_run_to_evaluate(run, tmp_path, capfd):
    run("--epochs 1")
    arguments = f"--resume auto --output_dir {tmp_path}/out --device cpu"
    assert cli.evaluate(arguments.split()) == 0
    assert "--resume auto takes" in capfd.readouterr().out
    assert cli.train(["--resume", "auto", "--coco_path", "C"]) == 2
    assert "--resume auto looks into --output_dir" in capfd.readouterr().err


def test_two_classes_of_one_name_come_back(run, tmp_path, capfd):
    """Only one of them has a box in the validation images."""
    for split, pictures in DATA.items():
        content = coco_json(pictures)
        for category in content["categories"][1:]:
            category["name"] = "cell"
        file = tmp_path / f"data/annotations/instances_{split}2017.json"
        file.write_text(json.dumps(content))
    _, printed, checkpoint = run("--epochs 1")
    assert checkpoint["class_names"] == {0: "apple", 1: "cell (2)", 2: "cell (3)"}
    table = printed.partition("IoU metric")[2].splitlines()[:13]
    arguments = f"--resume {tmp_path}/out/checkpoint.pth --device cpu"
    assert cli.evaluate(arguments.split()) == 0
    assert capfd.readouterr().out.partition("IoU metric")[2].splitlines()[:13] == table


def test_classes_that_the_console_cannot_show(run, tmp_path, monkeypatch):
    import io
    import sys

    file = tmp_path / "data/annotations/instances_train2017.json"
    file.write_text(file.read_text().replace("cup", "\\u676f"))
    val = file.with_name("instances_val2017.json")
    val.write_text(val.read_text().replace("cup", "\\u676f"))
    held = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", held)
    assert run("--epochs 1")[0] == 0
    held.flush()
    assert b"\\u676f 12" in held.buffer.getvalue()


def test_ranks_draw_different_numbers(monkeypatch):
    drawn = []
    for rank in ("", "0", "1", "nonsense"):
        monkeypatch.setenv("RANK", rank)
        random_state.seed_everything(5)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[1], drawn[2])


def test_deterministic_algorithms_and_float32(run):
    try:
        assert run("--epochs 1 --deterministic")[0] == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
