# SPDX-License-Identifier: Apache-2.0
"""The same model, written by others: transformers' DetrForObjectDetection with our weights."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast.models import ModelConfig
from detr_fast.models.checkpoint import load_weights
from detr_fast.models.transformers_keys import from_transformers, to_transformers
from tests.models.random_models import (
    gradients,
    random_batch,
    random_detr,
    randomize_norms,
    weighted_sum,
)

transformers = pytest.importorskip("transformers")


def build_theirs(config: ModelConfig):
    """transformers' DETR on its own ResNet, which needs neither timm nor a download.

    That ResNet has no dilation, so DC5 is set in its last stage here: no stride, and every 3x3
    convolution behind the first block spread by 2.
    """
    depths = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}[config.backbone]
    torch.manual_seed(1)
    model = transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            backbone_config=transformers.ResNetConfig(depths=depths, out_features=["stage4"]),
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            num_labels=config.num_classes,
            d_model=config.hidden_dim,
            num_queries=config.num_queries,
            encoder_layers=config.enc_layers,
            decoder_layers=config.dec_layers,
            encoder_attention_heads=config.nheads,
            decoder_attention_heads=config.nheads,
            encoder_ffn_dim=config.dim_feedforward,
            decoder_ffn_dim=config.dim_feedforward,
            position_embedding_type=config.position_embedding,
            dropout=0.0,
        )
    ).eval()
    randomize_norms(model.model.backbone)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases must not be 1 and 0
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
        # it freezes all of its own ResNet; DETR trains the stages from the second on
        frozen = ".embedder." in name or ".stages.0." in name
        parameter.requires_grad_(not frozen)
    if config.dilation:
        first, *rest = model.model.backbone.model.encoder.stages[3].layers
        first.shortcut.convolution.stride = first.layer[1].convolution.stride = (1, 1)
        for block in rest:
            block.layer[1].convolution.dilation = block.layer[1].convolution.padding = (2, 2)
    return model


@pytest.mark.parametrize(
    ("changes", "sizes", "folded"),
    [
        ({}, [(224, 320), (200, 256)], True),
        ({}, [(97, 65), (64, 131)], False),
        ({"dilation": True}, [(128, 192), (90, 180)], True),
        (
            {"position_embedding": "learned", "enc_layers": 2, "nheads": 4},
            [(97, 65), (64, 131)],
            True,
        ),
        ({"backbone": "resnet101", "dec_layers": 2, "num_queries": 17}, [(64, 97), (33, 65)], True),
    ],
    ids=["resnet50", "reference", "dc5", "learned", "resnet101"],
)
def test_outputs_and_gradients_equal_transformers(changes, sizes, folded):
    config = ModelConfig(dropout=0.0, **changes)
    theirs = build_theirs(config)
    ours = random_detr(config, folded=folded)
    load_weights(ours, from_transformers(theirs.state_dict()))
    batch = random_batch(*sizes)

    outputs = ours(batch)
    result = theirs(batch.tensors, pixel_mask=(~batch.mask).long(), output_hidden_states=True)
    assert result.logits.std() > 0.1
    assert_close(outputs["pred_logits"], result.logits, rtol=1e-4, atol=1e-4)
    assert_close(outputs["pred_boxes"], result.pred_boxes, rtol=0, atol=1e-4)
    # their states of the decoder's layers: the input of the first, then the output of each
    assert len(outputs["aux_outputs"]) == config.dec_layers - 1
    for layer, state in zip(
        outputs["aux_outputs"], result.decoder_hidden_states[1:-1], strict=True
    ):
        state = theirs.model.decoder.layernorm(state)
        logits = theirs.class_labels_classifier(state)
        assert_close(layer["pred_logits"], logits, rtol=1e-4, atol=1e-4)
        boxes = theirs.bbox_predictor(state).sigmoid()
        assert_close(layer["pred_boxes"], boxes, rtol=0, atol=1e-4)

    weighted_sum(outputs["pred_logits"], outputs["pred_boxes"]).backward()
    weighted_sum(result.logits, result.pred_boxes).backward()
    expected = from_transformers(gradients(theirs))
    found = gradients(ours)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        # by norm: a ReLU at 0 +- rounding may open here and stay shut there, which moves one row;
        # 1e-6: the queries start at 0, so the first self-attention has no gradient but rounding
        difference = (found[name] - grad).norm().item()
        assert difference <= 1e-3 * grad.norm().item() + 1e-6, name


def test_padding_matters_in_the_comparison():
    """The masks above are not idle: without one, the same weights give other boxes."""
    model = random_detr(ModelConfig(dropout=0.0, enc_layers=1, dec_layers=1))
    batch = random_batch((97, 65), (64, 131))
    masked = model(batch)["pred_logits"]
    unmasked = model(batch.tensors)["pred_logits"]
    assert (masked - unmasked).abs().max() > 1e-2


@pytest.mark.parametrize("position", ["sine", "learned"])
def test_saved_by_transformers_is_our_published_layout(tmp_path, position):
    """`save_pretrained` writes it, `from_pretrained` takes it: files travel both ways."""
    safetensors = pytest.importorskip("safetensors.torch")
    config = ModelConfig(
        position_embedding=position, hidden_dim=32, dim_feedforward=16, enc_layers=1, dec_layers=1
    )
    theirs = build_theirs(config)
    theirs.save_pretrained(tmp_path)
    written = safetensors.load_file(tmp_path / "model.safetensors")
    ours = from_transformers(written)
    converted = to_transformers(ours, "published", "resnet")
    assert converted.keys() == written.keys()
    for key, value in written.items():
        assert torch.equal(converted[key], value), key

    load_weights(random_detr(config), ours)
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in converted.items()}
    safetensors.save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read, report = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    state = read.state_dict()
    for key, value in from_transformers(state).items():
        assert torch.equal(value, ours[key] + 1), key
