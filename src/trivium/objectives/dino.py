"""DINO's loss (Caron et al. 2021, equations 1 to 3), and what DINOv2 (Oquab et al. 2023) adds: Sinkhorn's centring,
KoLeo, iBOT's masked patches. All of them sums over rows.

V crops of the student, the first two of them the teacher's; B rows (pictures), G rows of the global batch, M masked
patches, K prototypes, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_GLOBAL = 2  # crops that the teacher sees


def num_pairs(num_crops: int) -> int:
    """Pairs of a teacher's crop and another crop of the student: 2 (2 + n) - 2 for n local crops."""
    return NUM_GLOBAL * num_crops - NUM_GLOBAL


def centred(outputs: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """The teacher's shares, [..., K] -> [..., K]: softmax((outputs - center) / temperature), without gradient."""
    with torch.no_grad():
        return ((outputs - center_K) / temperature).softmax(-1)


@torch.no_grad()
def sinkhorn(outputs_RK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The teacher's shares by Sinkhorn-Knopp (Caron et al. 2020, section 3; DINOv2): over all R rows of the batch the
    prototypes are used alike. Rows sum to 1 exactly, columns nearly to R / K.

    In logarithms, so that no temperature overflows.
    """
    log_RK = outputs_RK / temperature
    for _ in range(iterations):
        log_RK = log_RK - log_RK.logsumexp(0)
        log_RK = log_RK - log_RK.logsumexp(1, keepdim=True)
    return log_RK.exp()


def crop_loss(student_VBK: Tensor, shares_2BK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each crop of the student with each *other* crop of the teacher: the mean over those pairs,
    summed over rows (equation 3).

    Args:
        student_VBK: logits; crops 0 and 1 are those of the teacher, in its order.
        shares_2BK: of the teacher; rows sum to 1. No gradient reaches them.
        temperature: of the student.

    Pairs with the same crop of the student are taken together: with s = logits / temperature, the cross-entropies sum
    up to (number of targets) x logsumexp(s) - <sum of targets, s>, one pass over s where pair by pair takes two for
    each. The gradient is written out: nothing of the size of the logits is kept but the logits.
    """
    loss: Tensor = _CropLoss.apply(student_VBK, shares_2BK, temperature)
    return loss


class _CropLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_VBK: Tensor, shares_2BK: Tensor, temperature: float) -> Tensor:
        both_BK = shares_2BK.sum(0) if len(student_VBK) > NUM_GLOBAL else None
        total = student_VBK.new_zeros(())
        logsums = []
        for crop, logits_BK in enumerate(student_VBK):
            target_BK, num_targets = _target(crop, shares_2BK, both_BK)
            scaled_BK = logits_BK / temperature
            logsums.append(scaled_BK.logsumexp(-1, keepdim=True))
            total += num_targets * logsums[-1].sum() - torch.dot(target_BK.flatten(), scaled_BK.flatten())
        ctx.save_for_backward(student_VBK, shares_2BK, *logsums)
        ctx.temperature = temperature
        return total / num_pairs(len(student_VBK))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student_VBK, shares_2BK, *logsums = ctx.saved_tensors
        both_BK = shares_2BK.sum(0) if len(student_VBK) > NUM_GLOBAL else None
        factor = grad / (num_pairs(len(student_VBK)) * ctx.temperature)
        grad_VBK = torch.empty_like(student_VBK)
        for crop, logits_BK in enumerate(student_VBK):
            target_BK, num_targets = _target(crop, shares_2BK, both_BK)
            share_BK = torch.div(logits_BK, ctx.temperature, out=grad_VBK[crop]).sub_(logsums[crop]).exp_()
            share_BK.mul_(num_targets).sub_(target_BK).mul_(factor)
        return grad_VBK, None, None


def _target(crop: int, shares_2BK: Tensor, both_BK: Tensor | None) -> tuple[Tensor, int]:
    """What a crop of the student is compared with, added up, and how many distributions that is."""
    if crop < NUM_GLOBAL:
        return shares_2BK[1 - crop], 1
    assert both_BK is not None
    return both_BK, NUM_GLOBAL


def masked_patches(student_MK: Tensor, shares_MK: Tensor, weight_M: Tensor, temperature: float) -> Tensor:
    """iBOT's loss (Zhou et al. 2022, equation 2): cross-entropy of the student's hidden patches with the teacher's view
    of them, each times its weight, summed.

    weight_M: 1 / (hidden patches of its picture), so that a picture counts once however much of it is hidden.
    """
    crossed_M = (student_MK / temperature).logsumexp(-1) - (shares_MK * student_MK).sum(-1) / temperature
    return (crossed_M * weight_M).sum()


def koleo(mine_BD: Tensor, everyone_GD: Tensor, row_B: Tensor, row_G: Tensor, eps: float = 1e-8) -> Tensor:
    """Kozachenko and Leonenko's estimate of how evenly rows are spread (Sablayrolles et al. 2019): minus the logarithm
    of the distance to the nearest other row at unit length, summed over mine. Zero for one row, which has no other.

    row_B, row_G: int64, which row of the global batch each is: nobody is its own neighbour.
    """
    mine_BD, everyone_GD = F.normalize(mine_BD, dim=-1), F.normalize(everyone_GD, dim=-1)
    if len(everyone_GD) < 2:
        return (0 * mine_BD).sum()
    with torch.autocast(mine_BD.device.type, enabled=False):  # neighbours differ by less than bfloat16 resolves
        with torch.no_grad():
            cosine_BG = (mine_BD @ everyone_GD.T).masked_fill(row_B[:, None] == row_G, -torch.inf)
            nearest_B = cosine_BG.argmax(1)
        distance_B = torch.linalg.vector_norm(mine_BD - everyone_GD[nearest_B], dim=1)
        return -(distance_B + eps).log().sum()


def entropy(shares: Tensor) -> Tensor:
    """Of distributions [..., K], in nats: [...]. ln K where all are equal, 0 where one has everything."""
    return torch.special.entr(shares).sum(-1)
