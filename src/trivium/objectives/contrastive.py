"""The contrastive loss: softmax (Radford et al. 2021; FLAVA section 3.2) or sigmoid (SigLIP, Zhai et al. 2023).

Its scope is what one process of the published codes sees of the others. The batch is cut into *ranks*, equal runs of
consecutive rows, on however many processes they stand:

    global            every row against all columns, with the gradient of all (torchmultimodal GLOBAL; open_clip with
                      local_loss and gather_with_grad): what training on one large device would be
    local_gradient    the same value, but a row gives no gradient to columns of other ranks (torchmultimodal LOCAL)
    local             a row has the columns of its own rank alone

On one rank all three are the same.

The scores of all rows against all columns are never whole: they come and go in tiles of some columns, so memory is
O(B x tile), forward and backward. The backward pass computes them again.

B rows of this process, G rows of the global batch, D width, T columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Scores of a tile, 16 MiB in float32: up to 2,048 rows are one tile. A plain form that keeps everything is about a
# millisecond faster at 128 rows, and takes 1.4 times as long at 2,048 and 1.9 times at 8,192: so there is but one form.
TILE_SCORES = 1 << 22

START_LOGIT_BIAS = -10.0  # of the sigmoid loss: nearly all pairs are negatives (SigLIP, section 3.2)
Scope = Literal["global", "local_gradient", "local"]


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
    logit_bias: Tensor | None = None,
    scope: Scope = "global",
    num_ranks: int = 1,
    tile: int | None = None,
) -> Tensor:
    """Sum over this process's kept rows of the mean of both directions' loss against all columns.

    Rows of unit length in, logits exp(logit_scale) times their cosine. The right answer of a row is the column with
    the same row number. A column that shows the same concept as a row, but isn't its answer, is no negative: it is
    left out of that row's loss. Rows not kept still stand as columns for the others (the matching gate of FLAVA).

    Softmax: a row's loss is its cross-entropy over the columns. Sigmoid, where `logit_bias` is given: the sum over
    the columns of -log sigmoid(z (logit + bias)), z = 1 for the answer and -1 else (SigLIP, Eq. 1, which divides by
    the rows alone and not by rows times columns, as is done here).

    Args:
        image_BD, text_BD: my rows.
        image_GD, text_GD: everyone's, with gradient; on one process they are the tensors of my rows themselves.
        logit_scale: [1]. row_B, row_G: numbers within the global batch.
        kept_B: bool, rows whose loss counts.
        same_image_*, same_text_*: equal numbers = same picture, caption or concept.
        logit_bias: [1]; None: the softmax loss.
        scope, num_ranks: see the top of this file. Ranks are equal where their number divides the rows.
        tile: columns at once; None: as many as TILE_SCORES allows.

    Returns:
        0-dim sum; divide by the number of kept rows of the global batch.
    """
    order_G = row_G.argsort()
    answer_B = order_G[torch.searchsorted(row_G[order_G], row_B)]
    tile = min(tile or max(1, TILE_SCORES // max(1, len(row_B))), len(row_G))
    ranks = _Ranks(scope, *(row * num_ranks // len(row_G) for row in (row_B, row_G)))
    with torch.autocast(image_BD.device.type, enabled=False):  # cosines of long batches need float32
        scale, bias = (None if x is None else x.to(image_BD.dtype) for x in (logit_scale.exp(), logit_bias))
        common = (scale, bias, answer_B, tile, ranks)
        one_process = image_BD is image_GD and text_BD is text_GD
        if one_process and scope != "local_gradient":  # both directions have the same scores, and the same gradient
            image_to_text_B, text_to_image_B = _Losses.apply(
                image_BD, text_GD, *common, same_image_B, same_text_G, True
            )
        else:
            image_to_text_B, _ = _Losses.apply(image_BD, text_GD, *common, same_image_B, same_text_G, False)
            text_to_image_B, _ = _Losses.apply(text_BD, image_GD, *common, same_text_B, same_image_G, False)
    return (0.5 * (image_to_text_B + text_to_image_B) * kept_B).sum()


def contrastive_chance(columns: float, sigmoid: bool) -> float:
    """The loss of a row, in nats, where the best that can be said of each of its columns is the same: ln(columns). The
    sigmoid form asks of every column by itself whether it is the answer, as one of them is: their number times the
    entropy of such a label."""
    return log(columns) + ((columns - 1) * log(columns / (columns - 1)) if sigmoid and columns > 1 else 0.0)


@dataclass(frozen=True)
class _Ranks:
    """Which rank each row and each column stands in, and what of another rank is left out."""

    scope: Scope
    row_B: Tensor
    column_G: Tensor

    def others(self, columns: slice) -> Tensor:
        """bool [B, T]"""
        return self.row_B[:, None] != self.column_G[None, columns]


class _Losses(torch.autograd.Function):
    """Loss of each query against all keys and, with `both`, of each key against all queries: the keys are then the
    answers of the queries, row by row. The answers stand apart from the tiles, where they are left out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BD: Tensor,
        key_GD: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        answer_B: Tensor,
        tile: int,
        ranks: _Ranks,
        same_B: Tensor,
        same_G: Tensor,
        both: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.tile, ctx.ranks = tile, ranks
        scaled_BD = query_BD * scale
        answer_logit_B = (scaled_BD * key_GD[answer_B]).sum(1)
        if bias is not None:
            answer_logit_B = answer_logit_B + bias
        # Softmax: the logarithm of its denominator, so far. Sigmoid: the loss itself, so far.
        total_B = answer_logit_B if bias is None else -F.logsigmoid(answer_logit_B)
        of_keys_G = total_B.clone() if both else None
        for columns in _tiles(len(key_GD), tile):
            logits_BT = _logits(scaled_BD, key_GD, bias, answer_B, same_B, same_G, ranks, columns)
            total_B = _joined(total_B, logits_BT, 1, bias)
            if of_keys_G is not None:
                of_keys_G[columns] = _joined(of_keys_G[columns], logits_BT, 0, bias)
        ctx.save_for_backward(
            query_BD, key_GD, scale, bias, answer_B, same_B, same_G, answer_logit_B, total_B, of_keys_G
        )
        if bias is not None:
            return total_B, of_keys_G
        return total_B - answer_logit_B, None if of_keys_G is None else of_keys_G - answer_logit_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_B: Tensor, grad_of_keys_G: Tensor | None) -> tuple[Tensor | None, ...]:
        query_BD, key_GD, scale, bias, answer_B, same_B, same_G, answer_logit_B, total_B, of_keys_G = ctx.saved_tensors
        scaled_BD = query_BD * scale
        # Gradients with respect to the logits: softmax minus one-hot, or the sigmoid's.
        answer_grad_B = _answer_grad(answer_logit_B, total_B, bias) * grad_B
        if grad_of_keys_G is not None:
            answer_grad_B = answer_grad_B + _answer_grad(answer_logit_B, of_keys_G, bias) * grad_of_keys_G
        grad_query_BD = answer_grad_B[:, None] * key_GD[answer_B]
        grad_key_GD = torch.zeros_like(key_GD).index_add_(0, answer_B, answer_grad_B[:, None] * query_BD)
        grad_bias = answer_grad_B.sum()
        for columns in _tiles(len(key_GD), ctx.tile):
            logits_BT = _logits(scaled_BD, key_GD, bias, answer_B, same_B, same_G, ctx.ranks, columns)
            grad_BT = _negative_grad(logits_BT, total_B[:, None], bias).mul_(grad_B[:, None])
            if grad_of_keys_G is not None:
                grad_BT += _negative_grad(logits_BT, of_keys_G[columns], bias).mul_(grad_of_keys_G[columns])
            grad_query_BD.addmm_(grad_BT, key_GD[columns])
            if bias is not None:
                grad_bias = grad_bias + grad_BT.sum()
            if ctx.ranks.scope == "local_gradient":
                grad_BT.masked_fill_(ctx.ranks.others(columns), 0.0)
            grad_key_GD[columns].addmm_(grad_BT.T, query_BD)
        grad_scale = (grad_query_BD * query_BD).sum().view_as(scale)
        grad_query_BD, grad_key_GD = grad_query_BD.mul_(scale), grad_key_GD.mul_(scale)
        of_bias = None if bias is None else grad_bias.view_as(bias)
        return grad_query_BD, grad_key_GD, grad_scale, of_bias, *(None,) * 6


