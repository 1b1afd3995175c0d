"""Losses of fine-tuning, each a sum over rows: of one right class, of a number, of answers that are more or less right,
of answers that are written.

B rows, K classes; M words of written answers, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def right_class(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Sum of cross-entropies. Divide by the rows of the global batch, as the others.

    label_B: int64; or shares of the classes, [B, K].
    """
    return F.cross_entropy(logits_BK, label_B, reduction="sum")


def number(outputs_B1: Tensor, value_B: Tensor) -> Tensor:
    """Sum of squared errors."""
    return (outputs_B1[:, 0] - value_B).square().sum()


def soft_answers(logits_BK: Tensor, answers_BK: Tensor) -> Tensor:
    """Sum over rows and classes of binary cross-entropies (Teney et al. 2018, Eq. 5): an answer is right to a degree,
    and several may be."""
    return F.binary_cross_entropy_with_logits(logits_BK, answers_BK.to(logits_BK.dtype), reduction="sum")


def written_answers(logits_MV: Tensor, word_M: Tensor, weight_M: Tensor) -> Tensor:
    """Sum over words of cross-entropies, each times the weight of its answer (ALBEF, section 5): an answer costs what
    its words cost together.

    word_M: int64; or shares of the vocabulary, [M, V].
    """
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return (F.cross_entropy(logits_MV, word_M, reduction="none") * weight_M).sum()
