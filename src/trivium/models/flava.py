"""FLAVA: A Foundational Language And Vision Alignment Model (Singh et al., CVPR 2022, arXiv 2112.04482).

Three pre-norm transformers: one reads pixels, one reads words, and one reads the states of both. Easy to get wrong:

* the multimodal encoder takes the states *before* the final LayerNorm of the two others, through a linear map each;
* the contrastive projection takes the class token *after* that norm, and without the pooler's tanh;
* no loss reads any of the three poolers. They are kept because the released weights carry them.

B batch, R rows of a second pass, P = B + R, C channels, H height, W width, N image tokens (class token first), T text
tokens, L = 1 + N + T, D width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trivium.layers.embeddings import BertEmbeddings, PatchEmbedding, interpolate_positions, prepend
from trivium.layers.heads import MaskedHead, MatchingHead
from trivium.layers.transformer import PreNormEncoder
from trivium.models.encoded import Encoded
from trivium.models.grounding import Gaze

MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True)
class FlavaConfig:
    """The published model by default: 303,859,063 parameters beside the image tokenizer."""

    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    image_layers: int = 12
    text_layers: int = 12
    multimodal_layers: int = 6
    image_size: int = 224  # side in pixels that the position table was made for; others are interpolated
    patch_size: int = 16
    vocab_size: int = 30522
    max_length: int = 512  # text positions
    num_segments: int = 2
    pad_id: int = 0
    num_codes: int = 8192  # of the image tokenizer: classes of the two image heads
    projection_width: int = 768  # 512 in the paper's Table A.1, 768 in the released weights
    start_logit_scale: float = 1 / 0.07  # what cosines are multiplied by at first; learned, at most 100
    eps: float = 1e-12  # of every LayerNorm
    dropout: float = 0.0
    pads_visible: bool = False  # True: pads of the text are attended in the multimodal encoder, as in pretraining

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> FlavaConfig:
        """`size` is "tiny", "small" or "base" (the published one), with single fields changed."""
        return replace(SIZES[size], **changes)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


SIZES = {
    "tiny": FlavaConfig(
        width=128, num_heads=4, mlp_width=512, image_layers=6, text_layers=4, multimodal_layers=3,
        image_size=64, patch_size=16, vocab_size=4096, max_length=64, num_codes=512, projection_width=128,
    ),
    "small": FlavaConfig(
        width=384, num_heads=6, mlp_width=1536, image_layers=12, text_layers=8, multimodal_layers=4,
        max_length=128, projection_width=384,
    ),
    "base": FlavaConfig(),
}  # fmt: skip


class ImageEncoder(nn.Module):
    """ViT (Dosovitskiy et al. 2021) with a mask token."""

    def __init__(self, config: FlavaConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.patches = PatchEmbedding(config.width, config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = PreNormEncoder(
            config.width, config.image_layers, config.num_heads, config.mlp_width, config.eps, config.dropout
        )
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.pooler = nn.Linear(config.width, config.width)  # carried, never used

    def forward(self, pixels_BCHW: Tensor, masked_BN: Tensor | None, rows: Tensor | int | None) -> Tensor:
        """Normalised pixels of any size that divides into patches -> states before the norm."""
        return self.encoder(self.embed(pixels_BCHW, masked_BN), None, rows)

    def embed(self, pixels_BCHW: Tensor, masked_BN: Tensor | None) -> Tensor:
        """What the first block sees. masked_BN: bool over patches; those are replaced by the mask token before
        positions are added."""
        x_BND = self.patches(pixels_BCHW)
        if masked_BN is not None:
            x_BND = self._hide(x_BND, masked_BN)
        return self._place(x_BND, pixels_BCHW.shape)

    def embed_twice(self, pixels_BCHW: Tensor, masked_RN: Tensor, rows_R: Tensor | None) -> Tensor:
        """`embed` of all pictures and then, with patches hidden, of the rows R (None: all): projected once,
        [B + R, L, D]."""
        x_BND = self.patches(pixels_BCHW)
        again_RND = self._hide(x_BND if rows_R is None else x_BND.index_select(0, rows_R), masked_RN)
        return self._place(torch.cat([x_BND, again_RND]), pixels_BCHW.shape)

    def _hide(self, x_BND: Tensor, masked_BN: Tensor) -> Tensor:
        return torch.where(masked_BN[:, :, None], self.mask_token.to(x_BND.dtype), x_BND)

    def _place(self, x_BND: Tensor, shape: torch.Size) -> Tensor:
        """With positions and the class token. shape: of the pictures."""
        size = self.patches.patch_size
        new_grid = (shape[2] // size, shape[3] // size)
        positions_ND = interpolate_positions(self.positions[0, 1:], (self.grid, self.grid), new_grid)
        x_BND = prepend(self.class_token + self.positions[:, :1], x_BND + positions_ND)
        embedded: Tensor = self.dropout(x_BND)
        return embedded


class TextEncoder(nn.Module):
    """BERT's embeddings under pre-norm blocks."""

    def __init__(self, config: FlavaConfig) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(
            config.vocab_size, config.width, config.max_length, config.num_segments, config.eps, config.pad_id,
            config.dropout,
        )  # fmt: skip
        self.encoder = PreNormEncoder(
            config.width, config.text_layers, config.num_heads, config.mlp_width, config.eps, config.dropout
        )
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.pooler = nn.Linear(config.width, config.width)

    def forward(
        self, ids_BT: Tensor, mask_BT: Tensor | None, segments_BT: Tensor | None, rows: Tensor | int | None, pads: bool
    ) -> Tensor:
        return self.encoder(self.embeddings(ids_BT, segments_BT), mask_BT, rows, pads)


