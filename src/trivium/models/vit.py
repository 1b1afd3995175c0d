"""ViT: An Image is Worth 16x16 Words (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929), as timm, DeiT and DINO have it.

One pre-norm transformer over patches. Easy to get wrong:

* LayerNorm's eps is 1e-6 in timm, DeiT and DINO, and 1e-12 in Hugging Face's configs: features differ in the fifth
  digit;
* for another picture size DINO resamples its positions by a scale factor of (patches + 0.1) / patches, a guard against
  rounding that moves the values a little; others resample to the size itself (`position_offset`);
* the final norm is applied once, and the class token is read after it; stochastic depth belongs to training alone, and
  in DINO to the student alone.

B batch, C channels, H height, W width, N patches, L = 1 + N positions (class token first), D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trivium.layers.embeddings import PatchEmbedding, interpolate_positions, prepend
from trivium.layers.transformer import PreNormEncoder
from trivium.models.encoded import Encoded


@dataclass(frozen=True)
class ViTConfig:
    """ViT-B/16 by default: 85,798,656 parameters."""

    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    num_layers: int = 12
    image_size: int = 224  # side in pixels that the position table was made for; others are interpolated
    patch_size: int = 16
    eps: float = 1e-6  # of every LayerNorm
    dropout: float = 0.0
    drop_path: float = 0.0  # stochastic depth in training: of the last block; it grows from 0 at the first
    position_offset: float = 0.0  # patches added to the new grid when positions are resampled; DINO's is 0.1
    mask_token: bool = False  # whether hidden patches have a learned token (BEiT, iBOT)

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> ViTConfig:
        """`size` is "tiny", "small" or "base", with single fields changed: `patch_size=8` makes S/8 and B/8."""
        return replace(SIZES[size], **changes)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


SIZES = {
    "tiny": ViTConfig(width=128, num_heads=4, mlp_width=512, num_layers=6, image_size=64),
    "small": ViTConfig(width=384, num_heads=6, mlp_width=1536),
    "base": ViTConfig(),
}


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): a sample skips what a residual branch adds, with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch_BLD: Tensor) -> Tensor:
        if not self.training:
            return branch_BLD
        kept_B11 = torch.rand(len(branch_BLD), 1, 1, device=branch_BLD.device) >= self.rate
        return branch_BLD * (kept_B11.to(branch_BLD.dtype) / (1 - self.rate))


class ViT(nn.Module):
    """The tower without a classifier."""

    mask_token: nn.Parameter | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = PatchEmbedding(config.width, config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        mask_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.mask_token else None
        self.register_parameter("mask_token", mask_token)
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = PreNormEncoder(
            config.width, config.num_layers, config.num_heads, config.mlp_width, config.eps, config.dropout
        )
        self.norm = nn.LayerNorm(config.width, config.eps)
        if config.drop_path:
            for number, block in enumerate(self.encoder.blocks):
                rate = config.drop_path * number / max(1, config.num_layers - 1)
                block.dropout = nn.Sequential(nn.Dropout(config.dropout), DropPath(rate))  # on both of its branches

    def config_dict(self) -> dict[str, Any]:
        """What a model folder's config.json holds beside the family."""
        return asdict(self.config)

    def blocks(self) -> list[nn.Module]:
        """Every transformer block, for compilation and sharding block by block."""
        return list(self.encoder.blocks)

    def embed(self, pixels_BCHW: Tensor, masked_BN: Tensor | None = None) -> Tensor:
        """What the first block sees, [B, L, D]. masked_BN: bool over patches (row-major); those are replaced by the
        mask token before positions are added."""
        x_BND = self.patches(pixels_BCHW)
        if masked_BN is not None:
            assert self.mask_token is not None, "this ViT has no mask token"
            x_BND = torch.where(masked_BN[:, :, None], self.mask_token.to(x_BND.dtype), x_BND)
        size, grid = self.config.patch_size, self.config.grid
        new_grid = (pixels_BCHW.shape[2] // size, pixels_BCHW.shape[3] // size)
        positions_ND = interpolate_positions(
            self.positions[0, 1:], (grid, grid), new_grid, offset=self.config.position_offset
        )
        x_BLD = prepend(self.class_token + self.positions[:, :1], x_BND + positions_ND)
        embedded: Tensor = self.dropout(x_BLD)
        return embedded

    def forward(self, pixels_BCHW: Tensor, masked_BN: Tensor | None = None, rows: Tensor | int | None = None) -> Tensor:
        """Normalised pixels, of any size that divides into patches -> states before the final norm, [B, L, D].

        Args:
            rows: compute the last block only there (see SelfAttention): [B, Q, D].
        """
        return self.encoder(self.embed(pixels_BCHW, masked_BN), None, rows)

    def encode_image(
        self, pixels_BCHW: Tensor, masked_BN: Tensor | None = None, rows: Tensor | int | None = None
    ) -> Encoded:
        """As `forward`; the final norm is applied where `tokens` or `pooled` (the class token) is read."""
        return Encoded(self(pixels_BCHW, masked_BN, rows), None, self.norm, None)

    def attention_maps(self, pixels_BCHW: Tensor) -> Tensor:
        """What each position of the last block attends, [B, heads, L, L]; a row sums to 1. In float32 at least.

        Row 0 is the class token's, whose map over patches DINO shows (Caron et al. 2021, figure 1).
        """
        x_BLD = self.embed(pixels_BCHW)
        for block in self.encoder.blocks[:-1]:
            x_BLD = block(x_BLD)
        last: Any = self.encoder.blocks[-1]
        maps: Tensor = last.attention.maps(last.attention_norm(x_BLD))
        return maps
