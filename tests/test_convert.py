# SPDX-License-Identifier: Apache-2.0
"""Weights go from form to form and come back bit by bit; others read what is written."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch.testing import assert_close

from detr_fast import cli, convert
from detr_fast.config import UsageError
from detr_fast.models import detr_tiny
from detr_fast.models.checkpoint import CheckpointError, load_weights, read_checkpoint
from detr_fast.models.detr import MODELS, build_detr
from detr_fast.models.safetensors_file import ENTRY

NAMES = {0: "cat", 1: "dog", 2: "N/A", 3: "N/A", 4: "tree"}
SMALL = replace(
    MODELS["detr_resnet50"],
    num_classes=5,
    enc_layers=1,
    dec_layers=2,
    num_queries=7,
    dim_feedforward=64,
    nheads=4,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_detr(SMALL).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory, model):
    """A checkpoint as a training leaves it."""
    content = {
        "model": model.state_dict(),
        "model_config": asdict(SMALL),
        "class_names": NAMES,
        "category_ids": {0: 3, 1: 9, 2: 10, 3: 11, 4: 12},
        "epoch": 3,
    }
    path = tmp_path_factory.mktemp("weights") / "run.pth"
    torch.save(content, path)
    return path


def run(capsys, *words, code=0):
    assert cli.convert([str(word) for word in words]) == code
    return capsys.readouterr()


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("way", [["a.safetensors"], ["a"], ["a", "b.safetensors", "c"], ["a.pt"]])
def test_round_trips_are_exact(capsys, tmp_path, source, model, way):
    here = source
    for name in [*way, "back.pth"]:
        run(capsys, here, tmp_path / name)
        here = tmp_path / name
    content = read_checkpoint(here)
    assert_equal(content["model"], model.state_dict())
    config = {**content["model_config"], "dropout": 0.1, "aux_loss": True}
    assert config == asdict(SMALL) | {"dropout": 0.1, "aux_loss": True}
    assert content["class_names"] == NAMES
    if way == ["a.safetensors"]:
        assert content["category_ids"] == {0: 3, 1: 9, 2: 10, 3: 11, 4: 12}
    assert set(content) <= {"model", "model_config", "class_names", "category_ids"}


def test_transformers_reads_the_folder(capsys, tmp_path, source, model):
    transformers = pytest.importorskip("transformers")
    run(capsys, source, tmp_path / "theirs")
    theirs, told = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert theirs.config.id2label[4] == "tree"
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found, expected = theirs.eval()(images), model(images)
    assert_close(found.logits, expected["pred_logits"], rtol=1e-4, atol=1e-4)
    assert_close(found.pred_boxes, expected["pred_boxes"], rtol=1e-4, atol=1e-4)
    processor = transformers.DetrImageProcessor.from_pretrained(tmp_path / "theirs")
    assert processor.size["shortest_edge"] == 800
    theirs.save_pretrained(tmp_path / "saved")
    run(capsys, tmp_path / "saved", tmp_path / "back.pth")
    assert_equal(read_checkpoint(tmp_path / "back.pth")["model"], model.state_dict())


def test_a_safetensors_file_is_a_checkpoint(capsys, tmp_path, source, model):
    run(capsys, source, path := tmp_path / "a.safetensors")
    fresh = build_detr(SMALL)
    load_weights(fresh, read_checkpoint(path))
    assert_equal(fresh.state_dict(), model.state_dict())


def test_published_weights_are_read_without_any_description(capsys, tmp_path, model):
    torch.save({"model": model.state_dict()}, path := tmp_path / "published.pth")
    printed = run(capsys, path, tmp_path / "a.safetensors").out
    assert "no class names" in printed
    assert "5 classes, 7 queries" in printed


def test_the_moving_average_counts(capsys, tmp_path, source, model):
    average = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save(read_checkpoint(source) | {"ema": average}, path := tmp_path / "run.pth")
    run(capsys, path, tmp_path / "out.pth")
    assert_equal(read_checkpoint(tmp_path / "out.pth")["model"], average)


def test_a_dry_run_says_all_and_writes_nothing(capsys, tmp_path, source):
    printed = run(capsys, source, tmp_path / "theirs", "--dry_run").out
    assert "left behind: epoch" in printed
    assert "renamed" in printed
    assert "class names: cat, dog" in printed
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced_unasked(capsys, tmp_path, source):
    (path := tmp_path / "a.pth").write_bytes(b"mine")
    assert "--overwrite" in run(capsys, source, path, code=2).err
    assert path.read_bytes() == b"mine"
    run(capsys, source, path, "--overwrite")
    assert read_checkpoint(path)["class_names"] == NAMES


def test_what_a_form_does_not_have_is_refused(capsys, tmp_path, source):
    assert "no dilation" in run(capsys, source, tmp_path / "a", "--dilation", code=2).err
    torch.save({"model": detr_tiny().state_dict()}, path := tmp_path / "tiny.pth")
    assert "no weights of a DETR with a ResNet" in run(capsys, path, tmp_path / "a", code=2).err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        ("{", "not of a DETR"),
        ("[1]", "not of a DETR"),
        ('{"model_type": "bert"}', "model_type is 'bert', not 'detr'"),
        ('{"model_type": "detr", "id2label": {"x": 1}}', "not of a DETR"),
    ],
)
def test_other_folders(tmp_path, config, message):
    (tmp_path / "model.safetensors").write_bytes(b"")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        convert.read(str(tmp_path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "are no JSON"),
        ("[]", "hold other entries"),
        ('{"optimizer": 1}', "hold other entries"),
        ('{"class_names": [1]}', "are no dict by label"),
        ('{"class_names": {"x": "y"}}', "are no dict by label"),
        ('{"model_config": {"num_classes": "many"}}', "num_classes: expected int"),
        ("[" * 100_000, "are no JSON"),
    ],
)
def test_hostile_metadata(tmp_path, metadata, message):
    from safetensors.torch import save_file

    state = {"class_embed.weight": torch.zeros(3, 4)}
    save_file(state, path := tmp_path / "a.safetensors", {ENTRY: metadata})
    with pytest.raises(CheckpointError, match=message):
        convert.read(str(path))


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0" + b"{" * 16])
def test_broken_files(tmp_path, content):
    (path := tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: no safetensors file, or damaged"):
        read_checkpoint(path)


def test_the_form_follows_the_name(tmp_path):
    with pytest.raises(UsageError, match="invalid choice"):
        convert.parser("convert").parse_args(["a", "b", "--to", "onnx"])
    written = json.dumps(convert.PREPROCESSOR)
    assert "DetrImageProcessor" in written
