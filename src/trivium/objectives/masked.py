"""Masked prediction: of image codes (BEiT), of words (BERT), alone or with the other modality beside them (FLAVA).

M masked positions of the micro-batch, V classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def masked_prediction(logits_MV: Tensor, target_M: Tensor) -> Tensor:
    """Sum of cross-entropies over masked positions; 0 with a gradient of zeros where there are none.

    Divide by the number of masked positions of the global batch (FLAVA section 3.2: MIM, MLM, MMM).
    """
    return F.cross_entropy(logits_MV, target_M, reduction="sum")
