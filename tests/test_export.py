# SPDX-License-Identifier: Apache-2.0
"""Exported files say what the model says, for every number and size of images."""

import json
from dataclasses import asdict, replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.testing import assert_close

from detr_fast import Detector, cli
from detr_fast.export import check, command, files
from detr_fast.export.program import Deployed, exported_program
from detr_fast.models.backbone import FrozenBatchNorm2d
from detr_fast.models.detr import MODELS, build_detr

SMALL = replace(
    MODELS["detr_resnet50"],
    num_classes=5,
    enc_layers=1,
    dec_layers=2,
    num_queries=7,
    dim_feedforward=64,
)
NAMES = {0: "disc", 1: "square", 2: "triangle", 3: "bar"}


def trained(config):
    """A model whose outputs differ from query to query and image to image."""
    torch.manual_seed(0)
    model = build_detr(config).eval()
    with torch.no_grad():
        model.class_embed.weight.mul_(8)
        model.query_embed.weight.mul_(4)
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):  # as of a trained one, not ones and zeros
                module.weight.uniform_(0.2, 0.6)
                module.bias.uniform_(-0.1, 0.1)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = MODELS["detr_tiny"]
    content = {
        "model": trained(config).state_dict(),
        "model_config": asdict(config),
        "class_names": NAMES,
        "args": {"dataset_file": "shapes"},
    }
    torch.save(content, path := tmp_path_factory.mktemp("tiny") / "tiny.pth")
    return path


@pytest.mark.parametrize(
    "words",
    ["a.onnx", "a.onnx --raw --padding --opset 20", "a.pt2 --padding", "a.pt2 --to aoti --raw"],
)
def test_files_equal_the_model(capsys, tmp_path, tiny, words):
    name, *flags = words.split()
    assert cli.export([str(tiny), str(tmp_path / name), *flags]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if " x " in line and "e-" in line]
    assert {int(row[0]) for row in rows} == {1, 2, 7}
    assert len({(row[1], row[3]) for row in rows}) >= 5
    assert len(rows) == 15
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("encoding", ["sine", "learned"])
@pytest.mark.parametrize("form", ["onnx", "export"])
def test_resnet(tmp_path, encoding, form):
    deployed = Deployed(trained(replace(SMALL, position_embedding=encoding)))
    padding = encoding == "sine"
    exported = files.Exported(exported_program(deployed, padding), False, {})
    files.write(exported, path := tmp_path / "a.bin", form)
    sizes = [(64, 96), (96, 64), (131, 97), (65, 160), (200, 224)]
    run = files.load(path, form)
    found = list(check.differences(deployed, run, padding, sizes))
    assert len(found) == 15
    assert all(f.equal and f.values < 1e-4 and f.boxes < 1e-4 for f in found), found
    names = {node.op_type for node in onnx.load(path).graph.node} if form == "onnx" else set()
    assert "BatchNormalization" not in names


@pytest.mark.parametrize("config", [SMALL, MODELS["detr_tiny"]], ids=["resnet", "tiny"])
def test_what_is_deployed_is_the_model(config):
    model = trained(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deployed = Deployed(model, raw=True)
    images, sizes = deployed.inputs(3, 96, 128, padding=True)
    with torch.no_grad():
        expected = model([i[:, :h, :w] for i, (h, w) in zip(images, sizes.tolist(), strict=True)])
        logits, boxes = deployed(images, sizes)
    assert_close(logits, expected["pred_logits"], rtol=1e-4, atol=1e-4)
    assert_close(boxes, expected["pred_boxes"], rtol=1e-4, atol=1e-5)
    assert model.config == config
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_onnx_finds_what_the_detector_finds(tmp_path, tiny):
    assert cli.export([str(tiny), str(tmp_path / "a.onnx")]) == 0
    detector = Detector.from_checkpoint(tiny)
    picture = np.random.default_rng(0).integers(256, size=(90, 120, 3), dtype=np.uint8)
    expected = detector.predict(picture, threshold=0.0)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    pixels = detector._resized(torch.from_numpy(picture).permute(2, 0, 1))
    assert pixels.dtype == torch.uint8
    scores, labels, boxes = session.run(None, {"images": pixels[None].numpy()})
    order = np.argsort(-scores[0], kind="stable")
    np.testing.assert_allclose(scores[0][order], expected.confidence, rtol=1e-4)
    np.testing.assert_array_equal(labels[0][order], expected.class_id)
    corners = boxes[0][order] * [120, 90, 120, 90]
    np.testing.assert_allclose(corners, expected.xyxy, rtol=1e-4, atol=1e-3)
    about = json.loads(session.get_modelmeta().custom_metadata_map["detr_fast"])
    assert about["class_names"] == {str(label): name for label, name in NAMES.items()}
    assert about["resize"].startswith("short side 128 pixels, long side at most 213")
    model = onnx.load(tmp_path / "a.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [output.name for output in session.get_outputs()] == ["scores", "labels", "boxes"]


@pytest.mark.parametrize("raw", [False, True])
def test_a_file_that_differs_is_not_kept(capsys, tmp_path, monkeypatch, tiny, raw):
    def other(deployed, padding):
        deployed = Deployed(trained(MODELS["detr_tiny"]), raw)
        deployed.model.class_embed.bias += 0.01 * torch.arange(5)
        return exported_program(deployed, padding)

    monkeypatch.setattr(command, "exported_program", other)
    words = [str(tiny), str(tmp_path / "a.pt2"), *["--raw"] * raw]
    assert cli.export(words) == 1
    assert "differs" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["box", "label", "nan", "shape"])
def test_the_comparison_sees(fault):
    deployed = Deployed(trained(MODELS["detr_tiny"]))

    @torch.no_grad()
    def run(*inputs):
        scores, labels, boxes = deployed(*inputs)
        if fault == "box":
            boxes[-1, -1, 2] += 0.002
        elif fault == "label":
            labels[0, 3] = (labels[0, 3] + 1) % 4
        elif fault == "nan":
            scores[0, 0] = float("nan")
        else:
            scores = scores[:, :-1]
        return scores, labels, boxes

    found = list(check.differences(deployed, run, False, [(64, 64)], [2]))
    assert len(found) == 1
    assert not found[0].equal


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.engine", "ends in .onnx, or in .pt2"),
        ("a.onnx --to aoti", "ends in .onnx, or in .pt2"),
        ("a.pt2 --to onnx", "ends in .onnx, or in .pt2"),
        ("a.onnx --opset 11", "--opset 11: expected at least 18"),
        ("there.onnx", "--overwrite"),
    ],
)
def test_mistakes(capsys, tmp_path, tiny, words, message):
    (tmp_path / "there.onnx").write_bytes(b"mine")
    name, *flags = words.split()
    assert cli.export([str(tiny), str(tmp_path / name), *flags]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"


def test_a_missing_library_is_named(capsys, tmp_path, monkeypatch, tiny):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(files.importlib, "import_module", absent)
    with pytest.raises(cli.UsageError, match=r'ONNX needs onnx: pip install "detr-fast\[export\]"'):
        files.needed("onnx")
