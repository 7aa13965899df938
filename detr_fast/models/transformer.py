# SPDX-License-Identifier: Apache-2.0
"""The encoder-decoder transformer of DETR, batch first inside."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.models.attention import FUSED, Attentions, Memory
from detr_fast.models.inference_cache import InferenceCache
from detr_fast.models.padding import Padding


class _Layer(nn.Module):
    """A stack of blocks, each with dropout, a residual connection and a norm before or after it."""

    def __init__(self, dropout: nn.Dropout, pre_norm: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.pre_norm = pre_norm

    def block(self, x: Tensor, norm: nn.LayerNorm, compute: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(compute(norm(x)))
        return norm(x + self.dropout(compute(x)))

    def feedforward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class EncoderLayer(_Layer):
    """Self-attention and feed-forward.

    Args:
        attention (Attentions): which modules attend and drop.
        width (int): channels.
        heads (int): attention heads.
        dim_feedforward (int): hidden channels of the feed-forward block.
        dropout (float): probability.
        pre_norm (bool): norms before the blocks.
    """

    def __init__(
        self,
        attention: Attentions,
        width: int,
        heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__(attention.dropout(dropout), pre_norm)
        self.self_attn = attention.of_itself(width, heads, dropout=dropout)
        self.linear1 = nn.Linear(width, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, padding: Padding | None) -> Tensor:
        """Map ``x (Tensor[B, L, C])``, its position and its padding."""
        x = self.block(x, self.norm1, lambda x: self.self_attn(x, position, padding))
        return self.block(x, self.norm2, self.feedforward)


class DecoderLayer(_Layer):
    """Self-attention of the queries, attention to the memory, feed-forward.

    Args: as those of `EncoderLayer`.
    """

    def __init__(
        self,
        attention: Attentions,
        width: int,
        heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__(attention.dropout(dropout), pre_norm)
        self.self_attn = attention.of_itself(width, heads, dropout=dropout)
        self.multihead_attn = attention.of_memory(width, heads, dropout=dropout)
        self.linear1 = nn.Linear(width, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        query_position: Tensor,
        memory: Memory,
        padding: Padding | None,
    ) -> Tensor:
        """Update the queries.

        Args:
            x (Tensor[B, Q, C]): state of the queries.
            query_position (Tensor[Q, C]): their learned position.
            memory (Memory): output of the encoder, prepared for the cross-attention of this layer.
            padding (Padding, optional): of the memory.

        Returns:
            Tensor[B, Q, C]: the new state.
        """

        def look(x: Tensor) -> Tensor:
            return self.multihead_attn(x + query_position, memory, padding)

        x = self.block(x, self.norm1, lambda x: self.self_attn(x, query_position))
        x = self.block(x, self.norm2, look)
        return self.block(x, self.norm3, self.feedforward)


class Encoder(nn.Module):
    """Encoder layers, and with norms before the blocks one more norm behind them."""

    def __init__(self, layers: list[EncoderLayer], norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: Tensor, position: Tensor, padding: Padding | None) -> Tensor:
        """Map ``x (Tensor[B, L, C])`` to the memory, of the same shape; 0 where it is padding."""
        padded = None if padding is None else padding.cells[..., None]
        if padded is not None:  # 0 * NaN is NaN, in the gradients of weights, too
            x = x.masked_fill(padded, 0)
        for layer in self.layers:
            x = layer(x, position, padding)
        x = x if self.norm is None else self.norm(x)
        return x if padded is None else x.masked_fill(padded, 0)


class Decoder(nn.Module):
    """Decoder layers and the norm that every prediction head sees."""

    def __init__(self, layers: list[DecoderLayer], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.kept = InferenceCache()

    def forward(
        self, memory: Tensor, position: Tensor, padding: Padding | None, queries: Tensor
    ) -> list[Tensor]:
        """Return the state of the queries behind every layer, not normalised."""
        x = torch.zeros_like(queries).expand(memory.shape[0], -1, -1)
        looking = [layer.multihead_attn for layer in self.layers]
        memories = looking[0].memories(looking, memory, position, self.kept)
        states = []
        for layer, prepared in zip(self.layers, memories, strict=True):
            x = layer(x, queries, prepared, padding)
            states.append(x)
        return states


class Transformer(nn.Module):
    """Encoder and decoder (Carion et al., ECCV 2020, figure 10).

    Args:
        width (int): channels.
        heads (int): attention heads.
        enc_layers (int): encoder layers.
        dec_layers (int): decoder layers.
        dim_feedforward (int): hidden channels of the feed-forward blocks.
        dropout (float): probability.
        pre_norm (bool): norms before the blocks.
        attention (Attentions): ``FUSED`` or ``REFERENCE`` of `detr_fast.models.attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        enc_layers: int,
        dec_layers: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
        attention: Attentions = FUSED,
    ) -> None:
        super().__init__()
        layer = (attention, width, heads, dim_feedforward, dropout, pre_norm)
        self.encoder = Encoder(
            [EncoderLayer(*layer) for _ in range(enc_layers)],
            nn.LayerNorm(width) if pre_norm else None,
        )
        self.decoder = Decoder(
            [DecoderLayer(*layer) for _ in range(dec_layers)], nn.LayerNorm(width)
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        features: Tensor,
        position: Tensor,
        padding: Padding | None,
        queries: Tensor,
        every_layer: bool = True,
    ) -> Tensor:
        """Let the queries look at the features.

        Args:
            features (Tensor[B, L, C]): projected features, one row a cell.
            position (Tensor[B, L, C] | Tensor[L, C]): encoding of the cells' places.
            padding (Padding | None): cells that are padding; None if there are none.
            queries (Tensor[Q, C]): learned position of the queries.
            every_layer (bool): return the states behind every decoder layer, not the last alone.

        Returns:
            Tensor[N, B, Q, C]: normalised states of the queries; N is the number of decoder
            layers, or 1.
        """
        memory = self.encoder(features, position, padding)
        states = self.decoder(memory, position, padding, queries)
        return self.decoder.norm(torch.stack(states if every_layer else states[-1:]))
