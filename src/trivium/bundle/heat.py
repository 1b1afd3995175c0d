"""Where in a picture the words of a text are looked for, as maps.

B batch, T text tokens, P patches, W words, n patches along one side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.errors import TriviumError

Word = tuple[str, int, int]  # as the model reads it, its first token, and the one after its last


@dataclass(frozen=True)
class Heat:
    """Where in a picture a text is looked for. Not negative; of n x n patches, from the top left."""

    words: tuple[str, ...]  # as the model reads them
    words_Wnn: Tensor  # float32 on CPU: of each word, the mean over its tokens
    text_nn: Tensor  # of the whole text: the mean over all its tokens, the first and the last among them


def by_words(heat_BTP: Tensor, mask_BT: Tensor | None, words: Sequence[Sequence[Word]]) -> list[Heat]:
    """The heat of tokens as that of words, row by row. mask_BT: True where a token is; None: everywhere."""
    side = math.isqrt(heat_BTP.shape[2])
    if side**2 != heat_BTP.shape[2]:
        raise TriviumError("heat maps are of square pictures: give files, or tensors of equal sides")
    found = []
    for row, (of_row, heat_TP) in enumerate(zip(words, heat_BTP, strict=True)):
        length = heat_TP.shape[0] if mask_BT is None else int(mask_BT[row].sum())
        heat_Tnn = heat_TP[:length].view(length, side, side)
        maps = [heat_Tnn[first:end].mean(0) for _, first, end in of_row]
        by_word_Wnn = torch.stack(maps) if maps else heat_Tnn[:0]
        found.append(Heat(tuple(word for word, _, _ in of_row), by_word_Wnn, heat_Tnn.mean(0)))
    return found
