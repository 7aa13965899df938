# SPDX-License-Identifier: Apache-2.0
"""The encoder-decoder transformer of DETR, batch first inside."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.MultiheadAttention):
    """The parameters of ``nn.MultiheadAttention``, computed without attention maps.

    So the fused kernels of ``scaled_dot_product_attention`` apply.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query (Tensor[B, Q, C]): what asks; the very tensor ``key`` in self-attention, where
                one product then projects both.
            key (Tensor[B, L, C]): what is compared with the query.
            value (Tensor[B, L, C]): what is averaged.
            padding (BoolTensor[B, L]): True for keys to skip; every row needs a False.

        Returns:
            Tensor[B, Q, C]: the projected averages.
        """
        width = self.embed_dim
        if query is key:
            both = F.linear(query, self.in_proj_weight[: 2 * width], self.in_proj_bias[: 2 * width])
            q, k = both.chunk(2, dim=-1)
        else:
            q = F.linear(query, self.in_proj_weight[:width], self.in_proj_bias[:width])
            k = F.linear(
                key, self.in_proj_weight[width : 2 * width], self.in_proj_bias[width : 2 * width]
            )
        v = F.linear(value, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])
        heads = (self.num_heads, self.head_dim)
        out = F.scaled_dot_product_attention(
            *(x.unflatten(-1, heads).transpose(1, 2) for x in (q, k, v)),
            attn_mask=None if padding is None else ~padding[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class ReferenceAttention(nn.MultiheadAttention):
    """Attention as the original calls it: sequence first, attention maps made and dropped."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        """Attend; arguments and result as those of :class:`Attention`."""
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        return super().forward(query, key, value, key_padding_mask=padding)[0].transpose(0, 1)


class _Layer(nn.Module):
    """A stack of blocks, each with dropout, a residual connection and a norm before or after it."""

    def __init__(self, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
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
        attention (type): :class:`Attention` or :class:`ReferenceAttention`.
        width (int): channels.
        heads (int): attention heads.
        dim_feedforward (int): hidden channels of the feed-forward block.
        dropout (float): probability.
        pre_norm (bool): norms before the blocks.
    """

    def __init__(
        self,
        attention: type[nn.MultiheadAttention],
        width: int,
        heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = attention(width, heads, dropout=dropout)
        self.linear1 = nn.Linear(width, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """Map ``x (Tensor[B, L, C])``, its position and ``padding (BoolTensor[B, L])``."""

        def attend(x: Tensor) -> Tensor:
            placed = x + position
            return self.self_attn(placed, placed, x, padding)

        x = self.block(x, self.norm1, attend)
        return self.block(x, self.norm2, self.feedforward)


class DecoderLayer(_Layer):
    """Self-attention of the queries, attention to the memory, feed-forward.

    Args: as those of :class:`EncoderLayer`.
    """

    def __init__(
        self,
        attention: type[nn.MultiheadAttention],
        width: int,
        heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = attention(width, heads, dropout=dropout)
        self.multihead_attn = attention(width, heads, dropout=dropout)
        self.linear1 = nn.Linear(width, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        query_position: Tensor,
        memory: Tensor,
        placed_memory: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        """Update the queries.

        Args:
            x (Tensor[B, Q, C]): state of the queries.
            query_position (Tensor[Q, C]): their learned position.
            memory (Tensor[B, L, C]): output of the encoder.
            placed_memory (Tensor[B, L, C]): the same plus its position.
            padding (BoolTensor[B, L]): True where the memory is padding.

        Returns:
            Tensor[B, Q, C]: the new state.
        """

        def attend(x: Tensor) -> Tensor:
            placed = x + query_position
            return self.self_attn(placed, placed, x, padding=None)

        def look(x: Tensor) -> Tensor:
            return self.multihead_attn(x + query_position, placed_memory, memory, padding)

        x = self.block(x, self.norm1, attend)
        x = self.block(x, self.norm2, look)
        return self.block(x, self.norm3, self.feedforward)


class Encoder(nn.Module):
    """Encoder layers, and with norms before the blocks one more norm behind them."""

    def __init__(self, layers: list[EncoderLayer], norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """Map ``x (Tensor[B, L, C])`` to the memory, of the same shape."""
        for layer in self.layers:
            x = layer(x, position, padding)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """Decoder layers and the norm that every prediction head sees."""

    def __init__(self, layers: list[DecoderLayer], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self, memory: Tensor, position: Tensor, padding: Tensor | None, queries: Tensor
    ) -> list[Tensor]:
        """Return the state of the queries behind every layer, not normalised."""
        x = torch.zeros_like(queries).expand(len(memory), -1, -1)
        placed_memory = memory + position
        states = []
        for layer in self.layers:
            x = layer(x, queries, memory, placed_memory, padding)
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
        attention (type): :class:`Attention` or :class:`ReferenceAttention`.
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
        attention: type[nn.MultiheadAttention] = Attention,
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
        padding: Tensor | None,
        queries: Tensor,
        every_layer: bool = True,
    ) -> Tensor:
        """Let the queries look at the features.

        Args:
            features (Tensor[B, L, C]): projected features, one row a cell.
            position (Tensor[B, L, C]): encoding of the cells' places.
            padding (BoolTensor[B, L]): True for cells that are padding; None if there are none.
            queries (Tensor[Q, C]): learned position of the queries.
            every_layer (bool): return the states behind every decoder layer, not the last alone.

        Returns:
            Tensor[N, B, Q, C]: normalised states of the queries; N is the number of decoder
            layers, or 1.
        """
        memory = self.encoder(features, position, padding)
        states = self.decoder(memory, position, padding, queries)
        return self.decoder.norm(torch.stack(states if every_layer else states[-1:]))
