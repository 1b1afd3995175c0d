"""The transformer of DETR (Carion et al., ECCV 2020, appendix A.3), which UniT takes over: positions are added to
queries and keys in every layer, never to values; norms stand after what they norm.

B batch, N image tokens, P those of all pictures, one after the other, S positions of the decoder's memory, L decoder
layers, Q queries, E width of the image encoder, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.layers.attention import attend
from trivium.layers.packing import Runs


class Attention(nn.Module):
    """Multi-head attention whose queries and keys carry places that the values lack. One matrix with the rows of
    queries, keys and values in that order, as torch's MultiheadAttention has it."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, mask_BS: Tensor | None, runs: Runs | None = None
    ) -> Tensor:
        """[B, Q, D]. mask_BS: bool, True = may be attended. runs: of what comes as [P, D] and goes so."""
        D = query_BQD.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        parts = [2 * D, D] if query_BQD is key_BSD else [D, D, D]
        # Split and not cut out one by one, whose gradients would each be as large as the whole and mostly zeros.
        *placed, value_map = zip(weight.split(parts), bias.split(parts), strict=True)
        if query_BQD is key_BSD:
            query, key = F.linear(query_BQD, *placed[0]).chunk(2, dim=-1)
        else:
            query, key = F.linear(query_BQD, *placed[0]), F.linear(key_BSD, *placed[1])
        value = F.linear(value_BSD, *value_map)
        if runs is None:
            return self.out(self._attend(query, key, value, mask_BS))
        return self.out(self._attend_in_runs(query, key, value, runs))

    @torch.compiler.disable  # or there would be a program for each number of runs
    def _attend_in_runs(self, query_PD: Tensor, key_PD: Tensor, value_PD: Tensor, runs: Runs) -> Tensor:
        of_runs = zip(runs.unpack(query_PD), runs.unpack(key_PD), runs.unpack(value_PD), strict=True)
        return runs.pack([self._attend(query, key, value, None) for query, key, value in of_runs])

    def _attend(self, query_BQD: Tensor, key_BSD: Tensor, value_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query_BQD, key_BSD, value_BSD)
        )
        attended = attend(query, key, value, mask_BS, self.dropout if self.training else 0.0)
        return attended.transpose(1, 2).flatten(2)


class EncoderBlock(nn.Module):
    """DETR's: LN(x + Attention(x)), then LN(x + MLP(x)), with ReLU."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BNE: Tensor, places_BNE: Tensor, mask_BN: Tensor | None, runs: Runs | None = None) -> Tensor:
        """[B, N, E]. runs: of pictures of different sizes without padding; then x, places and the result are [P, E]."""
        placed_BNE = x_BNE + places_BNE
        attended_BNE = self.attention(placed_BNE, placed_BNE, x_BNE, mask_BN, runs)
        return self._mlp(self.attention_norm(x_BNE + self.dropout(attended_BNE)))

    def _mlp(self, x: Tensor) -> Tensor:
        inside = self.dropout(F.relu(self.mlp_in(x), inplace=True))
        return self.mlp_norm(x + self.dropout(self.mlp_out(inside)))


class DecoderBlock(EncoderBlock):
    """The same with LN(x + Attention(x, memory)) between the two."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, eps: float, dropout: float) -> None:
        super().__init__(width, num_heads, mlp_width, eps, dropout)
        self.cross_attention = Attention(width, num_heads, dropout)
        self.cross_attention_norm = nn.LayerNorm(width, eps)

    def forward(  # type: ignore[override]
        self, x_BQD: Tensor, query_QD: Tensor, memory_BSD: Tensor, placed_BSD: Tensor, mask: Tensor | None, rows: int
    ) -> Tensor:
        """Of the first `rows` queries. placed_BSD: the memory with its places; mask: bool [B, S]."""
        keys_BQD = asking_BQD = x_BQD + query_QD
        if rows < len(query_QD):
            asking_BQD = keys_BQD[:, :rows]
        attended = self.attention(asking_BQD, keys_BQD, x_BQD, None)
        x_BQD = self.attention_norm(x_BQD[:, :rows] + self.dropout(attended))
        read = self.cross_attention(x_BQD + query_QD[:rows], placed_BSD, memory_BSD, mask)
        return self._mlp(self.cross_attention_norm(x_BQD + self.dropout(read)))


class Decoder(nn.Module):
    """Blocks and the norm that each one's output passes on its way to a head."""

    def __init__(self, num_layers: int, width: int, num_heads: int, mlp_width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(width, num_heads, mlp_width, eps, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps)

    def forward(
        self, query_QD: Tensor, memory_BSD: Tensor, placed_BSD: Tensor, mask: Tensor | None, last: bool, rows: int
    ) -> Tensor:
        """[L, B, Q, D], or with `last` [1, B, rows, D]: the last layer alone, of the first `rows` queries."""
        x_BQD = memory_BSD.new_zeros(len(memory_BSD), *query_QD.shape)
        hidden = []
        for block in self.blocks[:-1]:
            x_BQD = block(x_BQD, query_QD, memory_BSD, placed_BSD, mask, len(query_QD))
            hidden.append(x_BQD)
        x_BQD = self.blocks[-1](x_BQD, query_QD, memory_BSD, placed_BSD, mask, rows if last else len(query_QD))
        return self.norm(x_BQD[None] if last else torch.stack([*hidden, x_BQD]))


class TaskTokens(nn.Module):
    """What tells an encoder its task: a token for each, a parameter of its own, so that another task's step leaves it
    and its moments alone.

    num_spare: rows of a released table that belong to none of these tasks. Nothing reads or trains them; they are
    written out as they came.
    """

    def __init__(self, tasks: Sequence[str], num_spare: int, width: int) -> None:
        super().__init__()
        self.of = nn.ModuleDict({task: nn.Embedding(1, width) for task in tasks})
        self.spare = nn.Parameter(torch.zeros(num_spare, width), requires_grad=False)

    def before(self, states_BNE: Tensor, task: str) -> Tensor:
        """With the token of the task in front of each row, [B, 1 + N, E]."""
        token: Any = self.of[task]
        return torch.cat([token.weight.to(states_BNE.dtype).expand(len(states_BNE), 1, -1), states_BNE], dim=1)
