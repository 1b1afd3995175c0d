"""The global contrastive loss (Radford et al. 2021; FLAVA section 3.2).

B rows of this process, G rows of the global batch, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive(
    image_BD: Tensor,
    text_BD: Tensor,
    image_GD: Tensor,
    text_GD: Tensor,
    logit_scale: Tensor,
    row_B: Tensor,
    row_G: Tensor,
    *,
    kept_B: Tensor,
    same_image_B: Tensor,
    same_text_B: Tensor,
    same_image_G: Tensor,
    same_text_G: Tensor,
) -> Tensor:
    """Sum over this process's kept rows of the mean of both directions' cross-entropy against all columns.

    Rows of unit length in, logits exp(logit_scale) times their cosine. The right answer of a row is the column with
    the same row number. A column that shows the same concept as a row, but isn't its answer, is no negative: it is
    left out of that row's softmax. Rows not kept still stand as columns for the others (the matching gate of FLAVA).

    Args:
        image_BD, text_BD: my rows. image_GD, text_GD: everyone's, with gradient.
        logit_scale: [1]. row_B, row_G: numbers within the global batch.
        kept_B: bool, rows whose loss counts.
        same_image_*, same_text_*: equal numbers = same picture, caption or concept.

    Returns:
        0-dim sum; divide by the number of kept rows of the global batch.
    """
    scale = logit_scale.exp()
    is_answer_BG = row_B[:, None] == row_G[None, :]
    answer_B = is_answer_BG.to(torch.uint8).argmax(1)

    def direction(query_BD: Tensor, key_GD: Tensor, same_B: Tensor, same_G: Tensor) -> Tensor:
        logits_BG = scale * query_BD @ key_GD.T
        false_negative_BG = (same_B[:, None] == same_G[None, :]) & ~is_answer_BG
        logits_BG = logits_BG.masked_fill(false_negative_BG, float("-inf"))
        return F.cross_entropy(logits_BG, answer_B, reduction="none")

    with torch.autocast(image_BD.device.type, enabled=False):  # cosines of long batches need float32
        image_to_text_B = direction(image_BD, text_GD, same_image_B, same_text_G)
        text_to_image_B = direction(text_BD, image_GD, same_text_B, same_image_G)
    return (0.5 * (image_to_text_B + text_to_image_B) * kept_B).sum()
