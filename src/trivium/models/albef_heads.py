"""What stands on ALBEF where it answers questions and judges statements on two pictures (Li et al., NeurIPS 2021,
section 5).

Answers are *written*: a BERT of as many blocks as the fusion has reads the fused states of picture and question, and
writes from left to right. A statement on two pictures is read with both: behind each block of the fusion stands a
second one, which reads the second picture. Easy to get wrong:

* the writer never sees the picture: what it knows of it comes through the question's fused states;
* an answer is [CLS], its words and [SEP], which is written too; it is as likely as all of these in turn. The public
  code counts the first word twice where it ranks;
* the two blocks of a pair share the keys and values of cross-attention and nothing else.

B questions, S positions of their states, K answers in a list, C of them in question, R rows (answers to some question),
T tokens of an answer, Q positions of one pass, M predictions, V vocabulary, D width, N image tokens, P pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trivium.layers.attention import KeyValue, Memory
from trivium.layers.heads import TaskHead
from trivium.layers.transformer import PostNormBlock, PostNormEncoder
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.bert import Bert, BertConfig
from trivium.models.encoded import Encoded

ROWS_AT_ONCE = 2048  # answers that one pass reads
LOGITS_AT_ONCE = 1 << 25  # that are held at once, 128 MiB in float32


def decoder_config(config: AlbefConfig) -> BertConfig:
    """The shape of the writer: the blocks of fusion, and a head of masked words. The second blocks have it too."""
    return replace(
        config.text_tower, num_layers=config.fusion_layers, memory_width=config.width, mlm_head=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What each block of the writer reads of the fused states: computed once for all answers."""

    memories: Sequence[Memory]
    mask_BS: Tensor | None

    def times(self, C: int) -> Question:
        """For C batches of B answers, one after the other."""
        return replace(self, memories=[replace(memory, times=C) for memory in self.memories])

    def of_rows(self, row_R: Tensor) -> Question:
        """For answers to the questions row_R, int64."""
        chosen = [Memory(m.key_BHSE.index_select(0, row_R), m.value_BHSE.index_select(0, row_R)) for m in self.memories]
        return Question(chosen, None if self.mask_BS is None else self.mask_BS.index_select(0, row_R))


