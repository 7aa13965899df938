# SPDX-License-Identifier: Apache-2.0
"""What a DETR is made of; field names and defaults are the flags of the original ``main.py``."""

from dataclasses import dataclass, fields

BACKBONES = ("resnet50", "resnet101", "tiny")
POSITION_EMBEDDINGS = ("sine", "learned")
LARGEST = 1_000_000  # of any size; a file from elsewhere shall not fill the memory


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a DETR, enough to build it again from a checkpoint.

    Args:
        num_classes (int): highest class id + 1; the class head has one output more, the last one,
            for "no object".
        backbone (str): ``resnet50``, ``resnet101`` or ``tiny``.
        dilation (bool): in the last ResNet stage put dilation in place of stride (DC5): features
            at stride 16, not 32.
        position_embedding (str): ``sine`` or ``learned``.
        hidden_dim (int): channels of the transformer; a multiple of ``nheads`` and of 4.
        nheads (int): attention heads.
        enc_layers (int): encoder layers; 0 hands the features to the decoder as they are.
        dec_layers (int): decoder layers, at least 1.
        dim_feedforward (int): hidden channels of the feed-forward blocks.
        dropout (float): dropout of the transformer, in [0, 1).
        num_queries (int): detections made for every image.
        pre_norm (bool): normalise before each block of the transformer and not after it.
        aux_loss (bool): return the predictions of every decoder layer.

    Raises:
        ValueError: if a value is out of range or two of them contradict.
    """

    num_classes: int = 91
    backbone: str = "resnet50"
    dilation: bool = False
    position_embedding: str = "sine"
    hidden_dim: int = 256
    nheads: int = 8
    enc_layers: int = 6
    dec_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.1
    num_queries: int = 100
    pre_norm: bool = False
    aux_loss: bool = True

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, wanted = (
                getattr(self, entry.name),
                (int, float) if entry.type is float else entry.type,
            )
            if not isinstance(value, wanted) or (type(value) is bool) != (entry.type is bool):
                raise ValueError(f"{entry.name}: expected {entry.type.__name__}, got {value!r:.60}")
        for name, known in (("backbone", BACKBONES), ("position_embedding", POSITION_EMBEDDINGS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        at_least_one = ("num_classes", "hidden_dim", "nheads", "dec_layers", "dim_feedforward")
        for name in (*at_least_one, "num_queries"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
            if value > LARGEST:
                raise ValueError(f"{name}: expected at most {LARGEST}, got {value}")
        if not 0 <= self.enc_layers <= LARGEST:
            raise ValueError(f"enc_layers: expected 0 to {LARGEST}, got {self.enc_layers}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if self.hidden_dim % self.nheads or self.hidden_dim % 4:
            raise ValueError(
                f"hidden_dim: expected a multiple of nheads ({self.nheads}) and of 4, "
                f"got {self.hidden_dim}"
            )
        if self.dilation and self.backbone == "tiny":
            raise ValueError("dilation: only the ResNet backbones have it, not 'tiny'")
