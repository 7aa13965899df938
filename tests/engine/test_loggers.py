# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard, Weights & Biases and MLflow get of a run, and what their failures cost it."""

import json
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detr_fast import cli
from detr_fast.config import UsageError
from detr_fast.engine.loggers import IDS, Loggers
from tests.data.layout_writers import Picture, write_coco

PICTURES = [
    Picture(f"{i}.jpg", 48, 64, [("bear", (i, 5, 20, 20)), ("cup", (2, 30, 9, 8))])
    for i in range(12)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data"), {"train": PICTURES, "val": PICTURES[:3]})


@pytest.fixture
def train(data, tmp_path, capsys):
    """Train a small model; return what it printed, and the output folder."""

    def train(flags, code=0):
        small = (
            f"--data_path {data} --output_dir {tmp_path}/run --batch_size 2 --model detr_tiny "
            "--hidden_dim 32 --nheads 4 --dim_feedforward 32 --num_queries 8 --backbone_weights "
            "none --image_size 64 --num_workers 0 --print_freq 2 --device cpu "
        )
        assert cli.train((small + flags).split()) == code
        printed = capsys.readouterr()
        return printed.out + printed.err, tmp_path / "run"

    return train


class Service:
    """Stands in for the modules ``wandb`` and ``mlflow``: it keeps what it is told."""

    def __init__(self):
        self.numbers, self.pictures, self.begun, self.ended = [], [], [], 0
        self.id, self.info = "abc", SimpleNamespace(run_id="abc")
        self.broken = False

    def init(self, **options):
        self.begun.append(options)
        return self

    def start_run(self, **options):
        return self.init(**options)

    def set_experiment(self, name):
        self.experiment = name

    def log_params(self, values):
        assert values
        assert all(isinstance(value, str) for value in values.values())

    def log(self, values, step):
        self.log_metrics(values, step)

    def log_metrics(self, values, step):
        if self.broken:
            raise OSError("no route to host")
        (self.pictures if "curves" in values else self.numbers).append((step, values))

    def log_artifact(self, file):
        self.pictures.append(file)

    def Image(self, file):
        return file

    def finish(self):
        self.ended += 1

    end_run = finish


@pytest.fixture(params=["wandb", "mlflow"])
def service(request, monkeypatch):
    service = Service()
    service.name = request.param
    monkeypatch.setitem(sys.modules, request.param, service)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return service


def test_tensorboard_has_curves_and_pictures_and_goes_on(train):
    train("--epochs 1 --loggers tensorboard")
    _, folder = train("--epochs 2 --resume auto")  # the flag comes back
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert len(records) == 2
    for tag in ("train_loss", "test_loss", "train_lr"):
        values = events.Scalars(tag)
        assert [v.value for v in values] == pytest.approx([r[tag] for r in records], rel=1e-5)
        assert [v.step for v in values] == [5, 11]
    aps = [v.value for v in events.Scalars("test_AP50")]
    assert aps == pytest.approx([r["test_coco_eval_bbox"][1] for r in records], abs=1e-6)
    assert [v.step for v in events.Scalars("step/loss")] == [0, 2, 4, 6, 8, 10]
    assert {"curves", "detections"} <= set(events.Tags()["images"])
    assert "flags/text_summary" in events.Tags()["tensors"]


def test_a_service_gets_a_run_and_goes_on_with_it(train, service):
    train(f"--epochs 1 --loggers {service.name},tensorboard")
    _, folder = train("--epochs 2 --resume auto")
    assert json.loads((folder / IDS).read_text()) == {service.name: "abc"}
    first, second = service.begun
    name = "name" if service.name == "wandb" else "run_name"
    assert first[name] == "run"
    assert not first.get("id")
    assert second["id" if service.name == "wandb" else "run_id"] == "abc"
    assert [step for step, v in service.numbers if "train_loss" in v] == [5, 11]
    assert [step for step, v in service.numbers if "step/loss" in v] == [0, 2, 4, 6, 8, 10]
    pictures = [str(p[1].get("curves")) if isinstance(p, tuple) else p for p in service.pictures]
    assert sum("curves.png" in picture for picture in pictures) == 2
    assert service.ended == 2


def test_a_service_that_fails_does_not_end_the_training(train, service):
    service.broken = True
    printed, folder = train(f"--epochs 1 --loggers {service.name},tensorboard")
    said = f"--loggers {service.name} failed and is left out from here on: no route to host"
    assert printed.count(said) == 1
    assert (folder / "checkpoint.pth").exists()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert len(events.Scalars("train_loss")) == 1


def test_it_ends_with_a_training_that_diverges(train, service):
    printed, _ = train(
        f"--epochs 1 --loggers {service.name} --lr 1e30 --clip_max_norm 0 --max_skipped_steps 1",
        code=1,
    )
    assert "not finite" in printed
    assert service.ended == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loggers comet", "expected of tensorboard, wandb, mlflow, got comet"),
        ("--loggers wandb", 'pip install "detr-fast[wandb]"'),
        ("--loggers mlflow", 'pip install "detr-fast[mlflow]"'),
    ],
)
def test_mistakes(train, monkeypatch, flags, message):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert message in train(flags, code=2)[0]


def test_loggers_need_a_folder():
    with pytest.raises(UsageError, match="--loggers needs --output_dir"):
        Loggers(["tensorboard"], None, {})


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_list_of_runs_begins_anew(tmp_path, service, content):
    (tmp_path / IDS).write_text(content)
    Loggers([service.name], tmp_path, {"lr": 1}, step=5)
    assert not service.begun[0].get("id")
    assert json.loads((tmp_path / IDS).read_text()) == {service.name: "abc"}
