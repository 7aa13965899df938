# SPDX-License-Identifier: Apache-2.0
"""The training loop on a handful of generated images and a model of a few thousand weights."""

import copy
import dataclasses
import functools
import json
import os
import signal

import pytest
import torch
from torch.testing import assert_close

from detr_fast import cli
from detr_fast.command_line import parse
from detr_fast.config import configure
from detr_fast.criterion import SetCriterion
from detr_fast.data.shapes import ShapesDetection
from detr_fast.engine import build, datasets, train
from detr_fast.engine.batch import DeviceBatches, model_input
from detr_fast.engine.diagnose import why_no_ap
from detr_fast.engine.evaluate import evaluate, evaluate_checkpoint
from detr_fast.engine.optim import Learner, build_optimizer, build_schedule
from detr_fast.engine.precision import Precision
from detr_fast.engine.step import TrainingStep
from detr_fast.models import detr_resnet50
from detr_fast.models.checkpoint import read_checkpoint

SMALL = (
    "--hidden_dim 32 --nheads 4 --enc_layers 1 --dec_layers 2 --dim_feedforward 32 "
    "--num_queries 8 --batch_size 4 --device cpu"
)
STEPS = 3  # per epoch, of 4 images


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    lengths = {"train": 4 * STEPS + 1, "val": 6}

    @functools.wraps(ShapesDetection)
    def few(image_set, augment, pixels):
        return ShapesDetection(image_set, augment, lengths[image_set], pixels)

    monkeypatch.setattr(datasets, "ShapesDetection", few)


def config(line):
    return configure(parse("train.py", "", f"{SMALL} {line}".split()))


def fit(line):
    """Train as the command line says, from the start or from its checkpoint."""
    return cli.train(f"{SMALL} {line}".split())


def test_a_run_leaves_everything_in_its_folder(tmp_path, capsys):
    assert fit(f"--epochs 2 --lr_drop 1 --output_dir {tmp_path}") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("preset shapes: training detr_tiny")
    assert f"Epoch: [1]  [0/{STEPS}]  eta: " in printed
    names = ["checkpoint.pth", "checkpoint0000.pth", "checkpoint0001.pth", "checkpoint_best.pth"]
    names += ["checkpoint_previous.pth", "curves.png", "detections.png", "eval", "log.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["000.pth", "latest.pth"]

    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1]
    assert [entry["train_lr"] for entry in log] == pytest.approx([1e-3, 1e-4])
    terms = ["loss", "class_error", "loss_ce", "loss_bbox_0", "loss_giou_unscaled"]
    assert {f"{part}_{name}" for part in ("train", "test") for name in terms} <= log[0].keys()
    assert len(log[0]["test_coco_eval_bbox"]) == 12

    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    assert checkpoint["epoch"] == 1
    assert checkpoint["class_names"] == {0: "disc", 1: "rectangle", 2: "triangle", 3: "cross"}
    assert checkpoint["category_ids"] == {0: 0, 1: 1, 2: 2, 3: 3}
    assert read_checkpoint(tmp_path / "checkpoint_previous.pth")["epoch"] == 0
    assert checkpoint["model_config"]["num_queries"] == 8
    trainable = sum(group["params"].__len__() for group in checkpoint["optimizer"]["param_groups"])
    assert trainable == len(checkpoint["optimizer"]["state"])


def test_evaluation_of_the_checkpoint_repeats_the_last_ap(tmp_path, capsys):
    fit(f"--epochs 1 --output_dir {tmp_path}")
    trained = capsys.readouterr().out.partition("IoU metric: bbox")[2].splitlines()[:13]
    command = f"--resume {tmp_path}/checkpoint.pth --output_dir {tmp_path}/eval --save_json"
    assert cli.evaluate([*command.split(), "--per_class", "--device", "cpu"]) == 0
    evaluated = capsys.readouterr().out.partition("IoU metric: bbox")[2]
    assert len(trained) == 13
    assert evaluated.splitlines()[:13] == trained
    assert "triangle" in evaluated
    detections = json.loads((tmp_path / "eval/detections.json").read_text())
    assert len(detections) == 6 * 8
    assert {"image_id", "category_id", "bbox", "score"} == detections[0].keys()
    assert "precision" in read_checkpoint(tmp_path / "eval/eval.pth")


