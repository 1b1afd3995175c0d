"""One attention function for every model.

B batch, H heads, Q query positions, L key positions, D width, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(query_BHQE: Tensor, key_BHLE: Tensor, value_BHLE: Tensor, mask_BL: Tensor | None, dropout: float) -> Tensor:
    """softmax(Q K^T / sqrt(E) + mask) V (Vaswani et al. 2017, Eq. 1). mask_BL: bool, True = may be attended."""
    mask_B11L = None if mask_BL is None else mask_BL[:, None, None, :]
    return F.scaled_dot_product_attention(query_BHQE, key_BHLE, value_BHLE, attn_mask=mask_B11L, dropout_p=dropout)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values (in that order)."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert width % num_heads == 0, f"width {width} is not a multiple of {num_heads} heads"
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None, rows: Tensor | int | None = None) -> Tensor:
        """Attention output at every position, or only at the query positions `rows`.

        Args:
            mask_BL: bool, True = may be attended.
            rows: None; an int n, the first n positions; or int64 [B, Q], the positions of each sample. Keys and
                values come from all positions, so the result is exact.
        """
        B, L, D = x_BLD.shape
        H, E = self.num_heads, D // self.num_heads  # spelled out: an empty batch leaves -1 ambiguous
        if rows is None:
            query, key, value = self.qkv(x_BLD).view(B, L, 3, H, E).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            weight_q, weight_kv = self.qkv.weight.split([D, 2 * D])
            bias_q, bias_kv = self.qkv.bias.split([D, 2 * D])
            query = F.linear(take_rows(x_BLD, rows), weight_q, bias_q)
            query = query.view(B, query.shape[1], H, E).transpose(1, 2)
            key, value = F.linear(x_BLD, weight_kv, bias_kv).view(B, L, 2, H, E).permute(2, 0, 3, 1, 4)
        attended = attend(query, key, value, mask_BL, self.dropout if self.training else 0.0)
        return self.out(attended.transpose(1, 2).flatten(2))


def take_rows(x_BLD: Tensor, rows: Tensor | int) -> Tensor:
    """The first n positions (int), or those of an int64 index [B, Q]."""
    if isinstance(rows, int):
        return x_BLD[:, :rows]
    return x_BLD.gather(1, rows[:, :, None].expand(-1, -1, x_BLD.shape[2]))


def padded_index(mask_BL: Tensor) -> Tensor:
    """Positions where a mask is True as a padded int64 index [B, Q], Q the largest number in any row (at least 1).

    The padding repeats whatever positions come next: compute them, then ignore them. Call it on CPU: Q is read.
    """
    num_rows = max([1, *mask_BL.sum(1).tolist()])
    return torch.argsort(mask_BL.to(torch.uint8), dim=1, descending=True, stable=True)[:, :num_rows]
