"""Momentum distillation (ALBEF, section 3.4 and Eq. 6 and 7): half of what a model is to say, a slow copy of it says.

Targets are alpha q + (1 - alpha) y, with q the copy's shares and y the labels. As cross-entropies they give the same
gradient as the paper's form with divergences, (1 - alpha) CE(y, p) + alpha KL(q || p), which is smaller by alpha times
the entropy of q: that entropy is returned beside each loss. All of them sums over rows.

B rows of this process, G rows of the global batch, Q rows of the queue, C columns of some keys, D width, M masked
positions, T text tokens, V vocabulary; R = B or 2 B rows that ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

TILE_SCORES = 1 << 22  # scores that are held at once, 16 MiB in float32
Duplicates = Literal["mask", "ignore", "positive"]


def distilled_contrastive(
    query_BD: Tensor,
    teacher_BD: Tensor,
    keys: Sequence[Tensor],
    temperature: Tensor,
    answer_B: Tensor,
    same: Sequence[Tensor],
    alpha: float,
    duplicates: Duplicates = "mask",
    tile_scores: int = TILE_SCORES,
) -> tuple[Tensor, Tensor]:
    """Each row against all keys, which a momentum encoder made (ALBEF, Eq. 1, 2 and 6). One direction of ITC.

    Rows of unit length in, scores their cosine / temperature. Gradients reach the queries and the temperature alone.

    Since scores are linear in the keys, the cross-entropy needs of its targets nothing but the mean key under them:
    sum_j y_j z_j = <query, sum_j y_j key_j> / temperature. So keys are gone through once, batch and queue one after the
    other and never joined, in tiles, with a running logarithm of the softmax' denominator and a running mean of the
    keys under it; and the gradient is the difference of two mean keys.

    Args:
        query_BD, teacher_BD: the model's rows and its copy's.
        keys: of the global batch [G, D], then of the queue [Q, D]; without gradient.
        temperature: [1].
        answer_B: int64, which key of the batch belongs to each row.
        same: for each of `keys` bool [B, C], True where it shows what the row shows; the answer may be among them. Not
            looked at where duplicates are ignored.
        alpha: share of the copy in the targets.
        duplicates: what such keys are but for the answer: left out ("mask"), negatives ("ignore"), or answers that
            share the labels' mass evenly ("positive").

    Returns:
        [B] cross-entropies, and [B] the entropy of the copy's shares (0 where alpha is 0), without gradient.
    """
    with torch.autocast(query_BD.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = _DistilledContrastive.apply(
            query_BD, temperature.to(query_BD.dtype), teacher_BD, keys, answer_B, same, alpha, duplicates, tile_scores
        )
    return found


class _DistilledContrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BD: Tensor,
        temperature: Tensor,
        teacher_BD: Tensor,
        keys: Sequence[Tensor],
        answer_B: Tensor,
        same: Sequence[Tensor],
        alpha: float,
        duplicates: Duplicates,
        tile_scores: int,
    ) -> tuple[Tensor, Tensor]:
        B = len(query_BD)
        asked_RD = (torch.cat([query_BD, teacher_BD]) if alpha else query_BD) / temperature
        answer_BD = keys[0][answer_B]
        own_BG = torch.zeros(B, len(keys[0]), dtype=torch.bool, device=query_BD.device)
        own_BG.scatter_(1, answer_B[:, None], True)
        left_out: list[Tensor | None] = [own_BG, *[None] * len(keys[1:])]  # the answers stand apart
        if duplicates == "mask":
            left_out = [same[0] | own_BG, *same[1:]]
        log_R, mean_RD = _attended(asked_RD, answer_BD, keys, left_out, tile_scores)
        target_BD = answer_BD
        if duplicates == "positive":
            others = [same[0] & ~own_BG, *same[1:]]
            number_B = 1 + torch.stack([mark.sum(1) for mark in others]).sum(0)
            for mark_BC, key_CD in zip(others, keys, strict=True):
                target_BD = target_BD + mark_BC.to(key_CD.dtype) @ key_CD
            target_BD = target_BD / number_B[:, None]
        entropy_B = torch.zeros_like(log_R[:B])
        if alpha:
            target_BD = torch.lerp(target_BD, mean_RD[B:], alpha)
            entropy_B = log_R[B:] - (asked_RD[B:] * mean_RD[B:]).sum(1)
        loss_B = log_R[:B] - (asked_RD[:B] * target_BD).sum(1)
        ctx.save_for_backward(query_BD, temperature, (mean_RD[:B] - target_BD) / temperature)
        ctx.mark_non_differentiable(entropy_B)
        return loss_B, entropy_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query_BD, temperature, slope_BD = ctx.saved_tensors
        grad_query_BD = grad_B[:, None] * slope_BD
        grad_temperature = -((query_BD * grad_query_BD).sum() / temperature).view_as(temperature)
        return grad_query_BD, grad_temperature, None, None, None, None, None, None, None


def _attended(
    asked_RD: Tensor, first_BD: Tensor, keys: Sequence[Tensor], left_out: Sequence[Tensor | None], tile_scores: int
) -> tuple[Tensor, Tensor]:
    """Of the softmax of <asked, key> over each row's `first` key and all that are not left out: the logarithm of its
    denominator, [R], and the mean key, [R, D]."""
    R, B = len(asked_RD), len(first_BD)
    mean_RD = first_BD.repeat(R // B, 1)
    log_R = (asked_RD * mean_RD).sum(1)
    tile = max(1, tile_scores // max(1, R))
    for key_CD, out_BC in zip(keys, left_out, strict=True):
        for start in range(0, len(key_CD), tile):
            part_CD = key_CD[start : start + tile]
            scores_RC = asked_RD @ part_CD.T
            if out_BC is not None:
                scores_RC.view(R // B, B, -1).masked_fill_(out_BC[:, start : start + tile], -torch.inf)
            joined_R = torch.logaddexp(log_R, scores_RC.logsumexp(1))
            mean_RD *= (log_R - joined_R).exp()[:, None]
            mean_RD.addmm_((scores_RC - joined_R[:, None]).exp_(), part_CD)
            log_R = joined_R
    return log_R, mean_RD


def distilled_prediction(
    logits_MV: Tensor, target_M: Tensor, teacher_MV: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Masked words with soft labels (ALBEF, Eq. 7): the sum of cross-entropies, and the sum of the entropies of the
    copy's shares, without gradient. teacher_MV: the copy's logits.

    Divide by the number of masked positions of the global batch.
    """
    log_MV = _log_softmax(logits_MV, -1)
    with torch.no_grad():
        share_MV = _log_softmax(teacher_MV, -1).exp()
        entropy = torch.special.entr(share_MV).sum()
    hard, soft = F.nll_loss(log_MV, target_M, reduction="sum"), -(share_MV * log_MV).sum()
    return (1 - alpha) * hard + alpha * soft, entropy


def published_prediction(
    logits_BTV: Tensor, places_M: Tensor, target_M: Tensor, teacher_BTV: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """The same with the public code's mistake, until March 2022: the soft term normalises over the *positions* of a
    text, pads among them, where it should over the vocabulary. places_M: masked positions in [B * T]."""
    log_MV = _log_softmax(logits_BTV, 1).flatten(0, 1)[places_M]
    with torch.no_grad():
        share_MV = _log_softmax(teacher_BTV.flatten(0, 1)[places_M], -1).exp()
        entropy = torch.special.entr(share_MV).sum()
    hard = F.cross_entropy(logits_BTV.flatten(0, 1)[places_M], target_M, reduction="sum")
    return (1 - alpha) * hard - alpha * (share_MV * log_MV).sum(), entropy


def _log_softmax(logits: Tensor, dim: int) -> Tensor:
    """In float32 at least: probabilities of 30,522 words do not add up to 1 in less."""
    return logits.log_softmax(dim, dtype=torch.promote_types(logits.dtype, torch.float32))
