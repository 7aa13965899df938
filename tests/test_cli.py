# SPDX-License-Identifier: Apache-2.0
"""What a user's mistakes end with: one line that names the remedy, exit code 2."""

import argparse
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detr_fast import cli
from detr_fast.models import detr_resnet50, detr_tiny

ROOT = Path(__file__).resolve().parents[1]


def run(capsys, command, line):
    code = getattr(cli, command)(line.split())
    return code, capsys.readouterr()


@pytest.mark.parametrize("tool", ["train", "eval"])
def test_tools_and_entry_point_show_every_flag(tool):
    for program in ([ROOT / "tools" / f"{tool}.py"], ["-m", "detr_fast", tool]):
        result = subprocess.run(
            [sys.executable, *program, "--help"], capture_output=True, text=True, check=True
        )
        assert "--no_aux_loss" in result.stdout
        assert "--resume" in result.stdout


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        ("train", "--masks", "panoptic heads are not in this version"),
        ("train", "--no_such_flag", "unrecognized arguments: --no_such_flag"),
        (
            "train",
            "--coco_path /nowhere",
            "/nowhere does not exist: name the folder of a data set, or name the files with",
        ),
        ("train", "--device cuda:99", "--device cuda:99"),
        ("evaluate", "", "evaluation needs --resume"),
        ("evaluate", "--resume /nowhere.pth", "/nowhere.pth: no such file"),
        (
            "main",
            "trian",
            "convert, export, report or profile, got 'trian'",
        ),
    ],
)
def test_mistakes_end_with_one_line(capsys, command, line, message):
    code, printed = run(capsys, command, line)
    assert code == 2
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_hostile_checkpoint_is_refused(capsys, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "hostile.pth"
    with path.open("wb") as file:
        pickle.dump({"model": Hostile()}, file)
    code, printed = run(capsys, "evaluate", f"--resume {path}")
    assert code == 2
    assert str(path) in printed.err
    assert not (tmp_path / "ran").exists()


def test_a_failed_download_of_the_backbone_names_the_flag(capsys, monkeypatch, test_data):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    code, printed = run(capsys, "train", f"--coco_path {test_data}/coco125 --device cpu")
    assert code == 2
    assert "--backbone_weights none" in printed.err


def test_a_checkpoint_of_other_classes_is_named(capsys, tmp_path, test_data):
    model = detr_tiny(num_classes=7)
    path = tmp_path / "seven.pth"
    torch.save({"model": model.state_dict(), "model_config": vars(model.config)}, path)
    code, printed = run(capsys, "evaluate", f"--resume {path} --coco_path {test_data}/coco125")
    assert code == 2
    assert "was trained for 7 classes, the data have category ids up to 90" in printed.err


def test_a_checkpoint_of_the_original_is_evaluated_without_model_flags(
    capsys, tmp_path, test_data, monkeypatch
):
    """{'model', 'args'} as facebookresearch/detr writes it: its Namespace names the model."""
    monkeypatch.setattr(cli, "evaluate_checkpoint", lambda config, checkpoint: seen.append(config))
    seen = []
    args = argparse.Namespace(
        backbone="resnet50", dilation=False, nheads=8, dataset_file="coco", coco_path="/elsewhere"
    )
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": detr_resnet50().state_dict(), "args": args}, path)
    line = f"--batch_size 2 --no_aux_loss --eval --resume {path} --coco_path {test_data}/coco125"
    code, _ = run(capsys, "train", line)
    assert code == 0
    assert seen[0].num_queries == 100
    assert not seen[0].aux_loss
    assert seen[0].coco_path == f"{test_data}/coco125"

    code, printed = run(capsys, "train", f"{line} --backbone resnet101")
    assert code == 2
    assert "--backbone: 'resnet101' contradicts the checkpoint" in printed.err