def test_evaluators_agree(tmp_path, capsys):
    fit(f"--epochs 1 --output_dir {tmp_path}")
    tables = []
    for evaluator in ("hotcoco", "pycocotools"):
        given = parse("", "", f"--eval --resume {tmp_path}/checkpoint.pth --device cpu".split())
        checkpoint = read_checkpoint(given["resume"])
        given["evaluator"] = evaluator
        settings = configure(given, build.stored_flags(checkpoint))
        tables.append(evaluate_checkpoint(settings, checkpoint).result.stats)
    assert tables[0] == pytest.approx(tables[1], abs=1e-9)


def learning(line):
    """What a training of the command line consists of, and a copy of its model."""
    settings = config(line)
    device = build.build_device(settings)
    [dataset] = datasets.build_datasets(settings, ("train",))
    dataset.augment = False
    model = build.build_model(settings, dataset.num_classes)
    twin = copy.deepcopy(model)
    criterion = build.build_criterion(settings, dataset.num_classes)
    loader = build.build_loader(dataset, settings, device, shuffle=False)
    batches = [
        dataclasses.replace(batch, pixels=model_input(batch.images, torch.float32).tensors)
        for batch in loader
    ][:STEPS]
    learner = Learner(model, settings)
    train.train_one_epoch(
        TrainingStep(learner, criterion, Precision(device)),
        DeviceBatches(batches, criterion, device),
        epoch=0,
        print_freq=1,
        stop=train.StopRequest(),
    )
    return learner, twin, criterion, batches


def without_noise(named):
    """The bias of the keys drops out of a softmax: of its rounding errors AdamW makes steps."""
    named = {name: tensor.detach().clone() for name, tensor in named}
    for name, tensor in named.items():
        if name.endswith("in_proj_bias"):
            tensor.view(3, -1)[1] = 0
    return named


def test_steps_equal_the_original_loop():
    """Weights after an epoch are those of the published loop, written out."""
    learner, twin, criterion, batches = learning("--lr_drop 1 --lr_backbone 1e-4")
    model = learner.model
    groups = [
        {"params": [p for n, p in twin.named_parameters() if "backbone" not in n]},
        {"params": [p for n, p in twin.named_parameters() if "backbone" in n], "lr": 1e-4},
    ]
    expected = torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-4)
    twin.train()
    for batch in batches:
        losses = criterion(twin(batch.images), batch.targets)
        weights = criterion.weight_dict
        total = sum(losses[name] * weights[name] for name in losses if name in weights)
        expected.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        expected.step()
    assert_close(
        without_noise(model.state_dict().items()), without_noise(twin.state_dict().items())
    )


def test_accumulated_gradients_are_averaged_and_rates_rise():
    line = (
        "--accumulate_steps 2 --warmup_steps 4 --ema_decay 0.5 --weight_decay 0 --lr_backbone 1e-4"
    )
    learner, twin, criterion, batches = learning(line)
    expected = build_optimizer(twin, lr=1e-3, lr_backbone=1e-4, weight_decay=0)
    average = None
    twin.train()
    for step, window in enumerate((batches[:2], batches[2:]), start=1):
        expected.zero_grad()
        for batch in window:
            losses = criterion(twin(batch.images), batch.targets)
            weights = criterion.weight_dict
            total = sum(losses[name] * weights[name] for name in losses if name in weights)
            (total / len(window)).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        for group, rate in zip(expected.param_groups, (1e-3, 1e-4), strict=True):
            group["lr"] = rate * step / 4
        expected.step()
        now = {name: p.detach().clone() for name, p in twin.named_parameters()}
        # the second update counts (1 + 1) / (10 + 1), which is less than the decay asked for
        memory = 2 / 11
        average = average and {n: a * memory + now[n] * (1 - memory) for n, a in average.items()}
        average = average or now
    model = learner.model.state_dict()
    assert_close(without_noise(model.items()), without_noise(twin.state_dict().items()))
    followed = without_noise(learner.evaluated.named_parameters())
    assert_close(followed, without_noise(average.items()))
    assert learner.steps == 2
    assert learner.rate == pytest.approx(5e-4)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [1e-3, 1e-4]
    assert learner.state_dict()["ema"].keys() == learner.model.state_dict().keys()