class MultimodalEncoder(nn.Module):
    """Reads [own class token; image states; text states]; nothing is added for position or modality."""

    def __init__(self, config: FlavaConfig) -> None:
        super().__init__()
        self.image_projection = nn.Linear(config.width, config.width)
        self.text_projection = nn.Linear(config.width, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.encoder = PreNormEncoder(
            config.width, config.multimodal_layers, config.num_heads, config.mlp_width, config.eps, config.dropout
        )
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.pooler = nn.Linear(config.width, config.width)

    def forward(
        self, image_BND: Tensor, text_BTD: Tensor, mask_BL: Tensor | None, rows: Tensor | int | None, pads: bool
    ) -> Tensor:
        x_BLD = torch.cat([self.image_projection(image_BND), self.text_projection(text_BTD)], dim=1)
        return self.encoder(prepend(self.class_token, x_BLD), mask_BL, rows, pads)


class Flava(nn.Module):
    """The three encoders, the contrastive projections, four masked heads and the matching head."""

    def __init__(self, config: FlavaConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.width, config.eps
        self.image = ImageEncoder(config)
        self.text = TextEncoder(config)
        self.multimodal = MultimodalEncoder(config)
        self.image_projection = nn.Linear(width, config.projection_width)
        self.text_projection = nn.Linear(width, config.projection_width)
        # [1], not []: FSDP2 takes no parameter without a dimension.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.start_logit_scale)))
        self.mim_head = MaskedHead(width, config.num_codes, eps)
        self.mlm_head = MaskedHead(width, config.vocab_size, eps)
        self.mmm_image_head = MaskedHead(width, config.num_codes, eps)
        self.mmm_text_head = MaskedHead(width, config.vocab_size, eps)
        self.itm_head = MatchingHead(width)

    def config_dict(self) -> dict[str, Any]:
        """What a model folder's config.json holds beside the family."""
        return asdict(self.config)

    def blocks(self) -> list[nn.Module]:
        """Every transformer block, for compilation and sharding block by block."""
        towers = (self.image, self.text, self.multimodal)
        return [block for tower in towers for block in tower.encoder.blocks]

    def encode_image(
        self, pixels_BCHW: Tensor, masked_BN: Tensor | None = None, rows: Tensor | int | None = None
    ) -> Encoded:
        """Normalised pixels, float [B, 3, H, W], H and W multiples of the patch; other sizes than the config's are
        position-interpolated.

        Args:
            masked_BN: bool, patches (row-major) hidden behind the mask token.
            rows: compute the last block only there (see SelfAttention); `states` then holds only those positions.
        """
        return Encoded(self.image(pixels_BCHW, masked_BN, rows), None, self.image.norm, self.image_projection)

    def encode_pairs_twice(
        self,
        pixels_BCHW: Tensor,
        masked_RN: Tensor,
        rows_R: Tensor | None,
        ids_PT: Tensor,
        mask_PT: Tensor | None,
    ) -> tuple[tuple[Encoded, Encoded], tuple[Encoded, Encoded]]:
        """Pictures and texts of two passes at once: of the B samples the class token alone is computed in the last
        blocks, and of R of them again, masked, everything. Equal to two passes where nothing is dropped, and fewer,
        larger products.

        Args:
            rows_R: which samples the second pass reads; None: all.
            ids_PT, mask_PT: texts of both passes, P = B + R.

        Returns:
            the class tokens of pictures and texts, `states` [B, 1, D]; and the rest of both.
        """
        image, text, first = self.image, self.text, len(pixels_BCHW)
        pictures = image.encoder.both(image.embed_twice(pixels_BCHW, masked_RN, rows_R), None, first)
        texts = text.encoder.both(text.embeddings(ids_PT, None), mask_PT, first, pads=self.config.pads_visible)
        masks = (None, None) if mask_PT is None else (mask_PT[:first], mask_PT[first:])
        found = [
            (
                Encoded(picture, None, image.norm, self.image_projection),
                Encoded(states, mask, text.norm, self.text_projection),
            )
            for picture, states, mask in zip(pictures, texts, masks, strict=True)
        ]
        return found[0], found[1]

    def encode_text(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        rows: Tensor | int | None = None,
        pads: bool = True,
    ) -> Encoded:
        """Token ids, int64 [B, T]; mask_BT: bool, True = a real token. None attends every position, pads too.

        pads: somebody else than our multimodal encoder reads their states, which else may have no meaning.
        """
        states = self.text(ids_BT, mask_BT, segments_BT, rows, pads or self.config.pads_visible)
        return Encoded(states, mask_BT, self.text.norm, self.text_projection)

    def gaze(self, num_patches: int, block: int | None = None) -> Gaze:
        """Self-attention of a block of the multimodal encoder, from 0; None: the middle one."""
        blocks: Any = self.multimodal.encoder.blocks
        chosen = blocks[(len(blocks) - 1) // 2 if block is None else block]
        return Gaze(chosen.attention, slice(2 + num_patches, None), slice(2, 2 + num_patches))

    def fuse(self, image: Encoded, text: Encoded, rows: Tensor | int | None = None, pads: bool = True) -> Encoded:
        """Image and text states through the multimodal encoder, row by row; a picture that stands alone is read with
        every text.

        Positions of the result: 0 its class token, 1 the image's class token, 2.. the patches, the last T the text.
        pads: somebody reads their states, which else may have no meaning.
        """
        image = image.repeated(len(text.states))
        B, N, _ = image.states.shape
        mask_BL = None
        if text.mask is not None and not self.config.pads_visible:
            mask_BL = torch.cat([text.mask.new_ones(B, 1 + N), text.mask], dim=1)
        states = self.multimodal(image.states, text.states, mask_BL, rows, pads)
        return Encoded(states, mask_BL, self.multimodal.norm, None)

    def match(self, fused: Encoded) -> Tensor:
        """Logits [B, 2] of "do not belong together" (0) and "belong together" (1)."""
        return self.itm_head(fused.pooled)

    def predict_words(self, rows: Tensor) -> Tensor:
        """Logits [..., V] of text states [..., D] after the final norm."""
        return self.mlm_head(rows)
