"""Answers in words, of a head that writes: the list that it ranks, as tokens, and what it writes freely.

C candidates, L tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from trivium.data.tokenizer import ANSWER_TOKENS, Tokenizer
from trivium.errors import TriviumError
from trivium.models.encoded import Answers, Encoded
from trivium.models.finetuned import HeadConfig

ANSWER_WORDS = 16  # word pieces that are written at most, [SEP] among them


class Answer(NamedTuple):
    text: str
    probability: float  # of a model that scores its answers apart, how right it is


def ranked_list(labels: list[str] | None, tokenizer: Tokenizer | None, positions: int) -> Tensor:
    """The answers that a writer ranks, [K, L]. positions: of the model, at most."""
    if not labels or tokenizer is None:
        raise TriviumError(
            "this model ranks a list of answers, and has none: set bundle.labels, put answer_list.json beside its"
            " file, or let it write freely"
        )
    tokenizer = tokenizer.for_answers()
    return tokenizer.pad(tokenizer.encode(labels, min(ANSWER_TOKENS, positions)))[0]


def ranked_by(head: HeadConfig | None, ranked: int | None, first_word_twice: bool | None) -> HeadConfig:
    """The settings of a head that ranks a list, with others of its own where they are not None (see `HeadConfig`).

    Raises:
        TriviumError: it ranks none, or is to read less than one answer.
    """
    if head is None or head.gives != "text":
        raise TriviumError(
            "this model has no head that ranks a list of answers, so that nothing can be set of how it does: take one"
            " that writes its answers, as ALBEF does for VQA"
        )
    if ranked is not None and ranked < 1:
        raise TriviumError(f"{ranked} answers of the list are to be read to their end: it must be 1 at least")
    twice = head.first_word_twice if first_word_twice is None else first_word_twice
    return replace(head, ranked=ranked or head.ranked, first_word_twice=twice)


def own_list(answers: Sequence[str], tokenizer: Tokenizer, positions: int) -> list[str]:
    """A list of one's own, each answer once. positions: of the model, at most.

    Raises:
        TriviumError: there are not two; or one has pieces that the vocabulary has not, or too many: scored by what is
            left of it, it would stand for any other such answer.
    """
    found = list(dict.fromkeys(answers))
    if len(found) < 2:
        raise TriviumError(f"{len(found)} different answers are given: two at least are needed to choose from")
    tokenizer, most = tokenizer.for_answers(), min(ANSWER_TOKENS, positions)
    for answer, ids in zip(found, tokenizer.encode(found, most + 1), strict=True):
        if tokenizer.unk_id in ids:
            raise TriviumError(f'the model\'s vocabulary has no word pieces for the answer "{answer}": leave it out')
        if len(ids) > most:
            raise TriviumError(
                f'the answer "{answer[:40]}..." has more than the {most} tokens that are read: shorten it'
            )
    return found


def written(head: Answers, fused: Encoded, tokenizer: Tokenizer, k: int) -> list[Answer]:
    """The k likeliest texts on one fused picture and question, each once; best first."""
    start, end = tokenizer.cls_id, tokenizer.sep_id
    ids_BCL, log_BC = head.write(fused, start, end, min(k, tokenizer.vocab_size), ANSWER_WORDS)
    found: list[Answer] = []
    for ids, log in zip(ids_BCL[0].tolist(), log_BC[0].tolist(), strict=True):
        text = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
        if text not in [answer.text for answer in found]:
            found.append(Answer(text, math.exp(log)))
    return found