def test_frozen_parts_stay_as_they_are(tmp_path):
    fit(f"--epochs 1 --output_dir {tmp_path}/a")
    fit(f"--epochs 1 --output_dir {tmp_path}/b --resume {tmp_path}/a/checkpoint.pth")
    again = (
        f"--finetune {tmp_path}/a/checkpoint.pth --freeze backbone.0,transformer.decoder.layers.1"
    )
    assert fit(f"--epochs 1 --output_dir {tmp_path}/c {again}") == 0
    before, after = (read_checkpoint(tmp_path / f / "checkpoint.pth")["model"] for f in "ac")
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    frozen = ("backbone.0.", "transformer.decoder.layers.1.")
    assert {name for name in before if name not in changed} >= {
        name
        for name in before
        if name.startswith(frozen)  # statistics of batch norm, too
    }
    assert {"transformer.decoder.layers.0.linear1.weight", "class_embed.weight"} <= changed


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("backbon", "--freeze backbon: no such part; the model has transformer, class_embed"),
        (
            "backbone,transformer,class_embed,bbox_embed,query_embed,input_proj",
            "nothing is left to learn",
        ),
    ],
)
def test_wrong_parts_to_freeze_are_named(parts, message, capsys):
    assert fit(f"--freeze {parts}") == 2
    assert message in capsys.readouterr().err


def test_early_stopping_ends_a_run_without_a_better_ap(tmp_path, capsys, monkeypatch):
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])

    def scored(*args, **kwargs):
        evaluation = evaluate(*args, **kwargs)
        stats = [next(scores), *evaluation.result.stats[1:]]
        return evaluation._replace(result=dataclasses.replace(evaluation.result, stats=stats))

    monkeypatch.setattr(train, "evaluate", scored)
    assert fit(f"--epochs 9 --patience 2 --output_dir {tmp_path}") == 0
    assert "stopped early: no AP above 0.300 (epoch 1) for 2 epochs" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "checkpoint_best.pth")["epoch"] == 1
    assert read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 3
    assert fit(f"--epochs 9 --output_dir {tmp_path} --resume auto") == 0  # still out of patience
    assert read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 3


def test_the_average_is_what_is_evaluated(tmp_path, capsys):
    fit(f"--epochs 1 --ema_decay 0.999 --output_dir {tmp_path}")
    trained = capsys.readouterr().out.partition("IoU metric: bbox")[2][:1000]
    assert cli.evaluate(f"--resume {tmp_path}/checkpoint.pth --device cpu".split()) == 0
    evaluated = capsys.readouterr().out.partition("IoU metric: bbox")[2][:1000]
    assert trained[:900] == evaluated[:900]
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    name = "class_embed.weight"
    assert not torch.equal(checkpoint["model"][name], checkpoint["ema"][name])


def test_resume_brings_the_flags_of_the_run(tmp_path, capsys):
    fit(f"--epochs 1 --lr 2e-3 --clip_max_norm 0.5 --output_dir {tmp_path}")
    fit(f"--epochs 2 --lr_backbone 5e-4 --output_dir {tmp_path} --resume auto")
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    assert checkpoint["args"]["clip_max_norm"] == 0.5
    rates = [group["lr"] for group in checkpoint["optimizer"]["param_groups"]]
    assert rates == pytest.approx([2e-3, 5e-4])


def test_finetuning_starts_at_epoch_0_with_the_presets_flags(tmp_path, capsys):
    fit(f"--epochs 2 --lr 2e-3 --output_dir {tmp_path}/a")
    start = f"--finetune {tmp_path}/a/checkpoint.pth --num_queries 5"
    assert fit(f"{start} --epochs 1 --output_dir {tmp_path}/b") == 0
    printed = capsys.readouterr().out
    assert "queries: the checkpoint has 8, the model 5: they start anew" in printed
    checkpoint = read_checkpoint(tmp_path / "b/checkpoint.pth")
    assert checkpoint["epoch"] == 0
    assert checkpoint["args"]["lr"] == 1e-3
    assert {int(entry["step"]) for entry in checkpoint["optimizer"]["state"].values()} == {STEPS}


def test_one_line_starts_a_finetuning_and_goes_on_with_it(tmp_path, capsys):
    fit(f"--epochs 1 --output_dir {tmp_path}/a")
    line = f"--finetune {tmp_path}/a/checkpoint.pth --resume auto --output_dir {tmp_path}/b"
    assert fit(f"{line} --epochs 1") == 0
    assert "starting anew" in capsys.readouterr().out
    assert fit(f"{line} --epochs 2") == 0
    printed = capsys.readouterr().out
    assert "Epoch: [1]" in printed
    assert "Epoch: [0]" not in printed


