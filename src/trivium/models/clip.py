"""CLIP: Learning Transferable Visual Models From Natural Language Supervision (Radford et al., ICML 2021, 2103.00020).

Two pre-norm transformers, one for pictures and one for words, whose outputs are projected into one space. Easy to get
wrong:

* the image tower normalises its input once more before the first block, and its patches have no bias;
* the text tower is causal and is pooled at the end token, so padding on the right is never seen and takes no mask.
  OpenAI's code finds that token as the largest id, which holds for its own vocabulary alone: others name it (`end_id`);
* OpenAI's weights want x sigmoid(1.702 x) in place of GELU. With the other one a model still works, only worse.

B batch, C channels, H height, W width, N image tokens (class token first), T text tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trivium.layers.activations import ActivationName
from trivium.layers.attention import causal
from trivium.layers.embeddings import PatchEmbedding, interpolate_positions, prepend
from trivium.layers.transformer import PreNormEncoder
from trivium.models.encoded import Encoded

MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True)
class ClipConfig:
    """ViT-B/16 by default: 149,620,737 parameters."""

    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    image_mlp_width: int = 3072
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_mlp_width: int = 2048
    image_size: int = 224  # side in pixels that the position table was made for; others are interpolated
    patch_size: int = 16
    vocab_size: int = 49408
    max_length: int = 77  # text positions, those of the start and the end token too
    end_id: int | None = 49407  # a text is pooled where this id first stands; None: where the largest id does
    projection_width: int = 512
    activation: ActivationName = "quick_gelu"
    start_logit_scale: float = 1 / 0.07  # what cosines are multiplied by at first; learned, at most 100
    eps: float = 1e-5  # of every LayerNorm
    dropout: float = 0.0

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> ClipConfig:
        """`size` is "tiny", "small" or "base" (the published ViT-B/16), with single fields changed."""
        return replace(SIZES[size], **changes)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


# Heads are 64 wide at every size, as in all published models: most layouts do not say how many there are.
SIZES = {
    "tiny": ClipConfig(
        image_width=128, image_layers=6, image_heads=2, image_mlp_width=512,
        text_width=128, text_layers=4, text_heads=2, text_mlp_width=512,
        image_size=64, vocab_size=4096, max_length=64, projection_width=128, activation="gelu",
    ),
    "small": ClipConfig(
        image_width=384, image_layers=12, image_heads=6, image_mlp_width=1536,
        text_width=384, text_layers=8, text_heads=6, text_mlp_width=1536, projection_width=384, activation="gelu",
    ),
    "base": ClipConfig(),
}  # fmt: skip


class ImageEncoder(nn.Module):
    """ViT with a norm before its first block."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.grid = config.grid
        width = config.image_width
        self.patches = PatchEmbedding(width, config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        self.pre_norm = nn.LayerNorm(width, config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = PreNormEncoder(
            width, config.image_layers, config.image_heads, config.image_mlp_width, config.eps, config.dropout,
            config.activation,
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, config.eps)

    def forward(self, pixels_BCHW: Tensor, rows: Tensor | int | None) -> Tensor:
        """Normalised pixels of any size that divides into patches -> states before the norm."""
        x_BND = self.patches(pixels_BCHW)
        size = self.patches.patch_size
        new_grid = (pixels_BCHW.shape[2] // size, pixels_BCHW.shape[3] // size)
        positions_ND = interpolate_positions(self.positions[0, 1:], (self.grid, self.grid), new_grid)
        x_BND = prepend(self.class_token + self.positions[:, :1], x_BND + positions_ND)
        return self.encoder(self.dropout(self.pre_norm(x_BND)), None, rows)


class TextEmbeddings(nn.Module):
    """Word + position."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.text_width)
        self.position = nn.Embedding(config.max_length, config.text_width)

    def forward(self, ids_BT: Tensor) -> Tensor:
        T = ids_BT.shape[1]
        assert T <= len(self.position.weight), f"{T} tokens, but positions for {len(self.position.weight)}"
        return self.word(ids_BT) + self.position.weight[:T]


class TextEncoder(nn.Module):
    """A causal transformer."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.text_width
        self.embeddings = TextEmbeddings(config)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = PreNormEncoder(
            width, config.text_layers, config.text_heads, config.text_mlp_width, config.eps, config.dropout,
            config.activation,
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, config.eps)

    def forward(self, ids_BT: Tensor, rows: Tensor | int | None) -> Tensor:
        """Token ids -> states before the norm."""
        every_1T = torch.ones(1, ids_BT.shape[1], dtype=torch.bool, device=ids_BT.device)
        return self.encoder(self.dropout(self.embeddings(ids_BT)), causal(every_1T), rows)


class Clip(nn.Module):
    """Both towers, their projections and the logit scale."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageEncoder(config)
        self.text = TextEncoder(config)
        self.image_projection = nn.Linear(config.image_width, config.projection_width, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.projection_width, bias=False)
        # [1], not []: FSDP2 takes no parameter without a dimension.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.start_logit_scale)))

    def config_dict(self) -> dict[str, Any]:
        """What a model folder's config.json holds beside the family."""
        return asdict(self.config)

    def blocks(self) -> list[nn.Module]:
        """Every transformer block, for compilation and sharding block by block."""
        return [*self.image.encoder.blocks, *self.text.encoder.blocks]

    def encode_image(self, pixels_BCHW: Tensor, pooled_only: bool = False) -> Encoded:
        """Normalised pixels, float [B, 3, H, W], H and W multiples of the patch; other sizes than the config's are
        position-interpolated.

        Args:
            pooled_only: compute the last block for the class token alone; `states` is then [B, 1, D]. Exact.
        """
        states = self.image(pixels_BCHW, 1 if pooled_only else None)
        return Encoded(states, None, self.image.norm, self.image_projection)

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor | None = None, pooled_only: bool = False) -> Encoded:
        """Token ids, int64 [B, T], padded on the right.

        Args:
            mask_BT: bool, True = a real token. The towers need none: it is what `Encoded` says of the positions.
            pooled_only: compute the last block at the end tokens alone; `states` is then [B, 1, D]. Exact.
        """
        end_B = self.ends(ids_BT)
        if pooled_only:
            return Encoded(self.text(ids_BT, end_B[:, None]), None, self.text.norm, self.text_projection)
        return Encoded(self.text(ids_BT, None), mask_BT, self.text.norm, self.text_projection, end_B)

    def ends(self, ids_BT: Tensor) -> Tensor:
        """Where each text is pooled, int64 [B]: at its first `end_id`; in a text without one, at position 0."""
        if self.config.end_id is None:
            return ids_BT.argmax(1)
        return (ids_BT == self.config.end_id).int().argmax(1)
