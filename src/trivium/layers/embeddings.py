"""From pixels and token ids to the first states of an encoder.

B batch, N patches (row-major), T text tokens, D width, P side of a patch in pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, each through one linear map: what a stride-P convolution computes, without im2col.

    The weight is [D, 3 * P * P] in the order of a convolution's [D, 3, P, P], flattened.
    """

    def __init__(self, width: int, patch_size: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(3 * patch_size * patch_size, width, bias)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        B, C, H, W = pixels_BCHW.shape
        P = self.patch_size
        assert H % P == 0 and W % P == 0, f"a picture of {H}x{W} does not divide into {P}-pixel patches"
        patches = pixels_BCHW.view(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)
        return self.projection(patches.reshape(B, (H // P) * (W // P), C * P * P))


def interpolate_positions(
    position_ND: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], offset: float = 0.0
) -> Tensor:
    """Patch positions learned on one grid, resampled to another: bicubic to the explicit size, corners not aligned.

    position_ND: [grid height * grid width, D] without the class token. Same grid: returned as it is.
    offset: 0.1 resamples by the factor (new + 0.1) / old instead, as DINO does: values are shifted a little.
    """
    if grid == new_grid:
        return position_ND
    height, width = grid
    table = position_ND.reshape(1, height, width, -1).permute(0, 3, 1, 2)
    if offset:
        factor = ((new_grid[0] + offset) / height, (new_grid[1] + offset) / width)
        table = F.interpolate(table, scale_factor=factor, mode="bicubic", align_corners=False)
        assert table.shape[2:] == new_grid, f"a grid of {new_grid} came out as {tuple(table.shape[2:])}"
    else:
        table = F.interpolate(table, size=new_grid, mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).reshape(new_grid[0] * new_grid[1], -1)


def sine_positions(
    sizes_B2: Tensor, height: int, width: int, channels: int, dtype: torch.dtype, temperature: float = 10000.0
) -> Tensor:
    """Where each place of a feature map lies in its picture, as sines and cosines (DETR, Carion et al. 2020,
    appendix A.4): [B, height * width, channels], row-major, the half that tells the row first.

    sizes_B2: (height, width) of each picture in the map; places are counted from 1 and as shares of it. What stands
    for places beyond has no meaning.
    """
    assert channels % 4 == 0, f"{channels} channels are no multiple of 4"
    reach_B2 = sizes_B2.to(dtype)
    rows_BHX, columns_BWX = (
        sines(
            torch.arange(1, side + 1, dtype=dtype, device=sizes_B2.device) / (reach_B2[:, axis, None] + 1e-6),
            channels // 2,
            temperature,
        )
        for axis, side in enumerate((height, width))
    )
    rows_BHWX = rows_BHX[:, :, None].expand(-1, -1, width, -1)
    columns_BHWX = columns_BWX[:, None].expand(-1, height, -1, -1)
    return torch.cat([rows_BHWX, columns_BHWX], dim=-1).flatten(1, 2)


def sines(share: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """[..., channels]: how far along a picture's side something lies, sine and cosine by turns. The first turn once
    round over the whole side, the last `temperature` times as slowly."""
    frequency = temperature ** (-2 * torch.arange(channels // 2, dtype=share.dtype, device=share.device) / channels)
    angle = 2 * math.pi * share[..., None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class BertEmbeddings(nn.Module):
    """Word + position + segment, then LayerNorm (Devlin et al. 2019, figure 2)."""

    def __init__(
        self, vocab_size: int, width: int, max_length: int, num_segments: int, eps: float, pad_id: int, dropout: float
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, width, padding_idx=pad_id)
        self.position = nn.Embedding(max_length, width)
        self.segment = nn.Embedding(num_segments, width)
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids_BT: Tensor, segments_BT: Tensor | None = None, first: int = 0) -> Tensor:
        """first: the position of the first token; others stood in front of it."""
        end = first + ids_BT.shape[1]
        assert end <= len(self.position.weight), f"{end} tokens, but positions for {len(self.position.weight)}"
        segment = self.segment.weight[0] if segments_BT is None else self.segment(segments_BT)
        return self.dropout(self.norm(self.word(ids_BT) + self.position.weight[first:end] + segment))


def prepend(token_11D: Tensor, x_BLD: Tensor) -> Tensor:
    """A learned token in front of every sequence."""
    return torch.cat([token_11D.to(x_BLD.dtype).expand(len(x_BLD), -1, -1), x_BLD], dim=1)
