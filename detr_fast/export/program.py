# SPDX-License-Identifier: Apache-2.0
"""The model as it is deployed, and its graph with batch, height and width left open."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from detr_fast.data.batch import ImageBatch
from detr_fast.models.backbone import FrozenBatchNorm2d
from detr_fast.models.detr import DETR
from detr_fast.models.position_encoding import PositionEncodingLearned
from detr_fast.reference.boxes import box_cxcywh_to_xyxy
from detr_fast.reference.image import normalize_images

LEAST, MOST = 64, 8192  # pixels of a side; a grid of one cell would be a case of its own
MOST_IMAGES = 1024
EXAMPLE = (2, 192, 256)  # images, height, width; its numbers leave no trace in the graph
OUTPUTS = {False: ("scores", "labels", "boxes"), True: ("pred_logits", "pred_boxes")}


class _Shift(nn.Module):
    """In the place of a frozen batch norm whose factor is in the kernel already."""

    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def folded_into(self, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        return conv.weight, self.shift


def folded(model: DETR) -> DETR:
    """Copy a model for inference alone: normalisation in the kernels, the last layer's outputs."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.config = replace(model.config, aux_loss=False)
    for parent in model.modules():
        before: nn.Module | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, FrozenBatchNorm2d):
                assert isinstance(before, nn.Conv2d)
                weight, shift = child.folded_into(before)
                before.weight = nn.Parameter(weight, requires_grad=False)
                setattr(parent, name, _Shift(shift))
            before = child
    return model


class Deployed(nn.Module):
    """From pixels to objects, in torch's own operators.

    Args:
        model (DETR): the trained model; it is copied.
        raw (bool): take normalised images and return what the model says, as the training does.
    """

    def __init__(self, model: DETR, raw: bool = False) -> None:
        super().__init__()
        self.model, self.raw = folded(model), raw

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Find objects.

        Args:
            images (Tensor[B, 3, H, W]): RGB, uint8; with ``raw``, normalised float32, zeros where
                an image ends.
            sizes (IntTensor[B, 2], optional): int32 (height, width) of each image, which is the
                upper left of its plane; default: all of it.

        Returns:
            tuple: scores (float32 Tensor[B, Q]); labels (int64 Tensor[B, Q]); boxes (float32
            Tensor[B, Q, 4]), corners ``(x0, y0, x1, y1)`` as shares of the image's width and
            height. With ``raw``: logits (float32 Tensor[B, Q, C + 1], the last column no-object)
            and boxes (float32 Tensor[B, Q, 4]), ``(cx, cy, w, h)`` as shares.
        """
        logits, boxes = self.predictions(images, sizes)
        if self.raw:
            return logits, boxes
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        return scores, labels, box_cxcywh_to_xyxy(boxes)

    def predictions(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` returns with ``raw``, of the same arguments."""
        if not self.raw:
            images = normalize_images(images, sizes)
        outputs = self.model(images if sizes is None else ImageBatch(images, sizes))
        return outputs["pred_logits"], outputs["pred_boxes"]

    def inputs(self, batch: int, height: int, width: int, padding: bool) -> tuple[Tensor, ...]:
        """Made-up inputs; with padding, each image but the first is smaller than its plane."""
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(batch * height * width)
        shape = (batch, 3, height, width)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        sizes = None
        if padding:
            shares = torch.rand(batch, 2, generator=generator) / 2 + 0.5
            shares[0] = 1
            sizes = (shares * torch.tensor([height, width])).round().to(torch.int32)
        if self.raw:
            images = normalize_images(images, sizes)
        return tuple(x.to(device) for x in (images, sizes) if x is not None)


def exported_program(deployed: Deployed, padding: bool = False) -> ExportedProgram:
    """Trace a model by ``torch.export``, for every number and size of images.

    Args:
        deployed (Deployed): the model.
        padding (bool): with the second input, ``sizes``, for images of unlike size in one batch.
    """
    encoding = deployed.model.backbone[1]
    config = deployed.model.config
    stride = 16 if config.dilation or config.backbone == "tiny" else 32
    learned = isinstance(encoding, PositionEncodingLearned)
    most = PositionEncodingLearned.size * stride if learned else MOST
    batch = Dim("batch", min=1, max=MOST_IMAGES)
    height, width = (Dim(name, min=LEAST, max=most) for name in ("height", "width"))
    shapes: dict[str, dict[int, Dim]] = {"images": {0: batch, 2: height, 3: width}}
    if padding:
        shapes["sizes"] = {0: batch}
    inputs = deployed.inputs(*EXAMPLE, padding)
    with torch.no_grad():
        return torch.export.export(deployed.eval(), inputs, dynamic_shapes=shapes, strict=False)
