# SPDX-License-Identifier: Apache-2.0
"""State dicts of transformers' ``DetrForObjectDetection``, both ways and without loss.

There are two layouts: that of the published files (facebook/detr-resnet-50 and its kin, also what
``save_pretrained`` writes) and that of ``state_dict()`` since transformers 5. In either, the
backbone carries timm's names, which are torchvision's, or those of transformers' own ResNet.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from detr_fast.models.checkpoint import CheckpointError, weights_of

LAYOUTS = {
    "published": {
        "backbone": "model.backbone.conv_encoder.model.",
        "out_proj": "out_proj.",
        "feedforward": "",
    },
    "installed": {
        "backbone": "model.backbone.model.",
        "out_proj": "o_proj.",
        "feedforward": "mlp.",
    },
}
PROJECTIONS = ("q", "k", "v")  # in the order in which nn.MultiheadAttention stacks them

# our prefix, theirs; {i} is a number and stays
HEADS = [
    ("class_embed.", "class_labels_classifier."),
    ("bbox_embed.", "bbox_predictor."),
    ("query_embed.", "model.query_position_embeddings."),
    ("input_proj.", "model.input_projection."),
    ("backbone.1.row_embed.", "model.position_embedding.row_embeddings."),
    ("backbone.1.col_embed.", "model.position_embedding.column_embeddings."),
    # files of transformers 4; the rows above, which come first, are what is written
    ("backbone.1.row_embed.", "model.backbone.position_embedding.row_embeddings."),
    ("backbone.1.col_embed.", "model.backbone.position_embedding.column_embeddings."),
    ("transformer.decoder.norm.", "model.decoder.layernorm."),
]
ENCODER = [
    ("norm1.", "self_attn_layer_norm."),
    ("norm2.", "final_layer_norm."),
]
DECODER = [
    ("norm1.", "self_attn_layer_norm."),
    ("norm2.", "encoder_attn_layer_norm."),
    ("norm3.", "final_layer_norm."),
]
FEEDFORWARD = [
    ("linear1.", "{feedforward}fc1."),
    ("linear2.", "{feedforward}fc2."),
]
SELF_ATTENTION = [
    ("self_attn.out_proj.", "self_attn.{out_proj}"),
    ("self_attn.in_proj_", "self_attn.{qkv}_proj."),
]
CROSS_ATTENTION = [
    ("multihead_attn.out_proj.", "encoder_attn.{out_proj}"),
    ("multihead_attn.in_proj_", "encoder_attn.{qkv}_proj."),
]
RESNET = [
    ("conv1.", "embedder.embedder.convolution."),
    ("bn1.", "embedder.embedder.normalization."),
    *(
        (f"layer{stage}.{{i}}.{ours}", f"encoder.stages.{stage - 1}.layers.{{i}}.{theirs}")
        for stage in (1, 2, 3, 4)
        for ours, theirs in (
            *((f"conv{n}.", f"layer.{n - 1}.convolution.") for n in (1, 2, 3)),
            *((f"bn{n}.", f"layer.{n - 1}.normalization.") for n in (1, 2, 3)),
            ("downsample.0.", "shortcut.convolution."),
            ("downsample.1.", "shortcut.normalization."),
        )
    ),
]


def _nested(ours: str, theirs: str, rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(ours + our_part, theirs + their_part) for our_part, their_part in rows]


def _table(layout: str, backbone: str) -> list[tuple[str, str]]:
    """Pairs of prefixes, ours and theirs; {qkv} stands for the three parts of one of ours."""
    names = LAYOUTS[layout]
    encoder = [*SELF_ATTENTION, *FEEDFORWARD, *ENCODER]
    decoder = [*SELF_ATTENTION, *CROSS_ATTENTION, *FEEDFORWARD, *DECODER]
    rows = [
        *HEADS,
        *_nested("transformer.encoder.layers.{i}.", "model.encoder.layers.{i}.", encoder),
        *_nested("transformer.decoder.layers.{i}.", "model.decoder.layers.{i}.", decoder),
        *_nested(
            "backbone.0.body.", names["backbone"], [("", "")] if backbone == "timm" else RESNET
        ),
    ]
    return [
        (ours, theirs.format_map({**names, "i": "{i}", "qkv": "{qkv}"})) for ours, theirs in rows
    ]


class _Prefixes:
    """Replaces the prefix of a key by the one it is paired with."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self.rules = [
            (re.compile(re.escape(source).replace(r"\{i\}", r"(\d+)")), target)
            for source, target in pairs
        ]

    def __call__(self, key: str) -> str | None:
        for pattern, target in self.rules:
            if found := pattern.match(key):
                return (
                    target.replace("{i}", found[1] if found.groups() else "") + key[found.end() :]
                )
        return None


