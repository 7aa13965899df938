# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed is the run that was never interrupted, bit by bit."""

import os
import random
import re
import signal
import subprocess
import sys

import pytest
import torch

from detr_fast import cli
from detr_fast.command_line import parse
from detr_fast.config import configure
from detr_fast.engine.optim import Learner
from detr_fast.engine.resume import Progress, newest_checkpoint
from detr_fast.models.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from detr_fast.models.checksum import with_digests
from tests.data.layout_writers import Picture, write_coco

BATCHES, EPOCHS = 6, 2
PICTURES = [
    Picture(f"{i}.jpg", 48 + i, 64 - i, [("bear", (i, 5, 20, 20)), ("cup", (2, 30, 9, 8))])
    for i in range(2 * BATCHES + 1)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data"), {"train": PICTURES, "val": PICTURES[:3]})


def command(data, folder):
    """A run with everything in it that has a state: dropout, workers, windows, warm-up, average."""
    flags = f"--data_path {data} --output_dir {folder} --epochs {EPOCHS} --batch_size 2 "
    flags += "--model detr_tiny --hidden_dim 32 --nheads 4 --dim_feedforward 32 --num_queries 8 "
    flags += "--backbone_weights none --dropout 0.2 --image_size 64 --lr 1e-3 --num_workers 2 "
    flags += "--accumulate_steps 2 --warmup_steps 4 --ema_decay 0.9 --lr_drop 1 "
    return flags + "--checkpoint_steps 1 --print_freq 1 --device cpu --resume auto"


def start(arguments, **options):
    program = "import sys; from detr_fast.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, "train", *arguments.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def kill_after(arguments, epoch, batch):
    """Kill a run when it has logged this batch; return what it printed."""
    run = start(arguments)
    printed = []
    for line in run.stdout:
        printed.append(line)
        if line.startswith(f"Epoch: [{epoch}]  [{batch}/{BATCHES}]"):
            run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "".join(printed)
    return "".join(printed)


def finish(arguments):
    run = start(arguments)
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    return printed


def assert_same_end(folder, expected):
    """Weights, averages, optimizer, schedule, random numbers and the log of losses."""
    one, other = (
        with_digests(read_checkpoint(path / "checkpoint.pth")) for path in (folder, expected)
    )
    differ = [name for name in other["sha256"] if one["sha256"][name] != other["sha256"][name]]
    assert differ == ["args"]  # the name of the folder
    losses = [
        re.findall(r'"train_loss\w*": ([^,]+)', (p / "log.txt").read_text())
        for p in (folder, expected)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 2 * EPOCHS


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(command(data, folder))
    return folder


def test_killed_twice_in_mid_epoch(data, uninterrupted, tmp_path):
    kill_after(command(data, tmp_path), 0, 2)
    printed = kill_after(command(data, tmp_path), 1, 2)
    assert re.search("continuing epoch 0 after [24] batches", printed)
    printed = finish(command(data, tmp_path))
    assert re.search("continuing epoch 1 after [24] batches", printed)
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize("point", range(5))
def test_killed_at_a_random_point(data, uninterrupted, tmp_path, point):
    kill_after(command(data, tmp_path), random.randrange(EPOCHS), random.randrange(BATCHES))
    finish(command(data, tmp_path))
    assert_same_end(tmp_path, uninterrupted)


def test_sigterm_ends_a_run_at_its_place(data, tmp_path, monkeypatch, capsys):
    finish_step = Learner.finish

    def interrupted(self):
        finish_step(self)
        if self.steps == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Learner, "finish", interrupted)
    arguments = command(data, tmp_path).replace("--num_workers 2", "--num_workers 0").split()
    assert cli.train(arguments) == 128 + signal.SIGTERM
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    assert (checkpoint["epoch"], checkpoint["progress"]["batch"]) == (-1, 2)
    assert "stopped; continue with --resume" in capsys.readouterr().out


def small(**entries):
    return with_digests({"model": {"w": torch.ones(3)}, **entries})


def test_a_truncated_newest_checkpoint_is_passed_over(tmp_path, capsys):
    path = tmp_path / "checkpoint.pth"
    for epoch in range(4):
        write_checkpoint(small(epoch=epoch), path, keep=3)
    names = ["checkpoint.pth", "checkpoint_previous.pth", "checkpoint_previous_2.pth"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert [read_checkpoint(tmp_path / name)["epoch"] for name in names] == [3, 2, 1]
    assert newest_checkpoint(tmp_path)[1]["epoch"] == 3

    path.write_bytes(path.read_bytes()[:-100])
    found, checkpoint = newest_checkpoint(tmp_path)
    assert (found.name, checkpoint["epoch"]) == ("checkpoint_previous.pth", 2)
    said = capsys.readouterr().out
    assert f"passed over: {path}: not a checkpoint of tensors, or damaged" in said
    assert f"--resume auto takes {tmp_path}/checkpoint_previous.pth" in said

    path.unlink()  # killed between the two renames
    assert newest_checkpoint(tmp_path)[1]["epoch"] == 2
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    write_checkpoint(small(epoch=0), tmp_path / "checkpoint0000.pth")
    assert newest_checkpoint(tmp_path)[0].name == "checkpoint0000.pth"
    (tmp_path / "checkpoint0000.pth").write_bytes(b"PK")
    with pytest.raises(
        CheckpointError, match=r"none of 3 checkpoints can be read; the newest: .*previous"
    ):
        newest_checkpoint(tmp_path)


def test_no_checkpoint_yet_starts_anew(tmp_path, capsys):
    assert newest_checkpoint(tmp_path / "none") is None
    assert "no checkpoint in" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(small(epoch=0), path, keep=2)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("detr_fast.models.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(small(epoch=1), path, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert read_checkpoint(path)["epoch"] == 0


def test_changed_batches_begin_the_epoch_anew(capsys):
    def progress(line, images, bucket):
        return Progress.of(configure(parse("", "", line.split())), images, bucket)

    def stored(*of):
        state = {**progress(*of).state_dict(), "epoch": 6}
        state["progress"] |= {"batch": 7, "meters": {"loss": {}}}
        return state

    grouped, official = stored("--batch_size 4", 100, 64), stored("--batch_size 4", 100, 0)
    old = stored("--batch_size 4", 100, 0)
    old["progress"]["images"] = (100, 4, 1, 42)  # of a version without --padding
    for line, images, bucket, state in (
        ("--batch_size 4", 100, 64, grouped),
        ("--batch_size 4", 100, 0, official),
        ("--batch_size 4", 100, 0, old),
        ("--batch_size 4 --image_size 400", 100, 0, official),  # any size in the same order
    ):
        again = progress(line, images, bucket).resumed(state)
        assert (again.epoch, again.batch, again.meters) == (7, 7, {"loss": {}})
        assert "continuing epoch 7 after 7 batches" in capsys.readouterr().out
    for line, images, bucket, state in (
        ("--batch_size 5", 100, 64, grouped),
        ("--batch_size 4", 99, 64, grouped),
        ("--batch_size 4 --seed 1", 100, 64, grouped),
        ("--batch_size 4", 100, 128, grouped),
        ("--batch_size 4 --image_size 400", 100, 64, grouped),
        ("--batch_size 4", 100, 0, grouped),
        ("--batch_size 4", 100, 64, official),
        ("--batch_size 4", 100, 64, old),
    ):
        again = progress(line, images, bucket).resumed(state)
        assert (again.epoch, again.batch, again.meters) == (7, 0, {})
        assert "epoch 7 begins anew: its (training images, batch size" in capsys.readouterr().out


def test_random_numbers_go_on(tmp_path):
    begun = Progress.of(configure({}), 100)
    torch.rand(3)
    write_checkpoint({**begun.state_dict(), "model": {}}, tmp_path / "x.pth")
    expected = torch.rand(5), random.random()
    torch.manual_seed(0)
    random.seed(0)
    begun.resumed(read_checkpoint(tmp_path / "x.pth"))
    assert torch.equal(torch.rand(5), expected[0])
    assert random.random() == expected[1]


def test_sigterm_to_all_processes_of_a_run(data, uninterrupted, tmp_path):
    """As a scheduler sends it: to the loader's workers, too."""
    run = start(command(data, tmp_path), start_new_session=True)
    printed = []
    for line in run.stdout:
        printed.append(line)
        if line.startswith(f"Epoch: [1]  [1/{BATCHES}]"):
            os.killpg(run.pid, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, "".join(printed)
    assert "stopped; continue with --resume" in printed[-1]
    finish(command(data, tmp_path))
    assert_same_end(tmp_path, uninterrupted)
