# SPDX-License-Identifier: Apache-2.0
"""Models with random weights and frozen statistics, and batches of images for them."""

import torch

from detr_fast.data.batch import pad_images
from detr_fast.models import DETR, ModelConfig, build_detr

SMALL = ModelConfig(
    num_classes=5,
    hidden_dim=32,
    nheads=4,
    enc_layers=1,
    dec_layers=2,
    dim_feedforward=64,
    dropout=0.0,
    num_queries=7,
)


def randomize_norms(module: torch.nn.Module, seed: int = 0) -> None:
    """Give frozen norms statistics that matter, and scales under which activations stay small."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in module.named_buffers():
        if name.endswith(("weight", "running_var")):
            buffer.copy_(0.3 + 0.5 * torch.rand(buffer.shape, generator=generator))
        elif name.endswith(("bias", "running_mean")):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def random_detr(config: ModelConfig = SMALL, *, folded: bool = True, seed: int = 0) -> DETR:
    """Build a model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = build_detr(config, folded=folded)
    randomize_norms(model.backbone, seed)
    return model.eval()


def random_images(*sizes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def random_batch(*sizes: tuple[int, int], seed: int = 0):
    return pad_images(random_images(*sizes, seed=seed))


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def weighted_sum(*outputs: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A loss with another gradient for every element."""
    generator = torch.Generator().manual_seed(seed)
    return sum((x * torch.rand(x.shape, generator=generator).to(x)).sum() for x in outputs)