def test_a_training_without_ap_says_what_to_look_at():
    record = {
        "epoch": 4,
        "test_coco_eval_bbox": [0.0] * 12,
        "test_class_error": 100.0,
        "test_loss_giou_unscaled": 1.1,
        "test_loss": 30.0,
        "train_loss": 5.0,
        "train_lr": 1e-4,
    }
    said = why_no_ap(record, 100, config("--epochs 50"))
    assert said.startswith("AP50 is 0.000 after 5 epochs, 100 updates")
    parts = ("--check_data", "[x, y, width, height]", "--finetune", "too few images", "rate 0.0001")
    assert all(part in said for part in parts)
    assert why_no_ap({**record, "epoch": 3}, 100, config("--epochs 50")) == ""
    assert why_no_ap({**record, "epoch": 3}, 100, config("--epochs 4")) != ""
    found = {**record, "test_coco_eval_bbox": [0.0, 0.01] + [0.0] * 10}
    assert why_no_ap(found, 100, config("--epochs 50")) == ""
    learned = {**record, "test_class_error": 20.0, "test_loss_giou_unscaled": 0.4, "train_loss": 29}
    said = why_no_ap(learned, 5000, config("--epochs 50"))
    assert "--check_data" not in said
    assert "[x, y" not in said
    assert "too few" not in said


def test_resume_continues_where_the_run_ended(tmp_path, capsys):
    fit(f"--epochs 1 --output_dir {tmp_path}")
    fit(f"--epochs 3 --output_dir {tmp_path} --resume {tmp_path}/checkpoint.pth")
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    state = read_checkpoint(tmp_path / "checkpoint.pth")["optimizer"]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {3 * STEPS}
    fit(f"--epochs 3 --output_dir {tmp_path} --resume {tmp_path}/checkpoint.pth")
    assert "nothing to train" in capsys.readouterr().out
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize("during", ["train", "eval"])
def test_interrupt_leaves_a_usable_checkpoint(tmp_path, capsys, monkeypatch, during):
    forward = SetCriterion.forward
    seen = []

    def interrupted(self, outputs, targets):
        seen.append(self.training)
        if seen[-1] == (during == "train") and seen.count(seen[-1]) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, outputs, targets)

    monkeypatch.setattr(SetCriterion, "forward", interrupted)
    handler = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    assert fit(f"--epochs 2 --output_dir {tmp_path}") == 130
    assert f"--resume {tmp_path}/checkpoint.pth" in capsys.readouterr().out
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    steps = {int(entry["step"]) for entry in checkpoint["optimizer"]["state"].values()}
    # in training the step in hand is finished; --resume goes on with the next one
    place = (checkpoint["epoch"], checkpoint["progress"]["batch"], steps)
    # in evaluation it is broken off, and comes again
    assert place == ((-1, 2, {2}) if during == "train" else (-1, STEPS, {STEPS}))
    assert signal.getsignal(signal.SIGINT) is handler
    again = f"--epochs 1 --output_dir {tmp_path} --resume {tmp_path}/checkpoint.pth"
    assert fit(again) == 0
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    assert checkpoint["epoch"] == 0
    steps = {int(entry["step"]) for entry in checkpoint["optimizer"]["state"].values()}
    assert steps == {STEPS}


def test_optimizer_has_the_originals_groups_and_schedule():
    model = detr_resnet50()
    optimizer = build_optimizer(model, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4)
    schedule = build_schedule(optimizer, lr_drop=2)
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    in_backbone = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    assert sizes == [41302368 - in_backbone, in_backbone]
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [[1e-4, 1e-5], [1e-4, 1e-5], pytest.approx([1e-5, 1e-6])]


def test_milestones_are_those_of_the_original():
    assert [e for e in range(300) if train.is_milestone(e, lr_drop=200)] == [99, 199, 299]


def test_too_few_images_are_named(tmp_path, capsys):
    assert fit(f"--batch_size 64 --output_dir {tmp_path}") == 2
    message = f"--batch_size 64: there are only {4 * STEPS + 1} training images"
    assert message in capsys.readouterr().err
