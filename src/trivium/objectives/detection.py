"""DETR's set loss (Carion et al., ECCV 2020, section 3.1), which UniT takes over, and UniT's loss of attributes.

Each object of a picture is given to one query, so that the sum of what this costs is least (Hungarian matching); the
query is to tell its class and its box, all others "no object". Every decoder layer is matched and judged by itself.
Each loss is a sum over layers and pictures; what it is divided by, `counts` says from labels alone.

Boxes are (centre x, centre y, width, height) as shares of the picture, unless a name says corners: (left, top, right,
bottom).

L decoder layers, B rows, Q queries, K classes of which the last is "no object", M objects of all rows, P matched pairs
of all layers, A attributes of one object at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from trivium.errors import TriviumError

CLASS_COST, BOX_COST, GIOU_COST = 1.0, 5.0, 2.0  # of matching; the published weights of class, box and GIoU loss too
NO_OBJECT = 0.1  # weight of a query that is to find nothing
ATTRIBUTE = 0.5  # within the loss of attributes, as published; its weight beside the others is 1
UNUSABLE = 1e6  # what it costs to match where the model gives no number


@dataclass(frozen=True)
class Objects:
    """What there is to find, flat: all objects of row 0, then of row 1, and so on. `row_M` stays on CPU."""

    row_M: Tensor  # int64, ascending
    label_M: Tensor  # int64
    box_M4: Tensor
    attributes_MA: Tensor | None = None  # int64, -1 where there is none

    def check(self, rows: int, num_labels: int, where: str) -> None:
        """Refuse what no loss is defined for. On CPU, where they enter.

        Raises:
            TriviumError: a box that is not finite, has no area, or lies outside of its picture; a class that is none.
        """
        assert len(self.row_M) == len(self.label_M) == len(self.box_M4), "as many rows, labels and boxes"
        if not len(self.row_M):
            return
        assert bool((self.row_M.diff() >= 0).all()), "objects stand in the order of their rows"
        assert 0 <= int(self.row_M.min()) <= int(self.row_M.max()) < rows, f"objects of {rows} rows"
        corner_M4 = corners(self.box_M4)
        slack = 1e-3  # of a whole picture: boxes are rounded to its pixels
        reasons = (
            (~self.box_M4.isfinite().all(1), "a box that is no number"),
            ((self.box_M4[:, 2:] <= 0).any(1), "a box without area"),
            (((corner_M4 < -slack) | (corner_M4 > 1 + slack)).any(1), "a box that reaches out of its picture"),
            ((self.label_M < 0) | (self.label_M >= num_labels), f"a class that is none of {num_labels}"),
        )
        for wrong_M, what in reasons:
            if bool(wrong_M.any()):
                number = int(wrong_M.nonzero()[0, 0])
                raise TriviumError(
                    f"{where}: picture {int(self.row_M[number])} of the batch has {what}"
                    f" (class {int(self.label_M[number])}, box {[round(x, 4) for x in self.box_M4[number].tolist()]} as"
                    " shares of the picture): correct its annotation or leave it out"
                )

    def to(self, device: torch.device) -> Objects:
        attributes = None if self.attributes_MA is None else self.attributes_MA.to(device, non_blocking=True)
        label_M, box_M4 = (t.to(device, non_blocking=True) for t in (self.label_M, self.box_M4))
        return Objects(self.row_M, label_M, box_M4, attributes)


@dataclass(frozen=True)
class Matches:
    """Which query of which layer and row is to find which object. int64 each; objects that are more than queries are
    in none."""

    layer_P: Tensor
    row_P: Tensor
    query_P: Tensor
    object_P: Tensor

    def of(self, x_LBQX: Tensor) -> Tensor:
        """[P, X]: what the matched queries have there."""
        return x_LBQX[self.layer_P, self.row_P, self.query_P]


def counts(objects: Objects, rows: int, num_queries: int) -> dict[str, Tensor]:
    """What each loss is divided by: "class" by the weights of all queries, "box" and "giou" by the objects,
    "attributes" by the objects that have some."""
    of_row_B = torch.bincount(objects.row_M, minlength=rows).double()
    found_B = of_row_B.clamp(max=num_queries)
    number = of_row_B.sum()
    result = {
        "class": (found_B + NO_OBJECT * (num_queries - found_B)).sum(),
        "box": number,
        "giou": number,
    }
    if objects.attributes_MA is not None:
        result["attributes"] = (objects.attributes_MA >= 0).any(1).sum()
    return result


@torch.no_grad()
def match(logits_LBQK: Tensor, boxes_LBQ4: Tensor, objects: Objects) -> Matches:
    """The least sum of -p(class) + 5 L1 - 2 GIoU over one-to-one pairs, in each layer and row (section 3.1, eq. 1).

    One transfer to the host for everything, and one back.
    """
    device = logits_LBQK.device
    L, B = logits_LBQK.shape[:2]
    row_M = objects.row_M.to(device, non_blocking=True)
    chance_LBQK = _wide(logits_LBQK).softmax(-1)
    # Each object against the queries of its own row alone, [L, M, Q].
    class_LMQ = chance_LBQK[:, row_M, :, objects.label_M].transpose(0, 1)
    seen_LMQ4, true_M14 = _wide(boxes_LBQ4)[:, row_M], objects.box_M4[:, None].to(_wide(boxes_LBQ4).dtype)
    box_LMQ = (seen_LMQ4 - true_M14).abs().sum(-1)
    giou_LMQ = giou(corners(seen_LMQ4), corners(true_M14))
    cost_LMQ = BOX_COST * box_LMQ - CLASS_COST * class_LMQ - GIOU_COST * giou_LMQ
    # A model that gives no numbers is the trainer's to tell: its loss is no number either.
    costs = cost_LMQ.nan_to_num(UNUSABLE, UNUSABLE, -UNUSABLE).cpu().numpy()
    borders = np.searchsorted(objects.row_M.numpy(), np.arange(B + 1))
    found = [np.zeros((4, 0), np.int64)]
    for layer in range(L):
        for row in range(B):
            first, end = borders[row], borders[row + 1]
            if first < end:
                number, query = linear_sum_assignment(costs[layer, first:end])
                found.append(np.stack([np.full_like(query, layer), np.full_like(query, row), query, first + number]))
    return Matches(*torch.from_numpy(np.concatenate(found, axis=1)).to(device, non_blocking=True))


def class_loss(logits_LBQK: Tensor, matches: Matches, label_M: Tensor) -> Tensor:
    """Cross-entropy of every query, those that are to find nothing with a weight of 0.1."""
    L, B, Q, K = logits_LBQK.shape
    wanted_LBQ = torch.full((L, B, Q), K - 1, device=logits_LBQK.device)
    wanted_LBQ[matches.layer_P, matches.row_P, matches.query_P] = label_M[matches.object_P]
    weight_K = torch.ones(K, dtype=_wide(logits_LBQK).dtype, device=logits_LBQK.device)
    weight_K[-1] = NO_OBJECT
    return F.cross_entropy(_wide(logits_LBQK).flatten(0, 2), wanted_LBQ.flatten(), weight_K, reduction="sum")


def box_losses(boxes_LBQ4: Tensor, matches: Matches, box_M4: Tensor) -> tuple[Tensor, Tensor]:
    """Of matched pairs the sum of |differences| over the four numbers, and the sum of 1 - GIoU."""
    seen_P4 = _wide(matches.of(boxes_LBQ4))
    true_P4 = box_M4[matches.object_P].to(seen_P4.dtype)
    return (seen_P4 - true_P4).abs().sum(), (1 - giou(corners(seen_P4), corners(true_P4))).sum()


def attribute_loss(logits_PK: Tensor, attributes_PA: Tensor) -> Tensor:
    """Half of the mean cross-entropy over an object's attributes, summed over objects; one without any counts nothing.

    attributes_PA: int64, -1 where there is none.
    """
    present_PA = attributes_PA >= 0
    log_PK = _wide(logits_PK).log_softmax(-1)
    chosen_PA = log_PK.gather(1, attributes_PA.clamp(min=0)) * present_PA
    return -ATTRIBUTE * (chosen_PA.sum(1) / present_PA.sum(1).clamp(min=1)).sum()


def corners(box_X4: Tensor) -> Tensor:
    """(centre x, centre y, width, height) -> (left, top, right, bottom)."""
    centre_X2, size_X2 = box_X4[..., :2], box_X4[..., 2:]
    return torch.cat([centre_X2 - size_X2 / 2, centre_X2 + size_X2 / 2], dim=-1)


def giou(a_X4: Tensor, b_X4: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al., CVPR 2019) of boxes given by their corners, which
    broadcast. One of the two must have an area."""
    a_area, b_area = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a_X4, b_X4))
    inner = (torch.minimum(a_X4[..., 2:], b_X4[..., 2:]) - torch.maximum(a_X4[..., :2], b_X4[..., :2])).clamp(min=0)
    outer = torch.maximum(a_X4[..., 2:], b_X4[..., 2:]) - torch.minimum(a_X4[..., :2], b_X4[..., :2])
    shared, hull = inner.prod(-1), outer.prod(-1)
    union = a_area + b_area - shared
    return shared / union - (hull - union) / hull


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
