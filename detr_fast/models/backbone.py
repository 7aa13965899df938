# SPDX-License-Identifier: Apache-2.0
"""ResNet with frozen batch norm, its parameters named as torchvision names them."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.models.checkpoint import CheckpointError, load_weights, read_checkpoint, weights_of
from detr_fast.models.inference_cache import InferenceCache
from detr_fast.ops.attention import computed_in

DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
FROZEN = ("conv1.", "layer1.")  # ImageNet's stem and first stage, which DETR never trains


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine weights are buffers: ``x * scale + shift``.

    Args:
        channels (int): number of channels.
    """

    eps = 1e-5
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.kept = InferenceCache()

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """Return the factor and the summand of every channel, two Tensor[C], at least float32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        scale = self.weight.to(dtype) * (self.running_var.to(dtype) + self.eps).rsqrt()
        return scale, self.bias.to(dtype) - self.running_mean.to(dtype) * scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x (Tensor[B, C, H, W])``."""
        scale, shift = (v.to(self.weight.dtype)[:, None, None] for v in self.scale_shift())
        return x * scale + shift

    def folded_into(self, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Return kernel and summand of the convolution that also normalises.

        The product is float32's, and then rounded to the dtype of autocast. In inference both are
        kept from one image to the next.
        """
        weight, dtype = conv.weight, computed_in(conv.weight)

        def fold() -> tuple[Tensor, Tensor]:
            scale, shift = self.scale_shift()
            return (weight * scale[:, None, None, None]).to(dtype), shift.to(dtype)

        return self.kept(fold, weight.device, weight, *self.buffers())

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # files saved from nn.BatchNorm2d
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm2d, folded: bool) -> Tensor:
    """Convolve and normalise ``x (Tensor[B, C, H, W])``.

    Folded, the normalisation goes into the kernel, ``conv(x, w * scale) + shift``. This is exact
    for training too: ``w`` stays the parameter (and what weight decay sees), its gradient is that
    of the kernel times ``scale``, and no activation is read or written for the normalisation.
    """
    if not folded:
        return norm(conv(x))
    weight, shift = norm.folded_into(conv)
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


class Bottleneck(nn.Module):
    """Residual block of three convolutions, the stride in the 3x3 (ResNet v1.5)."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, dilation: int, shortcut: bool, folded: bool
    ) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.folded = folded
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = FrozenBatchNorm2d(width)
        self.conv2 = nn.Conv2d(
            width, width, 3, stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = FrozenBatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = FrozenBatchNorm2d(outputs)
        self.downsample = None
        if shortcut:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, FrozenBatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (Tensor[B, inputs, H, W])`` to Tensor[B, 4 * width, H / stride, W / stride]."""
        out = F.relu(conv_norm(x, self.conv1, self.bn1, self.folded), inplace=True)
        out = F.relu(conv_norm(out, self.conv2, self.bn2, self.folded), inplace=True)
        out = conv_norm(out, self.conv3, self.bn3, self.folded)
        if self.downsample is not None:
            x = conv_norm(x, *self.downsample, self.folded)
        return F.relu(out.add_(x), inplace=True)


class ResNet(nn.Module):
    """ResNet-50 or ResNet-101 up to the last stage (He et al., CVPR 2016).

    Args:
        depths (tuple[int, int, int, int]): number of blocks of the four stages.
        dilation (bool): in the last stage, dilation in place of stride.
        folded (bool): fold frozen batch norm into the kernels.
    """

    def __init__(self, depths: tuple[int, ...], dilation: bool, folded: bool) -> None:
        super().__init__()
        self.folded = folded
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm2d(64)
        self.layer1 = self._stage(64, 64, depths[0], stride=1)
        self.layer2 = self._stage(256, 128, depths[1], stride=2)
        self.layer3 = self._stage(512, 256, depths[2], stride=2)
        stride, spread = (1, 2) if dilation else (2, 1)
        self.layer4 = self._stage(1024, 512, depths[3], stride, spread)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, inputs: int, width: int, depth: int, stride: int, dilation: int = 1
    ) -> nn.Sequential:
        # the first block of a dilated stage was trained undilated: only its stride goes
        first = Bottleneck(inputs, width, stride, 1, True, self.folded)
        outputs = width * Bottleneck.expansion
        rest = (
            Bottleneck(outputs, width, 1, dilation, False, self.folded) for _ in range(depth - 1)
        )
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``x (Tensor[B, 3, H, W])`` to features at stride 32 (dilated: 16)."""
        x = F.relu(conv_norm(x, self.conv1, self.bn1, self.folded), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Backbone(nn.Module):
    """The ResNet of DETR; the stem and the first stage are frozen.

    Args:
        name (str): ``resnet50`` or ``resnet101``.
        dilation (bool): features at stride 16, not 32 (DC5).
        folded (bool): fold frozen batch norm into the kernels, and compute in channels_last: of a
            pixel all channels beside each other, as kernels of convolutions take them.
    """

    num_channels = 2048

    def __init__(self, name: str, dilation: bool = False, folded: bool = True) -> None:
        super().__init__()
        self.body = ResNet(DEPTHS[name], dilation, folded)
        self.layout = torch.channels_last if folded else torch.contiguous_format
        self.body.to(memory_format=self.layout)
        for key, parameter in self.body.named_parameters():
            if key.startswith(FROZEN):
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``images (Tensor[B, 3, H, W])`` to features Tensor[B, 2048, H / 32, W / 32]."""
        return self.body(images.contiguous(memory_format=self.layout))


def load_backbone_weights(model: nn.Module, source: str | os.PathLike[str]) -> None:
    """Start the backbone from trained weights.

    Args:
        model (DETR): the model; ``model.backbone[0]`` gets the weights.
        source (str | PathLike): ``imagenet`` (torchvision's IMAGENET1K_V1, downloaded once and
            checked by hash), ``none``, or a file: a state dict of torchvision's ResNet or a
            checkpoint of a DETR.

    Raises:
        CheckpointError: if the weights cannot be had or do not fit; names the flag and the remedy.
        ImportError: if ``imagenet`` is asked for without torchvision.
    """
    source = os.fspath(source)
    if source == "none":
        return
    try:
        state = _imagenet(model.config.backbone) if source == "imagenet" else _from_file(source)
        load_weights(model.backbone[0], state)
    except CheckpointError as error:
        raise CheckpointError(
            f"--backbone_weights {source}: {error} (or start from random weights with "
            "--backbone_weights none)"
        ) from error


def _from_file(path: str) -> dict[str, Tensor]:
    prefix, state = "backbone.0.", weights_of(read_checkpoint(path))
    of_detr = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return of_detr or _of_torchvision(state)


def _of_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"body.{key}": value for key, value in state.items() if not key.startswith("fc.")}


def _imagenet(name: str) -> dict[str, Tensor]:
    if name not in DEPTHS:
        raise CheckpointError(f"there are no ImageNet weights for the backbone {name!r}")
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            'ImageNet weights come through torchvision: pip install "detr-fast[train]"'
        ) from error
    weights = get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return _of_torchvision(weights.get_state_dict(check_hash=True))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the download of {weights.url} failed ({error}): fetch it elsewhere and name the file"
        ) from error