def _joined(total: Tensor, logits_BT: Tensor, dim: int, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.logaddexp(total, logits_BT.logsumexp(dim))
    return total - F.logsigmoid(-logits_BT).sum(dim)


def _answer_grad(answer_logit_B: Tensor, total_B: Tensor, bias: Tensor | None) -> Tensor:
    return torch.expm1(answer_logit_B - total_B) if bias is None else -torch.sigmoid(-answer_logit_B)


def _negative_grad(logits_BT: Tensor, total: Tensor, bias: Tensor | None) -> Tensor:
    return (logits_BT - total).exp_() if bias is None else logits_BT.sigmoid()


def _tiles(num_columns: int, tile: int) -> list[slice]:
    return [slice(first, first + tile) for first in range(0, num_columns, tile)]


def _logits(
    scaled_BD: Tensor,
    key_GD: Tensor,
    bias: Tensor | None,
    answer_B: Tensor,
    same_B: Tensor,
    same_G: Tensor,
    ranks: _Ranks,
    columns: slice,
) -> Tensor:
    """[B, T], minus infinity at the answer, at what shows the same concept, and beyond the scope."""
    logits_BT = scaled_BD @ key_GD[columns].T
    if bias is not None:
        logits_BT.add_(bias)
    left_out_BT = same_B[:, None] == same_G[None, columns]
    if ranks.scope == "local":
        left_out_BT |= ranks.others(columns)
    place_B = answer_B - columns.start
    inside_B = (place_B >= 0) & (place_B < logits_BT.shape[1])
    nearest_B1 = place_B.clamp(0, logits_BT.shape[1] - 1)[:, None]
    left_out_BT.scatter_(1, nearest_B1, left_out_BT.gather(1, nearest_B1) | inside_B[:, None])
    return logits_BT.masked_fill_(left_out_BT, float("-inf"))
