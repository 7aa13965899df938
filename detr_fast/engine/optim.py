# SPDX-License-Identifier: Apache-2.0
"""Optimizer and schedule of DETR: AdamW with two learning rates, divided by 10 once."""

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR


def build_optimizer(
    model: nn.Module, *, lr: float, lr_backbone: float, weight_decay: float
) -> AdamW:
    """AdamW over the trainable parameters; those of the backbone learn at a rate of their own.

    The groups, and the order of the parameters in them, are those of facebookresearch/detr: its
    checkpoints hold optimizer states that fit.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in parameters if "backbone" not in name]},
        {"params": [p for name, p in parameters if "backbone" in name], "lr": lr_backbone},
    ]
    return AdamW(groups, lr=lr, weight_decay=weight_decay)


def build_schedule(optimizer: AdamW, lr_drop: int) -> StepLR:
    """Divides the learning rates by 10 every ``lr_drop`` epochs."""
    return StepLR(optimizer, lr_drop, gamma=0.1)
