# SPDX-License-Identifier: Apache-2.0
"""The same detector by others: transformers' DetrForObjectDetection with our weights."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Check, Contender, Missing, optional
from benchmarks.memory import bytes_of, training_bytes
from benchmarks.whole_model import CLASSES, Problem, Weights, memory_of
from detr_fast import reference
from detr_fast.config import Config
from detr_fast.models.transformers_keys import from_transformers, to_transformers


class Theirs:
    """DETR-R50 of transformers on its own ResNet, which needs neither timm nor a download.

    Args:
        device (torch.device): where it runs.
        ours (Config): the flags of ours.
        weights (dict[str, Tensor]): ours.
        attention (str): ``eager``, which is what it was published with, or ``sdpa``.
        bf16 (bool): within bfloat16 autocast.
        compiled (bool): by ``torch.compile``.
    """

    def __init__(
        self,
        device: torch.device,
        ours: Config,
        weights: Weights,
        attention: str = "eager",
        *,
        bf16: bool = False,
        compiled: bool = False,
    ) -> None:
        import transformers

        backbone = transformers.ResNetConfig(depths=(3, 4, 6, 3), out_features=["stage4"])
        config = transformers.DetrConfig(
            backbone_config=backbone,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            num_labels=CLASSES,
            encoder_layers=ours.enc_layers,
            decoder_layers=ours.dec_layers,
            dropout=ours.dropout,
            auxiliary_loss=True,
        )
        with torch.random.fork_rng():
            self.model = transformers.DetrForObjectDetection._from_config(
                config, attn_implementation="eager"
            )
        self.model.set_attn_implementation({"": attention})
        self.model.load_state_dict(to_transformers(weights, "installed", "resnet"))
        self.model.to(device)
        for name, parameter in self.model.named_parameters():  # it freezes all of its own ResNet
            frozen = ".embedder." in name or ".stages.0." in name
            parameter.requires_grad_(not frozen)
        self.device, self.dtype = device, torch.bfloat16 if bf16 else None
        if compiled:
            torch.compiler.reset()
        self._call = torch.compile(self.model, dynamic=False) if compiled else self.model

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def __call__(self, tensors: Tensor, mask: Tensor | None, **labels: Any) -> Any:
        with self.autocast():
            return self._call(tensors, pixel_mask=mask, **labels)


def inference_contender(
    device: torch.device,
    ours: Config,
    weights: Weights,
    given: Problem,
    sizes: Tensor,
    *,
    check: Check | None = None,
    slow_start: bool = False,
    **how: Any,
) -> Contender | Missing:
    """From bytes to the boxes that its processor makes; ``sizes`` are those of the images."""
    if isinstance(module := optional("transformers"), Missing):
        return module
    theirs = Theirs(device, ours, weights, compiled=slow_start, **how)
    theirs.model.eval()
    processor, mask = module.DetrImageProcessor(), pixel_mask(given)

    @torch.no_grad()
    def detect() -> Any:
        images = reference.normalize_images(*given.bytes.images).contiguous()
        outputs = theirs(images, mask)
        return processor.post_process_object_detection(outputs, 0.0, sizes)

    return Contender(
        detect,
        check=check,
        slow_start=slow_start,
        waits=True,
        before=memory_of(device, fast=False),
        held=lambda: bytes_of([*theirs.model.parameters(), *theirs.model.buffers()]),
    )


def pixel_mask(given: Problem) -> Tensor:
    """1 where a pixel is none of padding (int64 Tensor[B, H, W])."""
    return (~given.floats.images.mask).long()


def training_contender(
    device: torch.device,
    ours: Config,
    weights: Weights,
    given: Problem,
    *,
    check: Check | None = None,
    slow_start: bool = False,
    **how: Any,
) -> Contender | Missing:
    """A training step as transformers' users write it: its own loss, clipping, AdamW.

    The images are normalised before, as its processor does. With ``bf16`` the optimizer is fused.
    """
    if isinstance(module := optional("transformers"), Missing):
        return module
    theirs = Theirs(device, ours, weights, compiled=slow_start, **how)
    trained = {n: p for n, p in theirs.model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in trained.items() if ("backbone" in n) == of_backbone]}
        for of_backbone in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True if how.get("bf16") else None)
    tensors, mask = given.floats.images.tensors, pixel_mask(given)
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in given.listed]

    def step() -> Any:
        outputs = theirs(tensors, mask, labels=labels)
        optimizer.zero_grad()
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(theirs.model.parameters(), ours.clip_max_norm)
        optimizer.step()
        return outputs

    def checked() -> Any:
        theirs.model.eval()  # no dropout; all of its norms are frozen
        losses = step().loss_dict
        theirs.model.train()
        gradients = {n: p.grad.float().clone() for n, p in trained.items() if p.grad is not None}
        return {n: v.float() for n, v in losses.items()}, from_transformers(gradients)

    theirs.model.train()
    return Contender(
        step,
        checked=checked,
        check=check,
        slow_start=slow_start,
        waits=True,
        before=memory_of(device, fast=False),
        held=lambda: training_bytes(theirs.model, optimizer),
    )
