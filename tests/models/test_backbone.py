# SPDX-License-Identifier: Apache-2.0
"""The ResNet against torchvision's, folded norms against plain ones, weights from elsewhere."""

import copy
import sys
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
from torch.testing import assert_close

from detr_fast.models import ModelConfig, build_detr
from detr_fast.models.backbone import (
    Backbone,
    Bottleneck,
    FrozenBatchNorm2d,
    conv_norm,
    load_backbone_weights,
)
from detr_fast.models.checkpoint import CheckpointError
from detr_fast.models.tiny import Residual
from tests.models.random_models import (
    SMALL,
    gradients,
    random_detr,
    randomize_norms,
    weighted_sum,
)

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


def layouts(module):
    """Whether convolutions of several channels and cells are channels_last, and whether NCHW."""
    weights = [p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 < p.shape[2]]
    assert weights
    last = all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    return last, all(w.is_contiguous() for w in weights)


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "plain"])
@pytest.mark.parametrize("backbone", ["resnet50", "tiny"])
def test_layout_from_the_images_to_the_features(backbone, folded):
    """Channels last, or as the original has it, whatever comes in; in gradients and copies, too."""
    config = replace(SMALL, backbone=backbone)
    model = random_detr(config, folded=folded).train()
    expected = (folded, not folded)
    assert layouts(model.backbone) == expected
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert layouts(model.backbone) == layouts(copy.deepcopy(model).backbone) == expected
    seen = []

    def see(module, inputs, output):
        for x in (inputs[0], output):
            last = x.is_contiguous(memory_format=torch.channels_last)
            seen.append((last, x.is_contiguous()))

    for module in model.backbone.modules():
        if isinstance(module, (Bottleneck, Residual)):
            module.register_forward_hook(see)
    images = torch.randn(2, 3, 64, 96)
    for layout in (torch.contiguous_format, torch.channels_last):
        model.zero_grad()
        outputs = model(images.contiguous(memory_format=layout))
        weighted_sum(outputs["pred_logits"], outputs["pred_boxes"]).backward()
        for p in model.backbone.parameters():
            assert p.grad is None or p.grad.stride() == p.stride()
    assert set(seen) == {expected}


def test_frozen_stages_are_without_autograd():
    """No graph is recorded for them, nothing of them is kept, no gradient is computed."""
    backbone = Backbone("resnet50").train()
    randomize_norms(backbone)
    ends = {}
    for name in ("layer1", "layer2"):
        getattr(backbone.body, name).register_forward_hook(
            lambda module, inputs, output, name=name: ends.update({name: output})
        )
    frozen = {p.data_ptr() for p in backbone.parameters() if not p.requires_grad}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = backbone(torch.randn(2, 3, 64, 96))
    assert ends["layer1"].grad_fn is None
    assert not ends["layer1"].requires_grad
    assert ends["layer2"].grad_fn is not None
    assert not {tensor.data_ptr() for tensor in kept} & frozen
    larger = [x for x in kept if x.shape[-2:] == (16, 24) and x.shape[1] == 64]
    assert not larger  # an activation inside of the first stage
    features.sum().backward()
    assert all((p.grad is None) != p.requires_grad for p in backbone.parameters())


def folds(run):
    """How many kernels a function folds."""
    calls = []
    scale_shift = FrozenBatchNorm2d.scale_shift

    def counted(norm):
        calls.append(norm)
        return scale_shift(norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenBatchNorm2d, "scale_shift", counted)
        run()
    return len(calls)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_folded_kernels_are_kept_in_inference(dtype):
    """And made anew when a weight or a statistic changes, and in training."""
    backbone = Backbone("resnet50").eval()
    randomize_norms(backbone)
    images = torch.randn(1, 3, 64, 64)

    @torch.no_grad()
    def run():
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return backbone(images)

    norms = sum(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
    assert folds(run) == norms
    first = run()
    assert folds(run) == 0
    assert torch.equal(run(), first)
    with torch.no_grad():
        backbone.body.layer2[0].conv1.weight.mul_(1.5)
        backbone.body.layer3[1].bn2.running_mean.add_(0.5)
    assert folds(run) == 2
    assert not torch.equal(run(), first)
    fresh = Backbone("resnet50").eval()
    fresh.load_state_dict(backbone.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        assert torch.equal(run(), fresh(images))
    assert folds(lambda: backbone(images)) == norms  # with gradients
    backbone.train()
    assert folds(run) == norms


def test_folded_kernels_are_rounded_once_under_autocast():
    conv, norm = torch.nn.Conv2d(4, 6, 1, bias=False), FrozenBatchNorm2d(6)
    randomize_norms(norm)
    exact = (conv.weight * norm.scale_shift()[0][:, None, None, None]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        weight, shift = norm.folded_into(conv)
        assert norm.double().folded_into(conv.double())[0].dtype == torch.float64
    assert torch.equal(weight, exact)
    assert shift.dtype == torch.bfloat16
