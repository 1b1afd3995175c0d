"""Weighted nearest neighbours (Wu et al. 2018; DINO, Caron et al. 2021, section 4.1).

The k nearest by cosine vote for their class with weight exp(cosine / T). No training, no choice to tune: what the
features hold as they are. Q queries, G gallery, K classes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

QUERIES, GALLERY = 1024, 65_536  # compared at once: 256 MiB of cosines, however large both are


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
    num_classes = int(labels_G.max()) + 1
    parts = []
    for first in range(0, len(queries_QD), QUERIES):
        chunk = slice(first, first + QUERIES)
        numbers = None if left_out is None else (left_out[0][chunk], left_out[1])
        cosine_Qk, label_Qk = _nearest(queries_QD[chunk], gallery_GD, labels_G, k, numbers)
        weights_Qk = ((cosine_Qk - 1) / temperature).exp()  # the largest cosine is 1: no overflow at any T
        votes_QK = weights_Qk.new_zeros(len(cosine_Qk), num_classes).scatter_add_(1, label_Qk, weights_Qk)
        parts.append(votes_QK.argmax(dim=1).masked_fill(cosine_Qk[:, 0] == -torch.inf, -1))
    return torch.cat(parts)


def _nearest(
    queries_QD: Tensor, gallery_GD: Tensor, labels_G: Tensor, k: int, left_out: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Cosine and label of the k nearest of the gallery, the nearest first: [Q, k] each."""
    queries_QD = normalize(queries_QD, dim=-1)
    cosine_Qk, label_Qk = queries_QD.new_zeros(len(queries_QD), 0), labels_G.new_zeros(len(queries_QD), 0)
    for first in range(0, len(gallery_GD), GALLERY):
        chunk = slice(first, first + GALLERY)
        cosine_QG = queries_QD @ normalize(gallery_GD[chunk], dim=-1).T
        if left_out is not None:
            cosine_QG.masked_fill_(left_out[0][:, None] == left_out[1][None, chunk], -torch.inf)
        here = cosine_QG.topk(min(k, cosine_QG.shape[1]), dim=1)
        cosine_Qk = torch.cat([cosine_Qk, here.values], dim=1)
        label_Qk = torch.cat([label_Qk, labels_G[chunk][here.indices]], dim=1)
        best = cosine_Qk.topk(min(k, cosine_Qk.shape[1]), dim=1)
        cosine_Qk, label_Qk = best.values, label_Qk.gather(1, best.indices)
    return cosine_Qk, label_Qk
