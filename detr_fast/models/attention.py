# SPDX-License-Identifier: Apache-2.0
"""Attention modules with the parameters of ``nn.MultiheadAttention``: fused, and as the original.

A module for self-attention, one for cross-attention and dropout, each of them in both ways.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import ops
from detr_fast.models.inference_cache import InferenceCache
from detr_fast.models.padding import Padding
from detr_fast.ops.dropout import dropout
from detr_fast.ops.layers import unbind_layers

Memory = tuple[Tensor, ...]  # what a cross-attention looks at, as its own class prepared it


class _Fused(nn.MultiheadAttention):
    """Attention without attention maps, by `detr_fast.ops.attention`."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Padding | None, *, of_itself: bool
    ) -> Tensor:
        """Attend from heads to heads (Tensor[B, L, H, D]) and project what comes out."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        rows = {}
        if padding is not None:
            rows = {"key_rect": padding.rect, "padded_width": padding.width}
            if of_itself:
                rows["query_rect"] = padding.rect
            path = ops.backend("attention", q, k, v, dropout_p=dropout_p)[0]
            if padding.rect is None or path != "fused":  # others would make this mask of the rect
                rows = {"mask": ~padding.cells[:, None, None, :]}
        out = ops.attention(q, k, v, dropout_p=dropout_p, **rows)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class SelfAttention(_Fused):
    """Attention of a sequence to itself, with positions added to queries and keys.

    Of positions that all images share, ``(x + position) W`` is ``x W`` plus a table that depends
    on the weights alone. In inference that table is kept, and one product gives queries, keys and
    values. To train, two products are less work than the gradients of the table.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(width, heads, dropout)
        self.kept = InferenceCache()

    def forward(self, x: Tensor, position: Tensor, padding: Padding | None = None) -> Tensor:
        """Attend.

        Args:
            x (Tensor[B, L, C]): the sequence.
            position (Tensor[B, L, C] | Tensor[L, C]): added where queries and keys are made.
            padding (Padding, optional): of the sequence; what is at padded places is undefined.

        Returns:
            Tensor[B, L, C]: the projected averages.
        """
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        heads = (self.num_heads, self.head_dim)
        if position.dim() == 2 and self.kept.in_use(x.device):
            table = self.kept(
                lambda: F.linear(position, weight[: 2 * width]), x.device, position, weight
            )
            qkv = F.linear(x, weight, bias)
            qkv[..., : 2 * width].add_(table)
            q, k, v = qkv.unflatten(-1, (3, *heads)).unbind(2)
        else:
            of_both, of_values = weight.split([2 * width, width])
            bias_of_both, bias_of_values = bias.split([2 * width, width])
            both = F.linear(x + position, of_both, bias_of_both)
            q, k = unbind_layers(both.unflatten(-1, (2, *heads)), dim=2)
            v = F.linear(x, of_values, bias_of_values).unflatten(-1, heads)
        return self.attend(q, k, v, padding, of_itself=True)


class CrossAttention(_Fused):
    """Attention of queries to a memory that several layers share."""

    @staticmethod
    def memories(
        layers: Sequence["CrossAttention"], memory: Tensor, position: Tensor, kept: InferenceCache
    ) -> list[Memory]:
        """Project the memory to the keys and values of all layers, by one product each.

        Args:
            layers (Sequence[CrossAttention]): at least one.
            memory (Tensor[B, L, C]): what they look at.
            position (Tensor[B, L, C] | Tensor[L, C]): added where keys are made.
            kept (InferenceCache): for the weights of all layers in one tensor.

        Returns:
            list[Memory]: for each layer what `forward` takes.
        """

        def stacked() -> tuple[Tensor, ...]:
            weights = torch.stack([layer.in_proj_weight for layer in layers])
            biases = torch.stack([layer.in_proj_bias for layer in layers])
            q, k, v = weights.unflatten(1, (3, -1)).unbind(1)
            q_bias, k_bias, v_bias = biases.unflatten(1, (3, -1)).unbind(1)
            return q, q_bias, k.flatten(0, 1), k_bias.flatten(), v.flatten(0, 1), v_bias.flatten()

        sources = [p for layer in layers for p in (layer.in_proj_weight, layer.in_proj_bias)]
        q, q_bias, k, k_bias, v, v_bias = kept(stacked, memory.device, *sources)
        heads = (len(layers), layers[0].num_heads, layers[0].head_dim)
        keys = F.linear(memory + position, k, k_bias).unflatten(-1, heads)
        values = F.linear(memory, v, v_bias).unflatten(-1, heads)
        return list(zip(q.unbind(), q_bias.unbind(), keys.unbind(2), values.unbind(2), strict=True))

    def forward(self, query: Tensor, memory: Memory, padding: Padding | None = None) -> Tensor:
        """Attend.

        Args:
            query (Tensor[B, Q, C]): what asks, with its position.
            memory (Memory): what `memories` returned for this layer.
            padding (Padding, optional): of the memory.

        Returns:
            Tensor[B, Q, C]: the projected averages.
        """
        weight, bias, keys, values = memory
        q = F.linear(query, weight, bias).unflatten(-1, keys.shape[2:])
        return self.attend(q, keys, values, padding, of_itself=False)


class ReferenceSelfAttention(nn.MultiheadAttention):
    """Self-attention as the original calls it: sequence first, attention maps made and dropped."""

    def forward(self, x: Tensor, position: Tensor, padding: Padding | None = None) -> Tensor:
        """Attend; arguments and result as those of `SelfAttention`."""
        placed, x = (t.transpose(0, 1) for t in (x + position, x))
        mask = None if padding is None else padding.cells
        return super().forward(placed, placed, x, key_padding_mask=mask)[0].transpose(0, 1)


class ReferenceCrossAttention(nn.MultiheadAttention):
    """Cross-attention as the original calls it."""

    @staticmethod
    def memories(
        layers: Sequence["ReferenceCrossAttention"],
        memory: Tensor,
        position: Tensor,
        kept: InferenceCache,
    ) -> list[Memory]:
        """The memory with and without its position, which every layer projects by itself."""
        return [(memory + position, memory)] * len(layers)

    def forward(self, query: Tensor, memory: Memory, padding: Padding | None = None) -> Tensor:
        """Attend; arguments and result as those of `CrossAttention`."""
        query, key, value = (x.transpose(0, 1) for x in (query, *memory))
        mask = None if padding is None else padding.cells
        return super().forward(query, key, value, key_padding_mask=mask)[0].transpose(0, 1)


class Dropout(nn.Dropout):
    """`detr_fast.ops.dropout.dropout` while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (Tensor[...])``."""
        return dropout(x, self.p) if self.training else x


class Attentions(NamedTuple):
    """The modules of a transformer that are the original's, or faster."""

    of_itself: type[SelfAttention] | type[ReferenceSelfAttention]
    of_memory: type[CrossAttention] | type[ReferenceCrossAttention]
    dropout: type[nn.Dropout]


FUSED = Attentions(SelfAttention, CrossAttention, Dropout)
REFERENCE = Attentions(ReferenceSelfAttention, ReferenceCrossAttention, nn.Dropout)
