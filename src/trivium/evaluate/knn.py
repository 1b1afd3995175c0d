"""Weighted nearest neighbours (Wu et al. 2018; DINO, Caron et al. 2021, section 4.1).

The k nearest by cosine vote for their class with weight exp(cosine / T). No training, no choice to tune: what the
features hold as they are. Q queries, G gallery, K classes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 1024


def predict(
    queries_QD: Tensor,
    gallery_GD: Tensor,
    labels_G: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    left_out: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The class with most votes, int64 [Q]; the smallest label where votes are equal.

    Args:
        labels_G: int64, from 0.
        left_out: numbers [Q] and [G] (of concepts, say); a query gets no vote from a gallery row with its own number.
            A query that nobody is left to vote for gets -1.
    """
    gallery = normalize(gallery_GD, dim=-1)
    num_classes = int(labels_G.max()) + 1
    parts = []
    for first in range(0, len(queries_QD), CHUNK):
        chunk = slice(first, first + CHUNK)
        cosine_QG = normalize(queries_QD[chunk], dim=-1) @ gallery.T
        if left_out is not None:
            cosine_QG = cosine_QG.masked_fill(left_out[0][chunk, None] == left_out[1][None], -torch.inf)
        nearest = cosine_QG.topk(min(k, len(gallery)), dim=1)
        weights_Qk = ((nearest.values - 1) / temperature).exp()  # the largest cosine is 1: no overflow at any T
        votes_QK = weights_Qk.new_zeros(len(cosine_QG), num_classes).scatter_add_(
            1, labels_G[nearest.indices], weights_Qk
        )
        parts.append(votes_QK.argmax(dim=1).masked_fill(nearest.values[:, 0] == -torch.inf, -1))
    return torch.cat(parts)
