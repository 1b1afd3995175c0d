"""Image-text matching: do the picture and the text belong together? B rows."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def matching(logits_B2: Tensor, matched_B: Tensor) -> Tensor:
    """Sum over rows of two-way cross-entropy; class 1 = matched. Divide by the rows of the global batch."""
    return F.cross_entropy(logits_B2, matched_B.long(), reduction="sum")
