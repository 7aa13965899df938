# SPDX-License-Identifier: Apache-2.0
"""DETR: backbone, transformer, prediction heads, and the four published models."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.data.batch import pad_images
from detr_fast.models.backbone import Backbone
from detr_fast.models.checkpoint import load_weights, read_checkpoint
from detr_fast.models.model_config import ModelConfig
from detr_fast.models.position_encoding import PositionEncodingLearned, PositionEncodingSine
from detr_fast.models.postprocess import PostProcess
from detr_fast.models.tiny import DETR_TINY, ConvBackbone, place_queries
from detr_fast.models.transformer import Attention, ReferenceAttention, Transformer
from detr_fast.ops.layers import unbind_layers

PUBLISHED = "https://dl.fbaipublicfiles.com/detr/"
PUBLISHED_CLASSES = 91
# the architectures of the factories below, and what the flag --model stands for
MODELS = {
    "detr_resnet50": ModelConfig(),
    "detr_resnet50_dc5": ModelConfig(dilation=True),
    "detr_resnet101": ModelConfig(backbone="resnet101"),
    "detr_resnet101_dc5": ModelConfig(backbone="resnet101", dilation=True),
    "detr_tiny": DETR_TINY,
}


class PaddedImages(Protocol):
    """Images and what of them is padding, for instance :class:`detr_fast.data.ImageBatch`."""

    tensors: Tensor
    mask: Tensor


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        inputs (int): channels that come in.
        hidden (int): channels between the layers.
        outputs (int): channels that go out.
        depth (int): number of linear layers.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (Tensor[..., inputs])`` to Tensor[..., outputs]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """End-to-End Object Detection with Transformers (Carion et al., ECCV 2020).

    Parameters and their names are those of facebookresearch/detr.

    Args:
        config (ModelConfig): the architecture.
        folded (bool): fold frozen batch norm into the kernels and attend by fused kernels; False
            restates the original step.
    """

    def __init__(self, config: ModelConfig, folded: bool = True) -> None:
        super().__init__()
        width = config.hidden_dim
        self.config = config
        self.transformer = Transformer(
            width,
            config.nheads,
            config.enc_layers,
            config.dec_layers,
            config.dim_feedforward,
            config.dropout,
            config.pre_norm,
            Attention if folded else ReferenceAttention,
        )
        self.class_embed = nn.Linear(width, config.num_classes + 1)
        self.bbox_embed = MLP(width, width, 4, depth=3)
        self.query_embed = nn.Embedding(config.num_queries, width)
        backbone = _build_backbone(config, folded)
        self.input_proj = nn.Conv2d(backbone.num_channels, width, 1)
        learned = config.position_embedding == "learned"
        encoding = PositionEncodingLearned(width) if learned else PositionEncodingSine(width)
        self.backbone = nn.ModuleList([backbone, encoding])

    def forward(self, images: Sequence[Tensor] | Tensor | PaddedImages) -> dict[str, Any]:
        """Detect objects.

        Args:
            images: normalised images of floating point, in one of three forms: a list of
                Tensor[3, h, w] of any sizes (padded here); a Tensor[B, 3, H, W] without padding;
                an object with ``tensors (Tensor[B, 3, H, W])`` and ``mask (BoolTensor[B, H, W])``,
                True for padding.

        Returns:
            dict: ``pred_logits (Tensor[B, Q, num_classes + 1])``; ``pred_boxes (Tensor[B, Q, 4])``,
            cxcywh relative to the unpadded image, float32; and with ``aux_loss``, ``aux_outputs``:
            a list with the two of every decoder layer but the last.

        Raises:
            TypeError: if the images are of no such form or not of floating point.
            ValueError: if a shape does not fit.
        """
        tensors, mask = _as_batch(images)
        features = self.backbone[0](tensors)
        padding = _padded_cells(mask, features)
        position = self.backbone[1](padding).to(features.dtype)
        states = self.transformer(
            self.input_proj(features).flatten(2).transpose(1, 2),
            position.flatten(1, 2),
            None if mask is None else padding.flatten(1),
            self.query_embed.weight,
            every_layer=self.config.aux_loss,
        )
        logits = _at_least_float32(self.class_embed(states))
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 is off by two pixels
            states = states.to(self.class_embed.weight.dtype)
            boxes = _at_least_float32(self.bbox_embed(states)).sigmoid()
        outputs = [
            {"pred_logits": layer_logits, "pred_boxes": layer_boxes}
            for layer_logits, layer_boxes in zip(
                unbind_layers(logits), unbind_layers(boxes), strict=True
            )
        ]
        if self.config.aux_loss:
            return {**outputs[-1], "aux_outputs": outputs[:-1]}
        return outputs[-1]


def _build_backbone(config: ModelConfig, folded: bool) -> nn.Module:
    if config.backbone == "tiny":
        return ConvBackbone()
    return Backbone(config.backbone, config.dilation, folded)


def _as_batch(images: Sequence[Tensor] | Tensor | PaddedImages) -> tuple[Tensor, Tensor | None]:
    """Return images (B, 3, H, W) and the mask of their padding (B, H, W), None if there is none."""
    mask = None
    if hasattr(images, "tensors") and hasattr(images, "mask"):
        images, mask = images.tensors, images.mask
    elif isinstance(images, (list, tuple)):
        for index, image in enumerate(images):
            _check_images(image, f"images[{index}]", ("3", "h", "w"))
        same_size = len({image.shape for image in images}) == 1
        images, mask = (torch.stack(images), None) if same_size else pad_images(images)
    _check_images(images, "images", ("B", "3", "H", "W"))
    if mask is not None:
        expected = (len(images), *images.shape[2:])
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, True for padding, got {mask.dtype}")
        if mask.shape != expected:
            raise ValueError(f"mask: expected shape {expected}, got {tuple(mask.shape)}")
    return images, mask


def _check_images(images: Tensor, name: str, dims: tuple[str, ...]) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, a list of tensors or an object with tensors and mask, "
            f"got {type(images).__name__}"
        )
    shape = tuple(images.shape)
    if len(shape) != len(dims) or shape[-3] != 3 or 0 in shape:
        hint = ": put a single image into a list" if len(dims) == 4 and len(shape) == 3 else ""
        raise ValueError(f"{name}: expected shape ({', '.join(dims)}), got {shape}{hint}")
    if not images.is_floating_point():
        raise TypeError(
            f"{name}: expected normalised floating-point images, got {images.dtype}: "
            "pass them through detr_fast.data.transforms.normalize"
        )


def _padded_cells(mask: Tensor | None, features: Tensor) -> Tensor:
    """Sample the mask (B, H, W) on the grid of ``features (Tensor[B, C, h, w])``: (B, h, w)."""
    grid = features.shape[-2:]
    if mask is None:
        return torch.zeros(1, *grid, dtype=torch.bool, device=features.device)
    cells = F.interpolate(mask[None].float(), size=grid)[0].to(torch.bool)
    # a softmax over no cell at all is NaN: an image that is all padding counts as none
    return cells & ~cells.all(dim=(1, 2), keepdim=True)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def build_detr(config: ModelConfig, *, folded: bool = True, train_backbone: bool = True) -> DETR:
    """Build a DETR with fresh weights: Xavier-uniform transformer, Kaiming-normal backbone.

    Args:
        config (ModelConfig): the architecture.
        folded (bool): False runs frozen batch norm after its convolution and
            ``nn.MultiheadAttention`` with default arguments, as the original does (its parameters
            are the same).
        train_backbone (bool): False freezes the whole backbone (``--lr_backbone 0``).
    """
    model = DETR(config, folded)
    if not train_backbone:
        model.backbone[0].requires_grad_(False)
    if config.backbone == "tiny":
        place_queries(model)
    return model


def detr_resnet50(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
):
    """DETR with a ResNet-50 backbone; its authors published 42.0 AP on COCO val5k.

    Args:
        pretrained (bool): load the published weights; needs the default ``num_classes``.
        num_classes (int): highest class id + 1.
        return_postprocessor (bool): return a :class:`PostProcess` too.

    Returns:
        DETR, or tuple[DETR, PostProcess].

    Raises:
        ValueError: if pretrained weights are asked for another number of classes.
        CheckpointError: if the published file cannot be had; says where to put it by hand.
    """
    config = replace(MODELS["detr_resnet50"], num_classes=num_classes)
    return _published(config, "detr-r50-e632da11.pth", pretrained, return_postprocessor)


def detr_resnet50_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
):
    """DETR-DC5 with a ResNet-50 (published: 43.3 AP); arguments as of :func:`detr_resnet50`."""
    config = replace(MODELS["detr_resnet50_dc5"], num_classes=num_classes)
    return _published(config, "detr-r50-dc5-f0fb7ef5.pth", pretrained, return_postprocessor)


def detr_resnet101(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
):
    """DETR with a ResNet-101 (published: 43.5 AP); arguments as of :func:`detr_resnet50`."""
    config = replace(MODELS["detr_resnet101"], num_classes=num_classes)
    return _published(config, "detr-r101-2c7b67e5.pth", pretrained, return_postprocessor)


def detr_resnet101_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
):
    """DETR-DC5 with a ResNet-101 (published: 44.9 AP); arguments as of :func:`detr_resnet50`."""
    config = replace(MODELS["detr_resnet101_dc5"], num_classes=num_classes)
    return _published(config, "detr-r101-dc5-a2e86def.pth", pretrained, return_postprocessor)


def detr_tiny(num_classes: int | None = None, return_postprocessor: bool = False, **changes: Any):
    """The small model of the default run, which learns on a CPU within minutes.

    Args:
        num_classes (int): highest class id + 1; default: that of the generated data set.
        return_postprocessor (bool): return a :class:`PostProcess` too.
        **changes: other fields of :class:`ModelConfig`, in place of those of ``DETR_TINY``.

    Returns:
        DETR, or tuple[DETR, PostProcess].
    """
    if num_classes is not None:
        changes["num_classes"] = num_classes
    return _with_postprocessor(build_detr(replace(DETR_TINY, **changes)), return_postprocessor)


def _published(config: ModelConfig, file: str, pretrained: bool, return_postprocessor: bool):
    if pretrained and config.num_classes != PUBLISHED_CLASSES:
        raise ValueError(
            f"num_classes: the published weights have {PUBLISHED_CLASSES}, got "
            f"{config.num_classes}: use pretrained=False or num_classes={PUBLISHED_CLASSES}"
        )
    checkpoint = read_checkpoint(PUBLISHED + file) if pretrained else None
    model = build_detr(config)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return _with_postprocessor(model, return_postprocessor)


def _with_postprocessor(model: DETR, return_postprocessor: bool):
    if not return_postprocessor:
        return model
    return model, PostProcess()
