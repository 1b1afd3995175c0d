"""ALBEF: Align before Fuse (Li et al., NeurIPS 2021, arXiv 2107.07651).

A ViT reads pixels; the first half of a BERT reads words; its second half reads the words' states and, through
cross-attention in every block, the picture's tokens. Easy to get wrong:

* a text is [CLS] and its words: no [SEP] stands at its end, as it would in BERT, and the embedding of segment 0 is
  added to every token;
* ITC compares the class token of the *text* half, after 6 blocks, with that of the picture, both raw: there is no
  pooler;
* masked words need a pass of their own through all 12 blocks: the class token of ITC and the pairs of ITM come from
  the text as it stands;
* class 1 of the matching head is "belong together".

B batch, C channels, H height, W width, N image tokens (class token first), T text tokens, Q positions asked for,
D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trivium.layers.attention import Attention
from trivium.layers.embeddings import interpolate_positions
from trivium.layers.heads import TiedMaskedHead
from trivium.layers.transformer import PostNormEncoder, through
from trivium.models.bert import Bert, BertConfig
from trivium.models.encoded import Encoded
from trivium.models.grounding import Gaze
from trivium.models.vit import ViT, ViTConfig

TEMPERATURES = (0.001, 0.5)  # lowest and highest


@dataclass(frozen=True)
class AlbefConfig:
    """The published model by default: 209,937,725 parameters."""

    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    image_layers: int = 12
    text_layers: int = 6  # that read words alone
    fusion_layers: int = 6  # that read the picture too
    image_size: int = 256  # side in pixels that the position table was made for; others are interpolated
    patch_size: int = 16
    vocab_size: int = 30522
    max_length: int = 512  # text positions
    num_segments: int = 2
    pad_id: int = 0
    projection_width: int = 256
    start_temperature: float = 0.07  # what cosines are divided by at first; learned, between 0.001 and 0.5
    image_eps: float = 1e-6  # of every LayerNorm of the picture's tower
    text_eps: float = 1e-12  # of those of text and fusion
    dropout: float = 0.1  # of text and fusion; the picture's tower has none

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> AlbefConfig:
        """`size` is "tiny", "small" or "base" (the published one), with single fields changed."""
        return replace(SIZES[size], **changes)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def image_tower(self) -> ViTConfig:
        return ViTConfig(
            width=self.width, num_heads=self.num_heads, mlp_width=self.mlp_width, num_layers=self.image_layers,
            image_size=self.image_size, patch_size=self.patch_size, eps=self.image_eps,
        )  # fmt: skip

    @property
    def text_tower(self) -> BertConfig:
        return BertConfig(
            width=self.width, num_heads=self.num_heads, mlp_width=self.mlp_width, num_layers=self.text_layers,
            vocab_size=self.vocab_size, max_length=self.max_length, num_segments=self.num_segments, pad_id=self.pad_id,
            eps=self.text_eps, dropout=self.dropout, pooler=False,
        )  # fmt: skip


SIZES = {
    "tiny": AlbefConfig(
        width=128, num_heads=4, mlp_width=512, image_layers=6, text_layers=3, fusion_layers=3,
        image_size=64, patch_size=16, vocab_size=4096, max_length=64, projection_width=128, dropout=0.0,
    ),
    "small": AlbefConfig(
        width=384, num_heads=6, mlp_width=1536, image_layers=12, text_layers=4, fusion_layers=4, max_length=128,
    ),
    "base": AlbefConfig(),
}  # fmt: skip


@dataclass(frozen=True)
class Negatives:
    """Whom each row of a batch is paired with that it does not belong to. int64 [B], rows of the batch."""

    image_B: Tensor  # the picture beside text b
    text_B: Tensor  # the text beside picture b


class Albef(nn.Module):
    """The two towers, their fusion, both projections, the head of masked words and the matching head."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.image = ViT(config.image_tower)
        self.text = Bert(config.text_tower)
        self.fusion = PostNormEncoder(
            width, config.fusion_layers, config.num_heads, config.mlp_width, config.text_eps, config.dropout, width
        )
        self.image_projection = nn.Linear(width, config.projection_width)
        self.text_projection = nn.Linear(width, config.projection_width)
        # [1], not []: FSDP2 takes no parameter without a dimension.
        self.temperature = nn.Parameter(torch.full((1,), config.start_temperature))
        self.mlm_head = TiedMaskedHead(width, config.vocab_size, config.text_eps)
        self.itm_head = nn.Linear(width, 2)

    def config_dict(self) -> dict[str, Any]:
        """What a model folder's config.json holds beside the family."""
        return asdict(self.config)

    def blocks(self) -> list[nn.Module]:
        """Every transformer block, for compilation and sharding block by block."""
        return [*self.image.blocks(), *self.text.blocks(), *self.fusion.blocks]

    def encode_image(self, pixels_BCHW: Tensor, rows: Tensor | int | None = None) -> Encoded:
        """Normalised pixels, float [B, 3, H, W], H and W multiples of the patch; other sizes than the config's are
        position-interpolated.

        Args:
            rows: compute the last block only there (see SelfAttention); `states` then holds only those positions.
        """
        return Encoded(self.image(pixels_BCHW, None, rows), None, self.image.norm, self.image_projection)

    def encode_text(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, rows: Tensor | int | None = None, pads: bool = True
    ) -> Encoded:
        """Token ids, int64 [B, T], without [SEP]; mask_BT: bool, True = a real token. None attends pads too.

        pads: somebody reads their states, which else may have no meaning.
        """
        states = self.text.encode_text(ids_BT, mask_BT, rows=rows, pads=pads).states
        return Encoded(states, mask_BT, nn.Identity(), self.text_projection)

    def fuse(self, image: Encoded, text: Encoded, rows: Tensor | int | None = None, pads: bool = True) -> Encoded:
        """Texts read with their pictures, row by row. Positions of the result are the text's, its class token first.
        pads: somebody reads their states, which else may have no meaning.

        A picture that stands alone is read by every text: its keys and values are computed once.
        """
        if len(image.states) == 1 < len(text.states):
            memories = [replace(memory, times=len(text.states)) for memory in self.fusion.read(image.tokens)]
            return self._fused(self.fusion(text.states, text.mask, rows, memories, None, pads), text.mask)
        return self._fused(self.fusion(text.states, text.mask, rows, image.tokens, None, pads), text.mask)

    def fuse_pairs(
        self,
        image: Encoded,
        masked: Encoded | None,
        rows: Tensor | None,
        text: Encoded | None,
        negatives: Negatives | None,
    ) -> tuple[Encoded | None, Encoded | None]:
        """All that a training step fuses, in one pass: each picture's keys and values are computed once, and whoever
        reads it asks it at once. Equal to four calls of `fuse`.

        Args:
            masked: texts with hidden words, as many as pictures; rows: their positions that are needed, None = all.
            text, negatives: the texts as they stand, and their false pairs.

        Returns:
            the masked texts beside their pictures; and the class tokens, `states` [3 B, 1, D], of the true pairs, of
            the pictures with other texts, of the texts with other pictures.
        """
        B = len(image.states)
        readers = [] if masked is None else [masked.states]
        masks = [] if masked is None else [masked.mask]
        others = None
        if text is not None:
            assert negatives is not None
            readers += [text.states, text.states.index_select(0, negatives.text_B), text.states]
            other_mask = None if text.mask is None else text.mask.index_select(0, negatives.text_B)
            masks += [text.mask, other_mask, text.mask]
            others = negatives.image_B
        x_RTD, mask_RT = torch.cat(readers), _joined(masks)
        own = len(readers) - (others is not None)  # batches that read their own pictures
        memories = [replace(memory, times=own, others_O=others) for memory in self.fusion.read(image.tokens)]
        pads = masked is not None and rows is None
        x_RTD = through(self.fusion.blocks[:-1], x_RTD, mask_RT, None, pads, [(memory,) for memory in memories[:-1]])
        last, memory = self.fusion.blocks[-1], memories[-1]
        words = pairs = None
        if masked is not None:
            mine = None if mask_RT is None else mask_RT[:B]
            words = last(x_RTD[:B], mine, rows, replace(memory, times=1, others_O=None))
            words = self._fused(words, mine)
            x_RTD, mask_RT = x_RTD[B:], None if mask_RT is None else mask_RT[B:]
        if text is not None:
            pairs = self._fused(last(x_RTD, mask_RT, 1, replace(memory, times=2)), None)
        return words, pairs

    def match(self, fused: Encoded) -> Tensor:
        """Logits [B, 2] of "do not belong together" (0) and "belong together" (1)."""
        return self.itm_head(fused.pooled)

    def gaze(self, num_patches: int, block: int | None = None) -> Gaze:
        """Cross-attention of a block of fusion, from 0; None: the middle one, of six the third, as published."""
        blocks: Any = self.fusion.blocks
        chosen = blocks[(len(blocks) - 1) // 2 if block is None else block]
        return Gaze(chosen.cross_attention, slice(None), slice(1, 1 + num_patches))

    def image_attention(self, block: int | None = None) -> Attention:
        """Self-attention of a block of the picture's tower, from 0; None: the last."""
        chosen: Any = self.image.encoder.blocks[-1 if block is None else block]
        attention: Attention = chosen.attention
        return attention

    def predict_words(self, rows: Tensor) -> Tensor:
        """Logits [..., V] of fused states [..., D]."""
        return self.mlm_head(rows, self.text.embeddings.word.weight)

    @torch.no_grad()
    def start_image(self, tower: ViT) -> None:
        """The picture's tower from a ViT of its width, blocks and patches; positions are resampled to our grid."""
        state = {name: tensor for name, tensor in tower.state_dict().items() if name != "mask_token"}
        positions_1LD = _resampled(state["positions"], tower.config.grid, self.config.grid)
        self.image.load_state_dict(state | {"positions": positions_1LD})

    @torch.no_grad()
    def for_pictures_of(self, side: int) -> Albef:
        """The same for pictures of this side in pixels, with a position for each patch of theirs to be learned from
        here on, as published (pretrained at 256, fine-tuned at 384); itself where it is for these already."""
        if side == self.config.image_size:
            return self
        model = Albef(replace(self.config, image_size=side)).to(self.image.positions).train(self.training)
        state = self.state_dict()
        state["image.positions"] = _resampled(state["image.positions"], self.config.grid, model.config.grid)
        model.load_state_dict(state)
        return model

    @torch.no_grad()
    def start_text(self, bert: Bert) -> None:
        """Text and fusion from a BERT of their width and of as many blocks as both have (section 3.1): the first blocks
        and then the others, whose cross-attention stays as it is; the head of masked words, where it has one."""
        state = bert.state_dict()
        first = [f"encoder.blocks.{number}." for number in range(self.config.text_layers)]
        kept = {n: t for n, t in state.items() if n.startswith(("embeddings.", *first))}
        self.text.load_state_dict(kept)
        for number, block in enumerate(self.fusion.blocks, start=self.config.text_layers):
            prefix = f"encoder.blocks.{number}."
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            assert own, f"a BERT without block {number}"
            block.load_state_dict(own, strict=False)
        if bert.mlm_head is not None:
            self.mlm_head.load_state_dict(bert.mlm_head.state_dict())

    @staticmethod
    def _fused(states: Tensor, mask_BT: Tensor | None) -> Encoded:
        return Encoded(states, mask_BT, nn.Identity(), None)


def _joined(masks: Sequence[Tensor | None]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    assert len(present) in (0, len(masks)), "texts of one batch have masks all or none"
    return torch.cat(present) if present else None


def _resampled(positions_1LD: Tensor, old: int, new: int) -> Tensor:
    """Positions of a square grid on another; that of the class token stays."""
    patches_ND = interpolate_positions(positions_1LD[0, 1:], (old, old), (new, new))
    return torch.cat([positions_1LD[:, :1], patches_ND[None]], dim=1)