def from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights of transformers' ``DetrForObjectDetection`` to ours; finds out the layout.

    Args:
        state_dict (Mapping[str, Tensor]): of a published file or of the installed model.

    Returns:
        dict[str, Tensor]: the weights under facebookresearch/detr's names.

    Raises:
        CheckpointError: if a key is unknown or a part of an attention projection is missing.
    """
    state = weights_of(state_dict)
    old = any(key.startswith(LAYOUTS["published"]["backbone"]) for key in state)
    own_resnet = any(".convolution." in key for key in state)
    table = _table("published" if old else "installed", "resnet" if own_resnet else "timm")
    rename = _Prefixes(
        (theirs.replace("{qkv}", part), f"{part}:{ours}" if "{qkv}" in theirs else ours)
        for ours, theirs in table
        for part in (PROJECTIONS if "{qkv}" in theirs else ("",))
    )
    converted: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        if key.endswith(".num_batches_tracked"):  # saved from plain batch norms
            continue
        name = rename(key)
        if name is None:
            unknown.append(key)
        elif name[1] == ":":
            parts.setdefault(name[2:], {})[name[0]] = value
        else:
            converted[name] = value
    for name, stacked in parts.items():
        if missing := [part for part in PROJECTIONS if part not in stacked]:
            raise CheckpointError(f"{name}: no weights of {', '.join(missing)}_proj in the file")
        converted[name] = torch.cat([stacked[part] for part in PROJECTIONS])
    _refuse(unknown, "no weights of transformers' DetrForObjectDetection")
    return converted


def to_transformers(
    state_dict: Mapping[str, Tensor], layout: str = "published", backbone: str = "timm"
) -> dict[str, Tensor]:
    """Convert our weights to those of transformers' ``DetrForObjectDetection``.

    Args:
        state_dict (Mapping[str, Tensor]): weights under facebookresearch/detr's names.
        layout (str): ``published`` (for ``from_pretrained``) or ``installed`` (for
            ``load_state_dict`` in transformers 5).
        backbone (str): ``timm``, or ``resnet`` for transformers' own ResNet.

    Returns:
        dict[str, Tensor]: the converted weights, mostly the given tensors themselves.

    Raises:
        CheckpointError: if a key has no counterpart (``pre_norm``, the tiny backbone).
        ValueError: if ``layout`` or ``backbone`` is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if backbone not in ("timm", "resnet"):
        raise ValueError(f"backbone: expected 'timm' or 'resnet', got {backbone!r}")
    rename = _Prefixes(_table(layout, backbone))
    converted: dict[str, Tensor] = {}
    unknown = []
    for key, value in weights_of(state_dict).items():
        name = rename(key)
        if name is None:
            unknown.append(key)
        elif "{qkv}" in name:
            for part, piece in zip(PROJECTIONS, value.chunk(3), strict=True):
                converted[name.replace("{qkv}", part)] = (
                    piece.clone()
                )  # safetensors: no shared memory
        else:
            converted[name] = value
    _refuse(
        unknown,
        "transformers' DetrForObjectDetection, a DETR with a ResNet, has nothing of the kind (any "
        "other becomes .safetensors)",
    )
    return converted


def _refuse(unknown: list[str], why: str) -> None:
    if unknown:
        shown = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise CheckpointError(f"{why}: {len(unknown)} keys are not known ({shown})")
