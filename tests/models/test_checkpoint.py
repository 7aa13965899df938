# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is read, what is refused without running it, what is never left half done."""

import argparse
import io
import os
import pickle
import re
from collections import OrderedDict
from dataclasses import asdict, replace
from email.message import Message
from urllib.error import URLError

import pytest
import torch
from torch import nn

from detr_fast.models import ModelConfig, build_detr
from detr_fast.models.checkpoint import (
    CheckpointError,
    load_weights,
    model_config_from_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from tests.models.random_models import SMALL

ran = []


def record(what):
    ran.append(what)


class Hostile:
    """Pickled, it calls `function` when read by an unsafe reader."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def official_args(**changes):
    """The architecture part of the Namespace that the original saves."""
    values = {
        "lr": 1e-4,
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
        "dataset_file": "coco",
        "coco_path": "/data",
        "device": "cuda",
    }
    return argparse.Namespace(**values | changes)


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    return left == right


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_official_checkpoint_reads_back(tmp_path, zipped):
    path = tmp_path / "checkpoint.pth"
    linear = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = {
        "model": linear.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 200).state_dict(),
        "epoch": 3,
        "args": official_args(),
    }
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert equal(read["model"], saved["model"])
    assert read["args"] == saved["args"]
    assert read["epoch"] == 3
    assert equal(read["optimizer"]["state"], saved["optimizer"]["state"])
    assert read_checkpoint(str(path)).keys() == saved.keys()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("payload", ["function", "system", "builtin"])
def test_hostile_pickle_is_refused_and_not_run(tmp_path, container, payload):
    trace = tmp_path / "trace"
    function, args = {
        "function": (record, ("ran",)),
        "system": (os.system, (f"touch {trace}",)),
        "builtin": (eval, (f"open({str(trace)!r}, 'w')",)),
    }[payload]
    path = tmp_path / "hostile.pth"
    saved = {"model": {}, "args": Hostile(function, *args)}
    if container == "pickle":
        path.write_bytes(pickle.dumps(saved))
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError, match=r"hostile\.pth: ") as caught:
        read_checkpoint(path)
    assert not ran
    assert not trace.exists()
    assert len(str(caught.value).splitlines()) == 1
    if container != "pickle":
        assert "refused, nothing of it was run" in str(caught.value)
        assert re.search(rf"it holds [\w.]*{function.__name__},", str(caught.value))


def test_a_namespace_cannot_smuggle_code(tmp_path):
    path = tmp_path / "hostile.pth"
    torch.save({"args": argparse.Namespace(device=Hostile(record, "ran"))}, path)
    with pytest.raises(CheckpointError, match="refused"):
        read_checkpoint(path)
    assert not ran


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_is_named(tmp_path, kept, zipped):
    path = tmp_path / "short.pth"
    torch.save(
        {"model": nn.Linear(50, 50).state_dict()}, path, _use_new_zipfile_serialization=zipped
    )
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(
        CheckpointError, match=r"short\.pth: (not a checkpoint .* or damaged|the file is empty)"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [b"hello\n", b"<html>404 Not Found</html>", b"\x89PNG\r\n\x1a\n\0\0", b"{}", b"\x80\x02"],
)
def test_other_file_is_named(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"notes\.txt: .*copy or download it again") as caught:
        read_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1
    assert "weights_only" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name}: no such file"):
            read_checkpoint(path)


def test_what_is_no_dict_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth: expected a dict .* found a list"):
        read_checkpoint(tmp_path / "list.pth")


def test_address_is_downloaded_once_with_its_hash(monkeypatch, tmp_path):
    calls = []

    def download(url, path, hash_prefix):
        calls.append((url, hash_prefix))
        torch.save({"epoch": len(calls)}, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert read_checkpoint("https://example.org/a/detr-0badc0de.pth?x=1") == {"epoch": 1}
    assert read_checkpoint("https://example.org/last.pth") == {"epoch": 2}
    assert calls == [
        ("https://example.org/a/detr-0badc0de.pth?x=1", "0badc0de"),
        ("https://example.org/last.pth", None),
    ]


def test_download_with_another_hash_is_refused(monkeypatch, tmp_path):
    """Through torch's own download, from a file instead of a server."""
    torch.save({"epoch": 1}, tmp_path / "file")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="invalid hash value"):
        read_checkpoint("https://example.org/detr-0badc0de.pth")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


class Response:
    """What urlopen returns, of a file."""

    def __init__(self, path):
        self.read, self.info = io.BytesIO(path.read_bytes()).read, Message

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_failed_download_names_address_and_place(monkeypatch, tmp_path):
    def download(*args):
        raise URLError("unreachable")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(
        CheckpointError, match=r"https://example\.org/m\.pth: .*unreachable"
    ) as caught:
        read_checkpoint("https://example.org/m.pth")
    assert str(tmp_path / "checkpoints" / "m.pth") in str(caught.value)


