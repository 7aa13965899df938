# SPDX-License-Identifier: Apache-2.0
"""A configuration that makes no model says which field is wrong."""

import pytest

from detr_fast.models import ModelConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone", "vgg", "backbone: expected one of resnet50, resnet101, tiny, got 'vgg'"),
        ("position_embedding", "v2", "position_embedding: expected one of sine, learned"),
        ("num_classes", 0, "num_classes: expected at least 1, got 0"),
        ("dec_layers", 0, "dec_layers: expected at least 1"),
        ("enc_layers", -1, "enc_layers: expected 0 to 1000000, got -1"),
        ("dropout", 1.0, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ("nheads", 7, r"hidden_dim: expected a multiple of nheads \(7\) and of 4, got 256"),
    ],
)
def test_config_names_what_does_not_fit(field, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{field: value})


def test_config_refuses_a_dilated_tiny_backbone():
    with pytest.raises(ValueError, match="dilation: only the ResNet backbones"):
        ModelConfig(backbone="tiny", dilation=True)
