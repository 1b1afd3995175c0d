"""Image-text matching: do the picture and the text belong together? B rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def matching(logits_B2: Tensor, matched_B: Tensor, kept_B: Tensor | None = None) -> Tensor:
    """Sum over rows of two-way cross-entropy; class 1 = matched. Divide by the rows of the global batch.

    kept_B: bool, rows that count; None = all.
    """
    if kept_B is None:
        return F.cross_entropy(logits_B2, matched_B.long(), reduction="sum")
    return (F.cross_entropy(logits_B2, matched_B.long(), reduction="none") * kept_B).sum()


@torch.no_grad()
def hard_negatives(logits_BB: Tensor, allowed_BB: Tensor, uniform_B: Tensor) -> Tensor:
    """For each row one column that is allowed, with the probability that the softmax over those gives it (ALBEF,
    section 3.2), int64 [B]. The column of a row without any is its own number.

    By the inverse of the cumulative distribution, in float64: however far apart logits are, a column that is not
    allowed has a share of exactly 0 and is never drawn.

    Args:
        allowed_BB: bool, columns that may stand beside a row.
        uniform_B: in [0, 1), the draw of each row.
    """
    own_BB = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    allowed_BB = allowed_BB | (own_BB & ~allowed_BB.any(1, keepdim=True))
    share_BB = logits_BB.masked_fill(~allowed_BB, -torch.inf).softmax(1, dtype=torch.float64)
    reached_BB = share_BB.cumsum(1)
    total_B1 = reached_BB[:, -1:]
    drawn_B1 = uniform_B[:, None] * total_B1
    drawn_B1 = torch.minimum(drawn_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))  # rounded up to it
    # Of logits that are no numbers it would be a column that there is not. With any, the loss is none either, and the
    # step is skipped as it should be.
    return torch.searchsorted(reached_BB, drawn_B1, right=True)[:, 0].clamp_(max=len(logits_BB) - 1)