class AnswerDecoder(Bert):
    """Writes answers, and says how likely given ones are. Answers are int64 [R or K, T]: [CLS], words, [SEP], pads."""

    def __init__(self, config: BertConfig) -> None:
        assert config.memory_width and config.mlm_head, "a decoder reads states and predicts words"
        super().__init__(config)

    @torch.no_grad()
    def start(self, model: Albef) -> None:
        """As ALBEF does (section 5): words from its text, blocks and their cross-attention from its fusion, and its
        head of masked words."""
        self.embeddings.load_state_dict(model.text.embeddings.state_dict())
        self.encoder.load_state_dict(model.fusion.state_dict())
        assert self.mlm_head is not None
        self.mlm_head.load_state_dict(model.mlm_head.state_dict())

    def read(self, fused: Encoded) -> Question:
        return Question(self.encoder.read(fused.tokens), fused.mask)

    def states(
        self, ids_RQ: Tensor, question: Question, before: Sequence[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """[R, Q, D], each position having seen itself and those in front of it.

        Args:
            before: of each block the keys and values of the positions in front; None: ids_RQ begins with [CLS].

        Returns:
            also the same of all positions.
        """
        first = 0 if before is None else before[0][0].shape[2]
        x_RQD = self.embeddings(ids_RQ, first=first)
        kept = []
        for number, (block, memory) in enumerate(zip(self.encoder.blocks, question.memories, strict=True)):
            past = None if before is None else before[number]
            x_RQD, now = block.after(x_RQD, past, memory, question.mask_BS)  # type: ignore[operator]
            kept.append(now)
        return x_RQD, kept

    @torch.no_grad()
    def rank(self, fused: Encoded, answers_KT: Tensor, k: int, first_word_twice: bool = False) -> Tensor:
        """Log-likelihood [B, K] of the k answers of a list that begin most likely (section 5; k = 128 as published),
        -inf of the others.

        The list is asked once by its first words; what [CLS] is in each block is computed once for all answers of a
        question, and so are the question's keys and values. Exact: with k = K every answer is read to its end.

        Args:
            first_word_twice: count it twice, as the public code does.
        """
        k = min(k, len(answers_KT))
        parts = fused.split(max(1, ROWS_AT_ONCE // k))
        return torch.cat([self._rank(part, answers_KT, k, first_word_twice) for part in parts])

    def _rank(self, fused: Encoded, answers_KT: Tensor, k: int, first_word_twice: bool) -> Tensor:
        B, question = len(fused.states), self.read(fused)
        start_BD, kept = self.states(answers_KT[:1, :1].expand(B, 1), question)
        first_BK = _log_softmax(self.predict_words(start_BD[:, 0]))[:, answers_KT[:, 1]]
        chosen_BC = first_BK.topk(k, dim=1).indices
        length_BC = (answers_KT != self.config.pad_id).sum(1)[chosen_BC]
        # Each question's shortest answers first: a column is no longer than its longest, and few are long.
        length_BC, order_BC = length_BC.sort(dim=1, stable=True)
        chosen_BC = chosen_BC.gather(1, order_BC)
        total_BC = first_BK.gather(1, chosen_BC) * (2 if first_word_twice else 1)
        longest_C = length_BC.amax(0).tolist()
        for longest in sorted({length for length in longest_C if length > 2}):
            begin, C = longest_C.index(longest), longest_C.count(longest)
            ids_RT = answers_KT[chosen_BC[:, begin : begin + C], :longest].transpose(0, 1).flatten(0, 1)
            before = [(key.repeat(C, 1, 1, 1), value.repeat(C, 1, 1, 1)) for key, value in kept]
            states_RQD, _ = self.states(ids_RT[:, 1:-1], question.times(C), before)
            asked_RQ = ids_RT[:, 2:]
            real_RQ = asked_RQ != self.config.pad_id
            log_RQ = torch.zeros(asked_RQ.shape, dtype=total_BC.dtype, device=total_BC.device)
            log_RQ[real_RQ] = self._log_probability(states_RQD[real_RQ], asked_RQ[real_RQ])
            total_BC[:, begin : begin + C] += log_RQ.sum(1).view(C, B).T
        return torch.full_like(first_BK, -torch.inf).scatter_(1, chosen_BC, total_BC)

    def _log_probability(self, states_MD: Tensor, word_M: Tensor) -> Tensor:
        found = []
        at_once = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        for states, words in zip(states_MD.split(at_once), word_M.split(at_once), strict=True):
            found.append(_log_softmax(self.predict_words(states)).gather(1, words[:, None])[:, 0])
        return torch.cat(found)

    @torch.no_grad()
    def write(self, fused: Encoded, start: int, end: int, num: int, max_length: int) -> tuple[Tensor, Tensor]:
        """The `num` likeliest answers that a search along as many beams finds, of whatever words: ids [B, num, L]
        without [CLS], filled up with `end`; and their log-likelihoods [B, num], best first.

        Args:
            num: at most one for each word of the vocabulary.
            start, end: the ids of [CLS] and [SEP].
            max_length: words and [SEP] at most; what is longer has no `end`.
        """
        B, V = len(fused.states), self.config.vocab_size
        assert num <= V
        question, device = self.read(fused), fused.states.device
        states_BQD, kept = self.states(torch.full((B, 1), start, device=device), question)
        total_BC, word_BC = _log_softmax(self.predict_words(states_BQD[:, -1])).topk(num, dim=1)
        ids_BCL, done_BC = word_BC[:, :, None], word_BC == end
        kept = [(key.repeat(num, 1, 1, 1), value.repeat(num, 1, 1, 1)) for key, value in kept]
        for _ in range(max_length - 1):
            if bool(done_BC.all()):
                break
            states_RQD, kept = self.states(ids_BCL[:, :, -1].T.reshape(-1, 1), question.times(num), kept)
            log_BCV = _log_softmax(self.predict_words(states_RQD[:, -1])).view(num, B, V).transpose(0, 1).contiguous()
            log_BCV[done_BC] = -torch.inf  # an answer that has ended goes on in one way alone
            log_BCV[..., end].masked_fill_(done_BC, 0.0)
            total_BC, place_BC = (total_BC[:, :, None] + log_BCV).flatten(1).topk(num, dim=1)
            beam_BC, word_BC = place_BC // V, place_BC % V
            ids_BCL = ids_BCL.gather(1, beam_BC[:, :, None].expand(-1, -1, ids_BCL.shape[2]))
            ids_BCL = torch.cat([ids_BCL, word_BC[:, :, None]], dim=2)
            done_BC = done_BC.gather(1, beam_BC) | (word_BC == end)
            row_R = (beam_BC.T * B + torch.arange(B, device=device)).flatten()
            kept = [(key[row_R], value[row_R]) for key, value in kept]
        return ids_BCL, total_BC


class TwoPictures(TaskHead):
    """The second blocks of the pairs, and a classifier on the class token.

    blocks: of the fusion that they stand behind: its width, heads, number of blocks and so on.
    """

    def __init__(
        self, blocks: BertConfig, hidden: int | None, num_outputs: int, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__(blocks.width, hidden, num_outputs, activation, dropout)
        self.seconds = nn.ModuleList(
            PostNormBlock(
                blocks.width, blocks.num_heads, blocks.mlp_width, blocks.eps, blocks.dropout, blocks.memory_width
            )
            for _ in range(blocks.num_layers)
        )
        for block in self.seconds:
            del block.cross_attention.key_value  # type: ignore[union-attr]  # the first block's

    @torch.no_grad()
    def start(self, model: Albef) -> None:
        """Each second block as the first (section 5)."""
        for second, first in zip(self.seconds, model.fusion.blocks, strict=True):
            state = first.state_dict()
            second.load_state_dict({name: state[name] for name in second.state_dict()})

    def judge(
        self, fusion: PostNormEncoder, text: Encoded, tokens_PND: Tensor, order_P: Tensor | None = None
    ) -> Tensor:
        """Outputs [B, K].

        Args:
            fusion: the model's own.
            tokens_PND: of the pictures after their norm: all the first ones, then all the second; or such as are read
                several times, whose keys and values are computed once.
            order_P: int64 [2 B], which of them are the first and then the second ones; None: as they stand.
        """
        x_BTD, mask_BT, B = text.states, text.mask, len(text.states)
        for number, (first, second) in enumerate(zip(fusion.blocks, self.seconds, strict=True), start=1):
            memory = first.cross_attention.read(tokens_PND)  # type: ignore[union-attr, operator]
            key_PHSE, value_PHSE = (
                part if order_P is None else part.index_select(0, order_P)
                for part in (memory.key_BHSE, memory.value_BHSE)
            )
            left, right = (
                Memory(key, value) for key, value in zip(key_PHSE.split(B), value_PHSE.split(B), strict=True)
            )
            x_BTD = first(x_BTD, mask_BT, None, left)
            x_BTD = second(x_BTD, mask_BT, 1 if number == len(self.seconds) else None, right)
        return self(x_BTD[:, 0])


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least: probabilities of 30,522 words do not add up to 1 in less."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