def test_unencrypted_address_is_refused():
    with pytest.raises(CheckpointError, match="by https:// only"):
        read_checkpoint("http://example.org/m.pth")


def test_write_then_read(tmp_path):
    path = tmp_path / "checkpoint.pth"
    saved = {"model": nn.Linear(2, 3).state_dict(), "epoch": 1, "model_config": asdict(SMALL)}
    write_checkpoint({"epoch": 0}, path)
    write_checkpoint(saved, str(path))
    assert equal(read_checkpoint(path), saved)
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # readable for whom the user's mask says


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["save", "fsync", "replace"])
def test_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, stage, error):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"epoch": 1}, path)

    def fail(*args):
        if stage == "save":
            args[1].write(b"half")
        raise error

    monkeypatch.setattr(torch if stage == "save" else os, stage, fail)
    with pytest.raises(type(error)):
        write_checkpoint({"epoch": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_write_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        write_checkpoint({}, tmp_path / "absent" / "checkpoint.pth")


@pytest.fixture(scope="module")
def model():
    return build_detr(SMALL)


def test_weights_load_from_every_wrapping(model):
    state = build_detr(SMALL).state_dict()
    tracked = {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(0)}
    distributed = OrderedDict((f"module.{k}", v) for k, v in state.items())
    for wrapped in (state, {**state, **tracked}, {"model": state, "epoch": 1}, distributed):
        target = build_detr(SMALL)
        load_weights(target, wrapped)
        assert equal(dict(target.state_dict()), dict(state))


def test_weights_that_do_not_fit_are_listed_and_not_loaded(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    state["class_embed.weight"] = torch.zeros(92, 32)
    state["extra.weight"] = torch.zeros(1)
    for key in list(state):
        if "encoder" in key:
            del state[key]
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state)
    message = str(caught.value)
    assert "12 missing (transformer.encoder.layers.0.self_attn.in_proj_weight, " in message
    assert "and 7 more)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 of another shape (class_embed.weight (92, 32) for (6, 32))" in message
    assert "build the model with the architecture of the checkpoint" in message
    assert equal(before, dict(model.state_dict()))


@pytest.mark.parametrize(
    ("state", "remedy"),
    [
        ({"detr.class_embed.weight": torch.zeros(1)}, "panoptic"),
        ({"model.input_projection.bias": torch.zeros(1)}, "tools/convert_checkpoint"),
        ({"model": 3}, "expected it under 'model'"),
        ({}, "missing"),
    ],
)
def test_other_weights_name_the_remedy(model, state, remedy):
    with pytest.raises(CheckpointError, match=remedy):
        load_weights(model, state)


UNUSUAL = ModelConfig(
    num_classes=4,
    backbone="resnet101",
    dilation=True,
    position_embedding="learned",
    hidden_dim=24,
    nheads=3,
    enc_layers=1,
    dec_layers=2,
    dim_feedforward=10,
    dropout=0.0,
    num_queries=3,
    pre_norm=True,
    aux_loss=False,
)
# what the shapes of weights do not show
HIDDEN = {"dilation": False, "nheads": 8, "dropout": 0.1, "aux_loss": True}


@pytest.fixture(scope="module")
def unusual_state():
    return build_detr(UNUSUAL).state_dict()


def test_config_from_our_own_checkpoint(unusual_state):
    checkpoint = {"model": unusual_state, "model_config": asdict(UNUSUAL)}
    assert model_config_from_checkpoint(checkpoint) == UNUSUAL


def test_config_from_official_args(unusual_state):
    fields = asdict(UNUSUAL)
    del fields["num_classes"]  # the original has no such flag
    for args in (official_args(**fields), fields):
        checkpoint = {"model": unusual_state, "args": args}
        assert model_config_from_checkpoint(checkpoint) == UNUSUAL


@pytest.mark.parametrize("wrap", [lambda s: {"model": s}, lambda s: s], ids=["model", "bare"])
def test_config_from_shapes_alone(unusual_state, wrap):
    assert model_config_from_checkpoint(wrap(unusual_state)) == replace(UNUSUAL, **HIDDEN)
    published = build_detr(ModelConfig()).state_dict()
    assert model_config_from_checkpoint(wrap(published)) == ModelConfig()


def test_config_of_other_weights_is_none():
    assert model_config_from_checkpoint({"model": nn.Linear(2, 2).state_dict()}) is None
    assert model_config_from_checkpoint({}) is None


def test_config_of_a_newer_version_is_named():
    fields = {**asdict(SMALL), "num_feature_levels": 4}
    with pytest.raises(CheckpointError, match="unknown fields num_feature_levels"):
        model_config_from_checkpoint({"model_config": fields})


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"model_config": {"hidden_dim": 30}}, "hidden_dim: expected a multiple of nheads"),
        ({"model_config": {"dec_layers": "six"}}, "no valid model"),
        ({"epoch": 3, "optimizer": {}}, "found no state dict"),
    ],
)
def test_config_that_makes_no_model_is_named(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        model_config_from_checkpoint(checkpoint)
