# SPDX-License-Identifier: Apache-2.0
"""``--backend reference``: the original's step; its runs and checkpoints are those of any other."""

import copy
import functools
import json

import pytest
import torch
from torch import nn

from detr_fast import cli, ops
from detr_fast.command_line import parse
from detr_fast.config import REFERENCE_FLAGS, Stored, UsageError, configure
from detr_fast.criterion import SetCriterion
from detr_fast.data.shapes import ShapesDetection
from detr_fast.engine import build, datasets, train
from detr_fast.engine.backend import Execution
from detr_fast.engine.batch import DeviceBatches
from detr_fast.engine.reference import ReferenceStep
from detr_fast.models.attention import ReferenceCrossAttention, ReferenceSelfAttention
from detr_fast.models.backbone import FrozenBatchNorm2d
from detr_fast.models.checkpoint import read_checkpoint
from tests.data.layout_writers import Picture, write_coco

SMALL = (
    "--model detr_tiny --hidden_dim 32 --nheads 4 --enc_layers 1 --dec_layers 2 "
    "--dim_feedforward 32 --num_queries 8 --batch_size 4 --device cpu"
)
STEPS = 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    lengths = {"train": 4 * STEPS + 1, "val": 6}

    @functools.wraps(ShapesDetection)
    def few(image_set, *args, **kwargs):
        return ShapesDetection(image_set, *args, **kwargs, length=lengths[image_set])

    monkeypatch.setattr(datasets, "ShapesDetection", few)


def config(line):
    return configure(parse("train.py", "", f"{SMALL} {line}".split()))


def fit(line):
    return cli.train(f"{SMALL} {line}".split())


def parts(line):
    """Configuration, model, criterion and batches of a command line."""
    settings = config(line)
    build.build_device(settings)
    [dataset] = datasets.build_datasets(settings, ("train",))
    model = build.build_model(settings, dataset.num_classes)
    criterion = build.build_criterion(settings, dataset.num_classes)
    loader = build.build_loader(dataset, settings, CPU, shuffle=True)
    return settings, model, criterion, DeviceBatches(loader, criterion, CPU)


def test_steps_are_those_of_the_original_loop():
    """The published loop written out; the same bits."""
    settings, model, criterion, batches = parts("--backend reference --lr_backbone 1e-4")
    twin = copy.deepcopy(model)
    groups = [
        {"params": [p for n, p in twin.named_parameters() if "backbone" not in n]},
        {"params": [p for n, p in twin.named_parameters() if "backbone" in n], "lr": 1e-4},
    ]
    expected = torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-4)
    batches = list(batches)
    step = Execution.of(settings, CPU).training_step(model, criterion)
    assert isinstance(step, ReferenceStep)
    model.train()
    twin.train()
    with ops.use_reference():
        for number, batch in enumerate(batches):
            values = step(batch, number, len(batches))
            losses = criterion(twin(batch.images), batch.targets)
            weights = criterion.weight_dict
            total = sum(losses[name] * weights[name] for name in losses if name in weights)
            expected.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            expected.step()
            assert values["loss"] == total.detach()
            for name, value in losses.items():
                assert values[f"{name}_unscaled"] == value.detach()
                if name in weights:
                    assert values[name] == value.detach() * weights[name]
    for (name, value), other in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    own, theirs = (x.param_groups[0] for x in (step.learner.optimizer, expected))
    assert {k: own[k] for k in theirs if k != "params"} == {
        k: theirs[k] for k in theirs if k != "params"
    }


def test_accumulation_and_average_are_those_of_the_fast_learner():
    line = "--accumulate_steps 2 --warmup_steps 4 --ema_decay 0.5 --clip_max_norm 1"
    ends = []
    for flags in ("--backend reference", "--amp off --padding official --compile off"):
        settings, model, criterion, batches = parts(f"{line} {flags}")
        step = Execution.of(settings, CPU).training_step(model, criterion)
        model.train()
        for number, batch in enumerate(batches):
            step(batch, number, len(batches))
        learner = step.learner
        assert (learner.steps, learner.rate) == (2, pytest.approx(5e-4))
        ends.append(learner.evaluated.state_dict())
    name = "query_embed.weight"
    torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-3, atol=1e-4)


def test_the_model_is_the_originals():
    model = parts("--backend reference")[1]
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert {type(m) for m in attentions} == {ReferenceSelfAttention, ReferenceCrossAttention}
    assert all(p.is_contiguous() for p in model.parameters())
    seen = []
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, out: seen.append((i[0], out)))
    model(torch.rand(2, 3, 64, 64))
    assert seen
    assert all(x.is_contiguous() for pair in seen for x in pair)

    large = config("--backend reference --dataset_file coco --coco_path x --backbone resnet50")
    normalised = []
    model = build.build_model(large, 4)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.register_forward_hook(lambda *_: normalised.append(1))
    model(torch.rand(1, 3, 32, 32))
    assert len(normalised) == 53  # each one by itself, behind its convolution


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    images = [
        Picture(f"{i}.jpg", 48 + i, 64 - i, [("bear", (i, 5, 20, 20)), ("cup", (2, 30, 9, 8))])
        for i in range(9)
    ]
    return write_coco(tmp_path_factory.mktemp("data"), {"train": images, "val": images[:3]})


