"""Which pairs of a batch may lend each other a picture or a caption, so that the two do not belong together.

Two rows of one picture or of one caption never do: what comes of it is true.

B rows of a batch, C others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.train.protocol import Batch

_CAPTION_BASE = 0x9E3779B97F4A7C15 - 2**64  # odd, as an int64


def numbers(batch: Batch) -> Tensor:
    """Of picture and caption, int64 [B, 2]. Captions of the same words have the same number."""
    ids_BT = batch.texts[0].ids_BT * batch.texts[0].mask_BT
    number_B = torch.zeros_like(ids_BT[:, 0])
    for ids_B in ids_BT.T.flip(0):  # backwards, so that pads count nothing; it wraps at 2**64
        number_B = number_B * _CAPTION_BASE + ids_B
    return torch.stack([batch.images[0].same_B, number_B & (2**63 - 1)], dim=1)


def alike(same_B2: Tensor, same_C2: Tensor) -> Tensor:
    """bool [B, C]: the same picture, or the same caption."""
    return (same_B2[:, None, 0] == same_C2[:, 0]) | (same_B2[:, None, 1] == same_C2[:, 1])


def allowed(batch: Batch, pool: int) -> Tensor:
    """Which rows may stand beside which in a false pair, bool [B, B]: of one pool of so many rows, and nothing that
    they share."""
    same_B2, pool_B = numbers(batch), (batch.rows_B - batch.rows_B[0]) // pool
    return ~alike(same_B2, same_B2) & (pool_B[:, None] == pool_B)
