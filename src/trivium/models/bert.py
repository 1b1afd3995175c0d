"""BERT: Pre-training of Deep Bidirectional Transformers (Devlin et al., NAACL 2019, arXiv 1810.04805).

A post-norm transformer over words. Easy to get wrong:

* there is no LayerNorm after the last block, and one before the first: that of the embeddings;
* the head of masked words takes its last matrix from the word embeddings: one tensor, with a bias of its own;
* the pooler (a linear map and tanh on the class token) was trained for next-sentence prediction; checkpoints of masked
  words alone lack it.

B batch, T text tokens, D width, V vocabulary, S positions of a memory, W their width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from trivium.layers.embeddings import BertEmbeddings
from trivium.layers.heads import TiedMaskedHead
from trivium.layers.transformer import PostNormEncoder
from trivium.models.encoded import Encoded


@dataclass(frozen=True)
class BertConfig:
    """BERT-base uncased by default: 109,482,240 parameters; the head of masked words adds 622,650."""

    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    num_layers: int = 12
    vocab_size: int = 30522
    max_length: int = 512  # text positions
    num_segments: int = 2
    pad_id: int = 0
    eps: float = 1e-12  # of every LayerNorm
    dropout: float = 0.1  # of attention, residual branches and embeddings
    pooler: bool = True
    mlm_head: bool = False
    memory_width: int | None = None  # with it every block has cross-attention, to a memory of this width

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> BertConfig:
        """`size` is "tiny", "small" or "base" (the published one), with single fields changed."""
        return replace(SIZES[size], **changes)


SIZES = {
    "tiny": BertConfig(width=128, num_heads=4, mlp_width=512, num_layers=4, vocab_size=4096, max_length=64),
    "small": BertConfig(width=384, num_heads=12, mlp_width=1536, num_layers=6),  # the shape of MiniLM
    "base": BertConfig(),
}


class Bert(nn.Module):
    """Embeddings, blocks and, where the checkpoint has them, the pooler and the head of masked words."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(
            config.vocab_size, config.width, config.max_length, config.num_segments, config.eps, config.pad_id,
            config.dropout,
        )  # fmt: skip
        self.encoder = PostNormEncoder(
            config.width, config.num_layers, config.num_heads, config.mlp_width, config.eps, config.dropout,
            config.memory_width,
        )  # fmt: skip
        self.pooler = nn.Linear(config.width, config.width) if config.pooler else None
        self.mlm_head = TiedMaskedHead(config.width, config.vocab_size, config.eps) if config.mlm_head else None

    def config_dict(self) -> dict[str, Any]:
        """What a model folder's config.json holds beside the family."""
        return asdict(self.config)

    def blocks(self) -> list[nn.Module]:
        """Every transformer block, for compilation and sharding block by block."""
        return list(self.encoder.blocks)

    def encode_text(
        self,
        ids_BT: Tensor,
        mask: Tensor | None = None,
        segments_BT: Tensor | None = None,
        rows: Tensor | int | None = None,
        memory_BSW: Tensor | None = None,
        memory_mask: Tensor | None = None,
        pads: bool = True,
    ) -> Encoded:
        """Token ids, int64 [B, T].

        Args:
            mask: bool, True = a real token: [B, T], or [B, T, T] (`layers.attention.causal`) to decode from left to
                right. None attends every position, pads too.
            rows: compute the last block only there (see SelfAttention); `states` then holds only those positions.
            memory_BSW, memory_mask: what cross-attention reads.
            pads: somebody reads their states, which else may have no meaning.
        """
        states = self.encoder(self.embeddings(ids_BT, segments_BT), mask, rows, memory_BSW, memory_mask, pads)
        return Encoded(states, mask if mask is None or mask.ndim == 2 else None, nn.Identity(), None)

    def pool(self, text: Encoded) -> Tensor:
        """[B, D]: the pooler on the class token."""
        assert self.pooler is not None, "this BERT came without a pooler"
        return self.pooler(text.pooled).tanh()

    def predict_words(self, rows: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        assert self.mlm_head is not None, "this BERT came without a head of masked words"
        return self.mlm_head(rows, self.embeddings.word.weight)
