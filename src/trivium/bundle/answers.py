"""Answers in words, of a head that writes: the list that it ranks, as tokens, and what it writes freely.

C candidates, L tokens of an answer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from trivium.data.tokenizer import ANSWER_TOKENS, Tokenizer
from trivium.errors import TriviumError
from trivium.models.encoded import Answers, Encoded

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
