# SPDX-License-Identifier: Apache-2.0
"""Flags: the original's names and defaults, presets, and what a checkpoint answers."""

import pytest

from detr_fast.command_line import parse
from detr_fast.config import Stored, UsageError, configure, output_dir

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
        "--backbone resnet101 --dilation --position_embedding sine --enc_layers 6 "
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


RUN = {"dataset_file": "coco", "coco_path": "there", "lr": 5e-4, "batch_size": 7, "image_size": 320}
STORED = Stored(
    {"backbone": "resnet101", "num_queries": 40}, {**RUN, "output_dir": "o", "eval": True}
)


def test_a_resumed_run_has_the_flags_of_before():
    ours = config("--resume o/x.pth --batch_size 3 --epochs 9", STORED)
    assert (ours.backbone, ours.dataset_file, ours.coco_path) == ("resnet101", "coco", "there")
    assert (ours.lr, ours.batch_size, ours.epochs, ours.output_dir) == (5e-4, 3, 9, "o")
    assert not ours.eval
    assert config("--resume elsewhere/x.pth", STORED).output_dir == ""  # it has moved, or lies
    assert config("--resume x.pth --coco_path here", STORED).coco_path == "here"
    own = "--train_images a --train_annotations b --val_images c --val_annotations d"
    assert config(f"--resume x.pth {own}", STORED).coco_path == ""


def test_an_evaluation_takes_model_and_data_from_the_checkpoint():
    ours = config("--resume x.pth --eval", STORED)
    assert (ours.backbone, ours.coco_path, ours.image_size) == ("resnet101", "there", 320)
    assert (ours.lr, ours.batch_size, ours.output_dir) == (1e-4, 2, "")


def test_finetuning_takes_the_architecture_alone():
    ours = config("--finetune x.pth --coco_path here", STORED)
    assert (ours.backbone, ours.num_queries, ours.coco_path) == ("resnet101", 40, "here")
    assert (ours.lr, ours.batch_size, ours.output_dir) == (1e-4, 2, "")
    assert config("--finetune x.pth --coco_path here --num_queries 50", STORED).num_queries == 50


def test_other_data_than_those_of_the_run_mean_finetuning():
    ours = config(
        "--resume x.pth --coco_path here", STORED._replace(run={"dataset_file": "shapes"})
    )
    assert (ours.resume, ours.finetune, ours.batch_size) == ("", "x.pth", 2)


def test_the_drop_of_the_learning_rate_may_be_a_share_of_the_epochs():
    assert config("--epochs 30 --lr_drop 0.67").lr_drop_epoch == 20
    assert config("--epochs 1 --lr_drop 0.1").lr_drop_epoch == 1
    assert config("--epochs 30 --lr_drop 25").lr_drop_epoch == 25


def test_stored_values_that_no_flag_could_have_are_passed_over():
    run = {**RUN, "lr": "fast", "evaluator": "mine", "batch_size": True, "unheard_of": 1}
    ours = config("--resume x.pth", Stored({}, {**run, "batch_size": 7.5}))
    assert (ours.lr, ours.evaluator, ours.batch_size, ours.image_size) == (1e-4, "hotcoco", 2, 320)


def test_the_folder_that_a_command_line_writes_to():
    assert output_dir({}) == "outputs/shapes"
    assert output_dir({"output_dir": "o", "coco_path": "C"}) == "o"
    assert output_dir({"coco_path": "C"}) == output_dir({"train_images": "C"}) == ""


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="this version of detr_fast runs one process"):
        config("")


def test_data_path_is_another_name_of_coco_path():
    assert config("--data_path D").coco_path == "D"
    assert config("--data_path D").dataset_file == "coco"


def test_evaluation_writes_only_where_it_is_told():
    assert config("--resume x.pth --eval", Stored({}, {"dataset_file": "shapes"})).output_dir == ""
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
        ("--bucket 0", "--bucket: expected at least 1, got 0"),
        ("--lr nan", "--lr: expected a finite number, got nan"),
        ("--set_cost_bbox inf", "--set_cost_bbox: expected a finite number, got inf"),
        ("--eos_coef -1", "--eos_coef: expected at least 0, got -1.0"),
        ("--set_cost_class 0 --set_cost_bbox 0 --set_cost_giou 0", "all of them are 0"),
        (
            "--coco_path C --position_embedding learned --dilation",
            "images are up to 1333 pixels long: lower --image_size",
        ),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--nheads 7", "--hidden_dim: expected a multiple of nheads"),
        ("--batch 4", "unrecognized arguments: --batch 4"),
        ("--world_size 2", "runs one process"),
        ("--save_json", "--save_json needs --output_dir"),
        ("--train_images a", "--train_images needs --train_annotations, --val_images, --val_ann"),
        ("--coco_path a --val_images b", "--coco_path and --val_images both name the data"),
        ("--dataset_file coco", "or --train_images, --train_annotations, --val_images, --val_ann"),
        ("--resume a --finetune b", "give one of the two"),
        ("--eval --resume a --finetune b", "give one of the two"),
        ("--ema_decay 1", "--ema_decay: expected less than 1, got 1.0"),
        ("--seed 4294967296", r"--seed: expected less than 2\*\*32"),
        ("--lr_drop 0", "--lr_drop: expected epochs or a share of them, got 0.0"),
        ("--keep_checkpoints 0", "--keep_checkpoints: expected at least 1, got 0"),
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
        ("--num_queries 50", {"num_queries": 100}),
    ],
)
def test_contradictions_of_the_checkpoint_are_named(line, stored):
    with pytest.raises(UsageError, match=r"contradicts the checkpoint x\.pth, which has"):
        config(f"{line} --resume x.pth", Stored(stored, {}))
    if "num_queries" not in stored:
        with pytest.raises(UsageError, match=r"contradicts the checkpoint x\.pth, which has"):
            config(f"{line} --finetune x.pth", Stored(stored, {}))
