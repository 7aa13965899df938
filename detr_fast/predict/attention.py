# SPDX-License-Identifier: Apache-2.0
"""Where the queries look: attention maps of the last decoder layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.models.detr import DETR


class AttentionMaps:
    """Attention of a model's last forward pass, computed again from queries and keys.

    The fused path makes no maps, and is not touched: hooks take what went into the last
    cross-attention.

    Args:
        model (DETR): not compiled, and in no CUDA graph.
    """

    def __init__(self, model: DETR) -> None:
        self._model = model
        self._grid = (0, 0)
        self._inputs: tuple[Any, ...] = ()

    @contextmanager
    def watching(self) -> Iterator["AttentionMaps"]:
        """Within this context the forward passes of the model are seen."""
        looking = self._model.transformer.decoder.layers[-1].multihead_attn
        hooks = [
            self._model.input_proj.register_forward_hook(self._see_grid),
            looking.register_forward_pre_hook(self._see_inputs),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _see_grid(self, _module: Any, _inputs: Any, features: Tensor) -> None:
        self._grid = (features.shape[-2], features.shape[-1])

    def _see_inputs(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        self._inputs = inputs

    @torch.no_grad()
    def of(self, image: int, queries: Tensor) -> Tensor:
        """The maps of some queries of one image of the last batch.

        Args:
            image (int): its place in the batch.
            queries (Tensor[N]): int64.

        Returns:
            Tensor[N, h, w]: float32, the mean over the heads, of the cells that are no padding;
            each map sums to 1.
        """
        query, (weight, bias, keys, _), padding = self._inputs
        heads = keys.shape[2:]
        q = F.linear(query[image, queries].float(), weight.float(), bias.float())
        q = q.unflatten(-1, heads).transpose(0, 1)
        scores = q @ keys[image].float().permute(1, 2, 0) * heads[1] ** -0.5
        real = torch.ones(self._grid, dtype=torch.bool, device=scores.device)
        if padding is not None:
            real = ~padding.cells[image].view(self._grid)
        weights = scores.masked_fill(~real.flatten(), -torch.inf).softmax(-1).mean(0)
        height, width = int(real.any(1).sum()), int(real.any(0).sum())
        return weights.unflatten(-1, self._grid)[:, :height, :width]
