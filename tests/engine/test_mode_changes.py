# SPDX-License-Identifier: Apache-2.0
"""A run made with any of the flags of speed goes on with any others."""

import itertools
import json
import math
import signal

import pytest
import torch

from detr_fast import cli
from detr_fast.engine import train
from detr_fast.models.checkpoint import read_checkpoint
from tests.data.layout_writers import Picture, write_coco

BATCHES = 4  # of an epoch
PICTURES = [
    Picture(f"{i}.jpg", 40 + 3 * i, 70 - 3 * i, [("bear", (i, 5, 20, 20)), ("cup", (2, 30, 9, 8))])
    for i in range(2 * BATCHES + 1)
]
FLAGS = {"padding": ("bucket", "official"), "compile": ("off", "on"), "amp": ("off", "bf16")}
FAST = [
    "--backend fast "
    + " ".join(f"--{name} {value}" for name, value in zip(FLAGS, mode, strict=True))
    for mode in itertools.product(*FLAGS.values())
]
MODES = [*FAST, "--backend reference"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data"), {"train": PICTURES, "val": PICTURES[:3]})


@pytest.fixture
def traced(monkeypatch):
    """torch.compile wraps and traces as ever, and runs what it traced as it is."""
    compile_ = torch.compile

    def eager(*args, mode=None, options=None, **kwargs):
        return compile_(*args, **{**kwargs, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", eager)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled(monkeypatch):
    """What torch.compile was asked for; it takes too long for each of many pairs."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: asked.append(model) or model)
    return asked


@pytest.fixture
def stop_after(monkeypatch):
    """Ends a run by a signal after so many of its updates."""
    as_it_is = train.train_one_epoch

    def stopping(updates):
        def one_epoch(step, *args, after_update, **kwargs):
            made = itertools.count(1)

            def count(batches):
                after_update(batches)
                if next(made) == updates:
                    signal.raise_signal(signal.SIGTERM)

            return as_it_is(step, *args, after_update=count, **kwargs)

        monkeypatch.setattr(train, "train_one_epoch", one_epoch)

    return stopping


def fit(data, folder, line):
    flags = f"--data_path {data} --output_dir {folder} --batch_size 2 --image_size 64 --lr 1e-3 "
    flags += "--model detr_tiny --hidden_dim 32 --nheads 4 --dim_feedforward 32 --num_queries 8 "
    flags += "--backbone_weights none --num_workers 0 --ema_decay 0.9 --device cpu --print_freq 1 "
    return cli.train(f"{flags} {line}".split())


def state(folder):
    """The checkpoint, the updates that the optimizer has made, and the averages of the losses."""
    checkpoint = read_checkpoint(folder / "checkpoint.pth")
    [made] = {int(entry["step"]) for entry in checkpoint["optimizer"]["state"].values()}
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert all(value.dtype != torch.bfloat16 for value in checkpoint["model"].values())
    assert not [name for name in checkpoint["model"] if "_orig_mod" in name]
    return checkpoint, made, checkpoint["progress"]["meters"]


@pytest.mark.parametrize("before", MODES)
def test_a_run_goes_on_in_every_other_mode(data, tmp_path, stop_after, compiled, capsys, before):
    """In mid-epoch: a few updates in one mode, one update in each other; counts go on."""
    stop_after(2)
    assert fit(data, tmp_path, f"{before} --epochs 9") == 128 + signal.SIGTERM
    first, made, _ = state(tmp_path)
    assert (first["steps"], made) == (2, 2)
    stop_after(1)
    for after in MODES:
        if after == before:
            continue
        compiled.clear()
        folder = tmp_path / str(MODES.index(after))
        line = f"{after} --resume {tmp_path}/checkpoint.pth --epochs 9"
        assert fit(data, folder, line) == 128 + signal.SIGTERM, after
        assert bool(compiled) == ("--compile on" in after)
        checkpoint, made, meters = state(folder)
        assert (checkpoint["steps"], made) == (3, 3), after
        assert math.isfinite(meters["loss"]["total"]), after
        flags = after.replace("--", "").split()
        asked = dict(zip(flags[::2], flags[1::2], strict=True))
        assert {name: checkpoint["args"][name] for name in asked} == asked
    assert "update skipped" not in capsys.readouterr().out


def test_a_chain_of_modes_ends_as_a_run_does(data, tmp_path, traced):
    """An epoch in each mode, evaluated each time: one log, one count of updates."""
    chain = [FAST[0], "--backend reference", FAST[-1], FAST[3], "--backend reference", FAST[4]]
    for epoch, mode in enumerate(chain, start=1):
        assert fit(data, tmp_path, f"{mode} --epochs {epoch} --resume auto") == 0, mode
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == list(range(len(chain)))
    assert all(math.isfinite(entry["train_loss"]) for entry in log)
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    checkpoint, made, _ = state(tmp_path)
    assert checkpoint["steps"] == made == BATCHES * len(chain)