@pytest.mark.parametrize("own_data", [False, True])
def test_images_are_normalised_floats_from_the_loader(pictures, own_data):
    line = "--backend reference --num_workers 0"
    if own_data:
        line += f" --data_path {pictures} --image_size 64"
    batches = parts(line)[3]
    for images, *_ in batches:
        assert images.tensors.dtype == torch.float32
        assert images.tensors.is_contiguous()
        assert images.tensors.min() < -1  # of a mean of 0
        if own_data:  # padded to the largest
            assert images.tensors.shape[-2:] == tuple(images.sizes.amax(0).tolist())


def test_all_ops_are_reference_twins_in_training_and_evaluation(tmp_path, monkeypatch):
    seen = []
    forward = SetCriterion.forward

    def watched(self, outputs, targets):
        seen.append((self.training, ops.backend()["cpu"].split()[0]))
        return forward(self, outputs, targets)

    monkeypatch.setattr(SetCriterion, "forward", watched)
    assert fit(f"--backend reference --epochs 1 --output_dir {tmp_path}") == 0
    assert set(seen) == {(True, "reference"), (False, "reference")}
    seen.clear()
    line = f"--resume {tmp_path}/checkpoint.pth --device cpu"
    assert cli.evaluate([*line.split(), "--backend", "reference"]) == 0
    assert set(seen) == {(False, "reference")}
    seen.clear()
    assert cli.evaluate(line.split()) == 0
    assert set(seen) == {(False, "compiled")}


@pytest.mark.parametrize(
    "flags", ["--amp bf16", "--padding bucket", "--bucket 32", "--compile on", "--cuda_graphs on"]
)
def test_flags_that_contradict_it_are_named(flags, capsys):
    assert fit(f"--backend reference {flags}") == 2
    message = f"{flags} contradicts --backend reference, the original's step: leave one of the two"
    assert message in capsys.readouterr().err


def test_flags_that_say_the_same_are_taken():
    for value in ("auto", "off"):
        settings = config(f"--backend reference --amp {value} --compile {value} --padding official")
        assert {name: getattr(settings, name) for name in REFERENCE_FLAGS} == REFERENCE_FLAGS


def test_its_flags_go_when_a_run_changes_the_back_end():
    stored = Stored({}, {**vars(config("--backend reference")), "epochs": 7})
    settings = configure({"resume": "x.pth", "backend": "fast"}, stored)
    defaults = config("")
    speed = {"backend": "fast", "bucket": defaults.bucket}
    speed |= {name: getattr(defaults, name) for name in REFERENCE_FLAGS}
    assert settings.epochs == 7
    assert {name: getattr(settings, name) for name in speed} == speed
    assert configure({"resume": "x.pth"}, stored).backend == "reference"
    stored = Stored({}, vars(config("--amp bf16 --compile on")))
    settings = configure({"resume": "x.pth", "backend": "reference"}, stored)
    assert {name: getattr(settings, name) for name in REFERENCE_FLAGS} == REFERENCE_FLAGS
    with pytest.raises(UsageError, match="--amp fp16 contradicts"):
        configure({"resume": "x.pth", "backend": "reference", "amp": "fp16"}, stored)


@pytest.mark.parametrize(("first", "second"), [("reference", "fast"), ("fast", "reference")])
def test_a_run_goes_on_under_the_other_back_end(tmp_path, first, second, capsys):
    assert fit(f"--backend {first} --epochs 1 --ema_decay 0.9 --output_dir {tmp_path}") == 0
    capsys.readouterr()
    for backend in (first, second):  # the same AP of the same weights
        line = f"--resume {tmp_path}/checkpoint.pth --device cpu --backend {backend}"
        assert cli.evaluate(line.split()) == 0
    tables = [part[:900] for part in capsys.readouterr().out.split("IoU metric: bbox")[1:]]
    assert tables[0] == tables[1]
    assert fit(f"--backend {second} --epochs 3 --output_dir {tmp_path} --resume auto") == 0
    assert fit(f"--backend {first} --epochs 4 --output_dir {tmp_path} --resume auto") == 0
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3]
    assert log[0]["train_loss"] > log[3]["train_loss"] > 0
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    assert checkpoint["steps"] == 4 * STEPS
    steps = {int(entry["step"]) for entry in checkpoint["optimizer"]["state"].values()}
    assert steps == {4 * STEPS}


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    forward = SetCriterion.forward
    weights = []

    def spoilt(self, outputs, targets):
        losses = forward(self, outputs, targets)
        weights.append(outputs["pred_logits"].detach().clone())
        return {**losses, "loss_giou": losses["loss_giou"] * torch.nan}

    monkeypatch.setattr(SetCriterion, "forward", spoilt)
    runs = []
    fit_as_it_is = train.Run.__call__
    monkeypatch.setattr(train.Run, "__call__", lambda r: runs.append(r) or fit_as_it_is(r))
    assert fit(f"--backend reference --epochs 1 --output_dir {tmp_path}") == 1
    said = capsys.readouterr().err
    assert "loss of step 0 is not finite (loss_giou = nan; images [" in said
    assert len(weights) == 1
    [run] = runs
    assert run.learner.steps == 0
    assert all(p.grad is None for p in run.model.parameters())
