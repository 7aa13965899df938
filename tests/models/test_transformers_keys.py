# SPDX-License-Identifier: Apache-2.0
"""Conversion to and from transformers: both layouts, both backbones, without loss."""

from dataclasses import replace

import pytest
import torch

from detr_fast.models import build_detr
from detr_fast.models.checkpoint import CheckpointError, load_weights
from detr_fast.models.transformers_keys import from_transformers, to_transformers
from tests.models.random_models import SMALL, random_detr

LEARNED = replace(SMALL, position_embedding="learned")
CONVERSIONS = [
    (layout, backbone) for layout in ("published", "installed") for backbone in ("timm", "resnet")
]


@pytest.fixture(scope="module")
def state():
    return random_detr(LEARNED).state_dict()


@pytest.mark.parametrize(("layout", "backbone"), CONVERSIONS)
def test_round_trip_is_exact(state, layout, backbone):
    theirs = to_transformers(state, layout, backbone)
    # an attention has q, k, v where we have one: 2 tensors become 6, in 1 + 2 * 2 attentions
    assert len(theirs) == len(state) + 4 * (1 + 2 * 2)
    assert not set(theirs) & set(state)
    back = from_transformers(theirs)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key
    model = build_detr(LEARNED)
    load_weights(model, back)


def test_keys_of_the_published_file(state):
    """Some of facebook/detr-resnet-50's keys, of every kind, with the tensors they name."""
    theirs = to_transformers(state)
    in_proj = state["transformer.decoder.layers.1.multihead_attn.in_proj_weight"]
    expected = {
        "class_labels_classifier.bias": state["class_embed.bias"],
        "bbox_predictor.layers.2.weight": state["bbox_embed.layers.2.weight"],
        "model.query_position_embeddings.weight": state["query_embed.weight"],
        "model.input_projection.weight": state["input_proj.weight"],
        "model.decoder.layernorm.bias": state["transformer.decoder.norm.bias"],
        "model.backbone.conv_encoder.model.conv1.weight": state["backbone.0.body.conv1.weight"],
        "model.backbone.conv_encoder.model.layer3.5.bn2.running_var": state[
            "backbone.0.body.layer3.5.bn2.running_var"
        ],
        "model.backbone.conv_encoder.model.layer2.0.downsample.1.weight": state[
            "backbone.0.body.layer2.0.downsample.1.weight"
        ],
        "model.encoder.layers.0.self_attn.out_proj.weight": state[
            "transformer.encoder.layers.0.self_attn.out_proj.weight"
        ],
        "model.encoder.layers.0.fc1.weight": state["transformer.encoder.layers.0.linear1.weight"],
        "model.encoder.layers.0.self_attn_layer_norm.weight": state[
            "transformer.encoder.layers.0.norm1.weight"
        ],
        "model.encoder.layers.0.final_layer_norm.weight": state[
            "transformer.encoder.layers.0.norm2.weight"
        ],
        "model.decoder.layers.1.encoder_attn.q_proj.weight": in_proj[:32],
        "model.decoder.layers.1.encoder_attn.k_proj.weight": in_proj[32:64],
        "model.decoder.layers.1.encoder_attn.v_proj.weight": in_proj[64:],
        "model.decoder.layers.1.encoder_attn_layer_norm.bias": state[
            "transformer.decoder.layers.1.norm2.bias"
        ],
        "model.decoder.layers.1.final_layer_norm.bias": state[
            "transformer.decoder.layers.1.norm3.bias"
        ],
        "model.decoder.layers.1.fc2.bias": state["transformer.decoder.layers.1.linear2.bias"],
    }
    for key, value in expected.items():
        assert torch.equal(theirs[key], value), key


def test_files_of_transformers_4_and_plain_batch_norms_are_read(state):
    theirs = to_transformers(state)
    for key in [k for k in theirs if k.startswith("model.position_embedding.")]:
        theirs[key.replace("model.", "model.backbone.", 1)] = theirs.pop(key)
    theirs["model.backbone.conv_encoder.model.bn1.num_batches_tracked"] = torch.tensor(7)
    assert from_transformers(theirs).keys() == state.keys()


def test_what_has_no_counterpart_is_refused():
    pre_norm = build_detr(replace(SMALL, pre_norm=True)).state_dict()
    with pytest.raises(CheckpointError, match=r"transformer\.encoder\.norm\.weight"):
        to_transformers(pre_norm)
    with pytest.raises(CheckpointError, match=r"1 keys are not known \(lm_head\.weight\)"):
        from_transformers({"lm_head.weight": torch.zeros(1)})


def test_a_missing_projection_is_named(state):
    theirs = to_transformers(state)
    del theirs["model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(
        CheckpointError, match=r"encoder\.layers\.0\.self_attn\.in_proj_bias: no weights of k_proj"
    ):
        from_transformers(theirs)


@pytest.mark.parametrize("arguments", [("newest", "timm"), ("published", "swin")])
def test_unknown_layouts_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        to_transformers({}, *arguments)
