# SPDX-License-Identifier: Apache-2.0
"""DETR: backbone, transformer, prediction heads, and the four published models."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.data.batch import ImageBatch, pad_images
from detr_fast.models.attention import FUSED, REFERENCE
from detr_fast.models.backbone import Backbone
from detr_fast.models.checkpoint import load_weights, read_checkpoint
from detr_fast.models.model_config import ModelConfig
from detr_fast.models.padding import Padding, padding_of_mask, padding_of_sizes
from detr_fast.models.position_encoding import PositionEncodingLearned, PositionEncodingSine
from detr_fast.models.postprocess import PostProcess
from detr_fast.models.tiny import DETR_TINY, ConvBackbone, place_queries
from detr_fast.models.transformer import Transformer
from detr_fast.ops.layers import unbind_layers

PUBLISHED = "https://dl.fbaipublicfiles.com/detr/"
PUBLISHED_CLASSES = 91
# what facebookresearch/detr has published of the models below
PUBLISHED_FILES = {
    "detr_resnet50": "detr-r50-e632da11.pth",
    "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr_resnet101": "detr-r101-2c7b67e5.pth",
    "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
}
# the architectures of the factories below, and what the flag --model stands for
MODELS = {
    "detr_resnet50": ModelConfig(),
    "detr_resnet50_dc5": ModelConfig(dilation=True),
    "detr_resnet101": ModelConfig(backbone="resnet101"),
    "detr_resnet101_dc5": ModelConfig(backbone="resnet101", dilation=True),
    "detr_tiny": DETR_TINY,
}


class PaddedImages(Protocol):
    """Images and what of them is padding, for instance the ``NestedTensor`` of the original."""

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
        folded (bool): fold frozen batch norm into the kernels, attend by fused kernels and have
            images and features in channels_last; False restates the original step.
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
            FUSED if folded else REFERENCE,
        )
        self.class_embed = nn.Linear(width, config.num_classes + 1)
        self.bbox_embed = MLP(width, width, 4, depth=3)
        self.query_embed = nn.Embedding(config.num_queries, width)
        backbone = _build_backbone(config, folded)
        self.input_proj = nn.Conv2d(backbone.num_channels, width, 1)
        learned = config.position_embedding == "learned"
        encoding = PositionEncodingLearned(width) if learned else PositionEncodingSine(width)
        self.backbone = nn.ModuleList([backbone, encoding])

    def forward(
        self, images: Sequence[Tensor] | Tensor | ImageBatch | PaddedImages
    ) -> dict[str, Any]:
        """Detect objects.

        Args:
            images: normalised images of floating point, in one of four forms: a list of
                Tensor[3, h, w] of any sizes (padded here); a Tensor[B, 3, H, W] without padding;
                an `detr_fast.data.ImageBatch`; another object with
                ``tensors (Tensor[B, 3, H, W])`` and ``mask (BoolTensor[B, H, W])``, True for
                padding, wherever it is: the kernels of attention take no mask, so SDPA runs.

        Returns:
            dict: ``pred_logits (Tensor[B, Q, num_classes + 1])``; ``pred_boxes (Tensor[B, Q, 4])``,
            cxcywh relative to the unpadded image, float32; and with ``aux_loss``, ``aux_outputs``:
            a list with the two of every decoder layer but the last.

        Raises:
            TypeError: if the images are of no such form or not of floating point.
            ValueError: if a shape does not fit.
        """
        tensors, sizes, mask = _as_batch(images)
        features = self.backbone[0](tensors)
        padding = _padding(tensors, sizes, mask, features)
        # contiguous: channels_last is; of others this is one copy instead of one for each product
        states = self.transformer(
            self.input_proj(features).flatten(2).transpose(1, 2).contiguous(),
            self.backbone[1](features, padding),
            padding,
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
        return ConvBackbone(channels_last=folded)
    return Backbone(config.backbone, config.dilation, folded)


def _as_batch(images: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return images (B, 3, H, W) and of their padding sizes, mask or neither, as they are given."""
    mask = None
    if isinstance(images, (list, tuple)) and not isinstance(images, ImageBatch):
        for index, image in enumerate(images):
            _check_images(image, f"images[{index}]", ("3", "h", "w"))
        images = pad_images(images)
    if isinstance(images, ImageBatch):
        images, sizes = images
    elif hasattr(images, "tensors") and hasattr(images, "mask"):
        images, sizes, mask = images.tensors, None, images.mask
    else:
        sizes = None
    _check_images(images, "images", ("B", "3", "H", "W"))
    if sizes is not None:
        _check_form(sizes, "sizes", torch.int32, (images.shape[0], 2))
    if mask is not None:
        _check_form(mask, "mask", torch.bool, (images.shape[0], *images.shape[2:]))
    return images, sizes, mask


def _check_form(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        hint = ", True for padding" if dtype == torch.bool else ""
        raise TypeError(f"{name}: expected {dtype}{hint}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


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


def _padding(
    tensors: Tensor, sizes: Tensor | None, mask: Tensor | None, features: Tensor
) -> Padding | None:
    grid = features.shape[-2:]
    if mask is not None:
        return padding_of_mask(mask, grid)
    return None if sizes is None else padding_of_sizes(sizes, tensors.shape[-2:], grid)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def build_detr(config: ModelConfig, *, folded: bool = True, train_backbone: bool = True) -> DETR:
    """Build a DETR with fresh weights: Xavier-uniform transformer, Kaiming-normal backbone.

    Args:
        config (ModelConfig): the architecture.
        folded (bool): False runs frozen batch norm after its convolution, in NCHW, and
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
        return_postprocessor (bool): return the model and a `PostProcess`, not the model alone.

    Raises:
        ValueError: if pretrained weights are asked for another number of classes.
        CheckpointError: if the published file cannot be had; says where to put it by hand.
    """
    config = replace(MODELS["detr_resnet50"], num_classes=num_classes)
    return _published(config, PUBLISHED_FILES["detr_resnet50"], pretrained, return_postprocessor)


def detr_resnet50_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
):
    """DETR-DC5 with a ResNet-50 (published: 43.3 AP); arguments as of `detr_resnet50`."""
    config = replace(MODELS["detr_resnet50_dc5"], num_classes=num_classes)
    return _published(
        config, PUBLISHED_FILES["detr_resnet50_dc5"], pretrained, return_postprocessor
    )


def detr_resnet101(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
):
    """DETR with a ResNet-101 (published: 43.5 AP); arguments as of `detr_resnet50`."""
    config = replace(MODELS["detr_resnet101"], num_classes=num_classes)
    return _published(config, PUBLISHED_FILES["detr_resnet101"], pretrained, return_postprocessor)


def detr_resnet101_dc5(
    pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
):
    """DETR-DC5 with a ResNet-101 (published: 44.9 AP); arguments as of `detr_resnet50`."""
    config = replace(MODELS["detr_resnet101_dc5"], num_classes=num_classes)
    return _published(
        config, PUBLISHED_FILES["detr_resnet101_dc5"], pretrained, return_postprocessor
    )


def detr_tiny(num_classes: int | None = None, return_postprocessor: bool = False, **changes: Any):
    """The small model of the default run, which learns on a CPU within minutes.

    Args:
        num_classes (int): highest class id + 1; default: that of the generated data set.
        return_postprocessor (bool): return the model and a `PostProcess`, not the model alone.
        **changes: other fields of `ModelConfig`, in place of those of ``DETR_TINY``.
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
