# SPDX-License-Identifier: Apache-2.0
"""The published models by name, with and without their weights."""

from urllib.error import URLError

import pytest
import torch

from detr_fast import models
from detr_fast.models import ModelConfig, PostProcess
from detr_fast.models.checkpoint import CheckpointError
from tests.models.random_models import random_batch


@pytest.mark.parametrize(
    ("name", "backbone", "dilation"),
    [
        ("detr_resnet50", "resnet50", False),
        ("detr_resnet50_dc5", "resnet50", True),
        ("detr_resnet101", "resnet101", False),
        ("detr_resnet101_dc5", "resnet101", True),
    ],
)
def test_factories_build_what_they_say(name, backbone, dilation):
    model, postprocess = getattr(models, name)(num_classes=3, return_postprocessor=True)
    assert model.config == ModelConfig(num_classes=3, backbone=backbone, dilation=dilation)
    assert isinstance(postprocess, PostProcess)
    assert len(model.backbone[0].body.layer3) == {"resnet50": 6, "resnet101": 23}[backbone]
    assert model.backbone[0].body.layer4[0].conv2.stride == ((1, 1) if dilation else (2, 2))


def test_tiny_takes_other_fields():
    model = models.detr_tiny(num_classes=9, num_queries=11)
    assert model.config.backbone == "tiny"
    outputs = model(random_batch((64, 96), (50, 33)))
    assert outputs["pred_logits"].shape == (2, 11, 10)


def test_pretrained_weights_are_for_91_classes():
    with pytest.raises(ValueError, match="published weights have 91, got 20"):
        models.detr_resnet50(pretrained=True, num_classes=20)


def test_pretrained_takes_the_published_file(monkeypatch, tmp_path):
    resnet50 = models.detr_resnet50()

    def download(url, path, hash_prefix):
        assert url == "https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth"
        assert hash_prefix == "e632da11"
        torch.save({"model": resnet50.state_dict()}, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    model = models.detr_resnet50(pretrained=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resnet50.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("detr_resnet50", "detr-r50-e632da11.pth"),
        ("detr_resnet50_dc5", "detr-r50-dc5-f0fb7ef5.pth"),
        ("detr_resnet101", "detr-r101-2c7b67e5.pth"),
        ("detr_resnet101_dc5", "detr-r101-dc5-a2e86def.pth"),
    ],
)
def test_pretrained_offline_says_where_to_put_the_file(monkeypatch, tmp_path, name, file):
    def download(*args):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(CheckpointError, match="no network") as caught:
        getattr(models, name)(pretrained=True)
    assert f"https://dl.fbaipublicfiles.com/detr/{file}" in str(caught.value)
    assert str(tmp_path / "checkpoints" / file) in str(caught.value)
