# SPDX-License-Identifier: Apache-2.0
"""Entries of the wrong type, from whatever code base or stranger, end with one line."""

import argparse

import pytest
import torch

from detr_fast import cli
from detr_fast.models.checkpoint import CheckpointError, read_checkpoint
from detr_fast.models.checkpoint_entries import validated

METER = {"window": [1.0], "total": 1.0, "count": 1}
PROGRESS = {"batch": 2, "meters": {"loss": METER}, "best_epoch": -1, "images": (9, 2, 1, 42)}
WEIGHTS = {"w": torch.ones(2)}
GROUP = {"lr": 1e-4, "initial_lr": 1e-4, "params": [0]}
GOOD = {
    "model": WEIGHTS,
    "ema": WEIGHTS,
    "args": {"lr": 1e-4},
    "model_config": {"num_classes": 3},
    "class_names": {0: "cat"},
    "category_ids": {0: 7},
    "epoch": -1,
    "best_ap": -1.0,
    "steps": 0,
    "progress": PROGRESS,
    "random": {},
    "optimizer": {"state": {}, "param_groups": [GROUP]},
    "lr_scheduler": {"last_epoch": 0},
    "learning": [["w"]],
}


def test_good_entries_pass_unchanged():
    assert validated(GOOD, "x.pth") == GOOD
    args = argparse.Namespace(lr=1e-4)
    assert validated({"args": args, "mine": object}, "x") == {"args": args, "mine": object}


def test_what_is_none_is_taken_out_and_lists_of_names_become_dicts():
    checkpoint = {"ema": None, "args": None, "class_names": ["cat", "dog"]}
    assert validated(checkpoint, "x.pth") == {"class_names": {0: "cat", 1: "dog"}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 5),
        ("model", {1: torch.ones(1)}),
        ("model", {"w": 1.0}),
        ("ema", {"module": WEIGHTS}),
        ("args", ["--lr"]),
        ("args", {1: 2}),
        ("model_config", 7),
        ("class_names", 5),
        ("class_names", {0: 1}),
        ("class_names", [None]),
        ("category_ids", {0: "7"}),
        ("epoch", 0.5),
        ("epoch", -5),
        ("epoch", True),
        ("best_ap", "x"),
        ("steps", "x"),
        ("progress", {**PROGRESS, "batch": "abc"}),
        ("progress", {**PROGRESS, "batch": -1}),
        ("progress", {**PROGRESS, "meters": 5}),
        ("progress", {**PROGRESS, "meters": {"loss": {**METER, "window": ["x"]}}}),
        ("progress", {**PROGRESS, "best_epoch": "x"}),
        ("progress", {**PROGRESS, "images": 3}),
        ("random", []),
        ("optimizer", {"state": {}}),
        ("optimizer", {"state": {}, "param_groups": [{**GROUP, "lr": "x"}]}),
        ("lr_scheduler", {"last_epoch": "x"}),
        ("lr_scheduler", {"step": 5}),
        ("learning", 5),
    ],
)
def test_malformed_entries_are_named(name, value, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=rf"x\.pth: its entry '{name}' is malformed: expect"):
        validated({**GOOD, name: value}, "x.pth")
    path = tmp_path / "x.pth"
    torch.save({**GOOD, name: value}, path)
    for command in (cli.train, cli.evaluate):
        assert command(["--resume", str(path), "--device", "cpu"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_config", {"hidden_dim": 32.0}),
        ("model_config", {"num_queries": 10**13}),
        ("model_config", {"backbone": 5}),
        ("model_config", {"pre_norm": 1}),
        ("query_embed.weight", torch.ones(3)),
        ("class_embed.weight", torch.tensor(1.0)),
        ("transformer.decoder.layers.0.linear1.weight", torch.ones(3)),
    ],
)
def test_models_that_cannot_be_are_named(name, value, tmp_path, capsys):
    weights = {
        "class_embed.weight": torch.ones(4, 8),
        "query_embed.weight": torch.ones(5, 8),
        "backbone.0.body.layer3.5.conv1.weight": torch.ones(1, 1, 1, 1),
        "transformer.decoder.layers.0.linear1.weight": torch.ones(16, 8),
    }
    checkpoint = {"model": weights}
    (checkpoint if name == "model_config" else weights)[name] = value
    path = tmp_path / "x.pth"
    torch.save(checkpoint, path)
    for command in (cli.train, cli.evaluate):
        assert command(["--resume", str(path), "--device", "cpu"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            r"no checkpoint: it starts with b'version",
        ),
        (b"<html>", r"no checkpoint: it starts with b'<html>'"),
        (b"", "the file is empty"),
    ],
)
def test_files_of_another_kind_are_not_called_hostile(content, message, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_digests_of_strange_values_are_a_mismatch(tmp_path):
    path = tmp_path / "x.pth"
    endless = []
    endless.append(endless)
    for value in (endless, torch.ones(2, 2).to_sparse()):
        torch.save({"note": value, "sha256": {"note": "0" * 64}}, path)
        with pytest.raises(CheckpointError, match="damaged: the checksum of note"):
            read_checkpoint(path)
