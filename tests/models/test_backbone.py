# SPDX-License-Identifier: Apache-2.0
"""The ResNet against torchvision's, folded norms against plain ones, weights from elsewhere."""

import sys
from urllib.error import URLError

import pytest
import torch
from torch.testing import assert_close

from detr_fast.models import ModelConfig, build_detr
from detr_fast.models.backbone import Backbone, FrozenBatchNorm2d, conv_norm, load_backbone_weights
from detr_fast.models.checkpoint import CheckpointError
from tests.models.random_models import SMALL, gradients, randomize_norms, weighted_sum

torchvision = pytest.importorskip("torchvision")


def torchvision_body(name, dilation):
    """The stages of torchvision's ResNet, with its own frozen norm, as the original builds them."""
    resnet = torchvision.models.get_model(
        name,
        weights=None,
        replace_stride_with_dilation=[False, False, dilation],
        norm_layer=torchvision.ops.FrozenBatchNorm2d,
    )
    del resnet.fc, resnet.avgpool
    randomize_norms(resnet)
    return torch.nn.Sequential(*resnet.children()), resnet.state_dict()


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "plain"])
@pytest.mark.parametrize(
    ("name", "dilation", "size"),
    [
        ("resnet50", False, (97, 131)),
        ("resnet50", True, (97, 131)),
        ("resnet101", True, (64, 33)),
        ("resnet101", False, (40, 1)),
    ],
)
def test_features_equal_torchvision(name, dilation, size, folded):
    body, state = torchvision_body(name, dilation)
    backbone = Backbone(name, dilation, folded)
    backbone.body.load_state_dict(state)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = body(images)
        features = backbone(images)
    stride = 16 if dilation else 32
    assert features.shape == (2, 2048, *(-(-s // stride) for s in size))
    assert expected.std() > 1e-3
    assert_close(features, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_folding_changes_neither_values_nor_gradients():
    results = []
    for folded in (True, False):
        torch.manual_seed(0)
        backbone = Backbone("resnet50", folded=folded)
        randomize_norms(backbone)
        features = backbone(torch.randn(2, 3, 64, 96))
        weighted_sum(features).backward()
        results.append((features.detach(), gradients(backbone)))
    (folded, folded_grads), (plain, plain_grads) = results
    assert_close(folded, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    stages = ("body.layer2.", "body.layer3.", "body.layer4.")
    trained = {n for n, _ in backbone.named_parameters() if n.startswith(stages)}
    assert folded_grads.keys() == plain_grads.keys() == trained
    for name, grad in plain_grads.items():
        scale = grad.abs().max().item()
        assert_close(folded_grads[name], grad, rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_folded_kernels_pass_gradcheck():
    conv = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double()
    norm = FrozenBatchNorm2d(3).double()
    randomize_norms(norm)
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(x, weight):
        return torch.func.functional_call(
            Folded(conv, norm), {"conv.weight": weight}, (x,), strict=False
        )

    assert torch.autograd.gradcheck(run, (x, conv.weight))
    assert_close(run(x, conv.weight), norm(conv(x)))


class Folded(torch.nn.Module):
    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x):
        return conv_norm(x, self.conv, self.norm, folded=True)


def test_scale_is_float32_for_a_half_precision_model():
    """A variance of 1e-6 under eps 1e-5: bfloat16 arithmetic would be off by about 1 %."""
    norm = FrozenBatchNorm2d(4)
    norm.running_var.copy_(torch.tensor([1e-6, 1e-3, 1.0, 50.0]))
    half = FrozenBatchNorm2d(4).bfloat16()
    half.load_state_dict(norm.state_dict())
    exact = norm.weight / (half.running_var.float() + 1e-5).sqrt()
    assert_close(half.scale_shift()[0], exact, rtol=1e-6, atol=0)
    backbone = Backbone("resnet50").bfloat16()
    assert backbone(torch.randn(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16


def test_frozen_parameters():
    model = build_detr(SMALL)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    first_stage = {n for n, _ in model.named_parameters() if ".body.layer1." in n}
    assert len(first_stage) == 10
    assert frozen == {"backbone.0.body.conv1.weight"} | first_stage
    model = build_detr(SMALL, train_backbone=False)
    assert {
        n.startswith("backbone.0.") for n, p in model.named_parameters() if p.requires_grad
    } == {False}
    assert not any(p.requires_grad for p in model.backbone[0].parameters())


def test_files_of_plain_batch_norm_load():
    state = torchvision.models.resnet50(weights=None).state_dict()
    body_state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    assert any(k.endswith("num_batches_tracked") for k in body_state)
    backbone = Backbone("resnet50")
    backbone.body.load_state_dict(body_state)
    assert_close(backbone.body.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])


@pytest.fixture(scope="module")
def resnet50_file(tmp_path_factory):
    """What torchvision would have downloaded."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)
    return path


def stem(model):
    return model.backbone[0].body.conv1.weight.detach().clone()


def test_backbone_weights_from_a_file_of_torchvision(resnet50_file):
    model = build_detr(SMALL)
    load_backbone_weights(model, resnet50_file)
    state = torch.load(resnet50_file)
    for key, value in model.backbone[0].body.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_backbone_weights_from_a_detr_checkpoint(tmp_path):
    trained, model = build_detr(SMALL), build_detr(SMALL)
    torch.save({"model": trained.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    heads = model.class_embed.weight.detach().clone()
    load_backbone_weights(model, tmp_path / "checkpoint.pth")
    assert torch.equal(stem(model), stem(trained))
    assert torch.equal(model.class_embed.weight, heads)


def test_imagenet_weights_come_through_torchvision(monkeypatch, resnet50_file):
    calls = []

    def download(url, *args, **kwargs):
        calls.append((url, kwargs.get("check_hash")))
        return torch.load(resnet50_file)

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)
    model = build_detr(SMALL)
    load_backbone_weights(model, "imagenet")
    assert torch.equal(stem(model), torch.load(resnet50_file)["conv1.weight"])
    assert calls == [("https://download.pytorch.org/models/resnet50-0676ba61.pth", True)]


def test_no_backbone_weights_change_nothing():
    model = build_detr(SMALL)
    before = stem(model)
    load_backbone_weights(model, "none")
    assert torch.equal(stem(model), before)


@pytest.mark.parametrize("error", [URLError("offline"), RuntimeError("invalid hash value")])
def test_failed_download_names_the_flag(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)
    with pytest.raises(CheckpointError, match="--backbone_weights none") as caught:
        load_backbone_weights(build_detr(SMALL), "imagenet")
    assert "resnet50-0676ba61.pth" in str(caught.value)


def test_missing_torchvision_names_the_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r'pip install "detr-fast\[train\]"'):
        load_backbone_weights(build_detr(SMALL), "imagenet")


def test_weights_of_another_resnet_are_refused(resnet50_file):
    model = build_detr(ModelConfig(backbone="resnet101", enc_layers=1, dec_layers=1))
    before = stem(model)
    with pytest.raises(CheckpointError, match=r"body\.layer3\.6\.conv1\.weight") as caught:
        load_backbone_weights(model, resnet50_file)
    assert "--backbone_weights" in str(caught.value)
    assert torch.equal(stem(model), before)


def test_missing_file_names_flag_and_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"--backbone_weights .*absent\.pth: no such file"):
        load_backbone_weights(build_detr(SMALL), tmp_path / "absent.pth")
