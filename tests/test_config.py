# SPDX-License-Identifier: Apache-2.0
"""Flags: the original's names and defaults, presets, and what a checkpoint answers."""

import pytest

from detr_fast.config import UsageError, configure, parse

# flag -> default of facebookresearch/detr's main.py
ORIGINAL = {
    "lr": 1e-4,
    "lr_backbone": 1e-5,
    "batch_size": 2,
    "weight_decay": 1e-4,
    "epochs": 300,
    "lr_drop": 200,
    "clip_max_norm": 0.1,
    "backbone": "resnet50",
    "dilation": False,
    "position_embedding": "sine",
    "enc_layers": 6,
    "dec_layers": 6,
    "dim_feedforward": 2048,
    "hidden_dim": 256,
    "dropout": 0.1,
    "nheads": 8,
    "num_queries": 100,
    "pre_norm": False,
    "masks": False,
    "aux_loss": True,
    "set_cost_class": 1,
    "set_cost_bbox": 5,
    "set_cost_giou": 2,
    "mask_loss_coef": 1,
    "dice_loss_coef": 1,
    "bbox_loss_coef": 5,
    "giou_loss_coef": 2,
    "eos_coef": 0.1,
    "dataset_file": "coco",
    "remove_difficult": False,
    "output_dir": "",
    "seed": 42,
    "resume": "",
    "start_epoch": 0,
    "eval": False,
    "num_workers": 2,
    "world_size": 1,
    "dist_url": "env://",
}


def flags(line):
    return parse("train.py", "", line.split())


def config(line, stored=None):
    return configure(flags(line), stored)


def test_defaults_with_coco_are_the_originals():
    ours = config("--coco_path COCO")
    assert {name: getattr(ours, name) for name in ORIGINAL} == ORIGINAL
    assert ours.device == "auto"


@pytest.mark.parametrize(
    "line",
    [
        "--batch_size 4 --epochs 2 --coco_path COCO --output_dir outputs",
        "--batch_size 2 --no_aux_loss --eval --resume detr-r50-e632da11.pth --coco_path COCO",
        "--lr 1e-4 --lr_backbone 1e-5 --weight_decay 1e-4 --lr_drop 200 --clip_max_norm 0.1 "
        "--backbone resnet101 --dilation --position_embedding learned --enc_layers 6 "
        "--dec_layers 6 --dim_feedforward 2048 --hidden_dim 256 --dropout 0.1 --nheads 8 "
        "--num_queries 100 --pre_norm --set_cost_class 1 --set_cost_bbox 5 --set_cost_giou 2 "
        "--mask_loss_coef 1 --dice_loss_coef 1 --bbox_loss_coef 5 --giou_loss_coef 2 "
        "--eos_coef 0.1 --dataset_file coco --coco_path COCO "
        "--coco_panoptic_path P --remove_difficult --device cuda --seed 42 --start_epoch 0 "
        "--num_workers 2 --world_size 1 --dist_url env://",
    ],
)
def test_command_lines_of_the_original_are_taken(line):
    config(line)


def test_without_data_the_shapes_preset_runs():
    ours = config("")
    assert (ours.dataset_file, ours.model, ours.backbone) == ("shapes", "detr_tiny", "tiny")
    assert ours.output_dir == "outputs/shapes"
    assert ours.headline().startswith("preset shapes: training detr_tiny on generated images")


def test_the_command_line_wins_over_model_and_preset():
    ours = config("--epochs 3 --num_queries 50 --output_dir elsewhere")
    assert (ours.epochs, ours.num_queries, ours.output_dir) == (3, 50, "elsewhere")
    assert ours.backbone == "tiny"
    assert config("--model detr_resnet101_dc5 --hidden_dim 128 --coco_path COCO").hidden_dim == 128
    assert config("--model detr_resnet101_dc5 --coco_path COCO").dilation
    assert config("--model detr_resnet50").backbone == "resnet50"


def test_a_checkpoint_answers_what_the_command_line_leaves_open():
    stored = {"backbone": "resnet101", "dataset_file": "coco", "coco_path": "there"}
    ours = config("--resume x.pth --eval", stored)
    assert (ours.backbone, ours.dataset_file, ours.coco_path) == ("resnet101", "coco", "there")
    assert config("--resume x.pth --coco_path here", stored).coco_path == "here"


def test_evaluation_writes_only_where_it_is_told():
    assert config("--resume x.pth --eval", {"dataset_file": "shapes"}).output_dir == ""
    assert config("--resume x.pth --eval --output_dir o").output_dir == "o"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--masks", "panoptic heads are not in this version"),
        ("--frozen_weights w.pth --coco_path C", "panoptic heads are not in this version"),
        ("--dataset_file coco_panoptic --coco_path C", "panoptic heads are not in this version"),
        ("--dataset_file voc", "--dataset_file: expected one of coco, shapes, got 'voc'"),
        ("--dataset_file coco", "--dataset_file coco needs --coco_path"),
        ("--eval", "evaluation needs --resume"),
        ("--batch_size 0", "--batch_size: expected at least 1, got 0"),
        ("--lr nan", "--lr: expected at least 0, got nan"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--nheads 7", "--hidden_dim: expected a multiple of nheads"),
        ("--batch 4", "unrecognized arguments: --batch 4"),
        ("--world_size 2", "runs one process"),
        ("--save_json", "--save_json needs --output_dir"),
    ],
)
def test_mistakes_are_named(line, message):
    if line == "--save_json":
        line += " --resume x.pth --eval"
    with pytest.raises(UsageError, match=message):
        config(line)


@pytest.mark.parametrize(
    ("line", "stored"),
    [
        ("--backbone resnet101", {"backbone": "resnet50"}),
        ("--model detr_tiny", {"backbone": "resnet50"}),
        ("--coco_path COCO", {"dataset_file": "shapes"}),
        ("--num_queries 50", {"num_queries": 100}),
    ],
)
def test_contradictions_of_the_checkpoint_are_named(line, stored):
    with pytest.raises(UsageError, match=r"contradicts the checkpoint x\.pth, which has"):
        config(f"{line} --resume x.pth", stored)
