"""How sure COCO's average precision is: its interval by drawing the pictures again with replacement.

The figure itself is faster-coco-eval's. To draw pictures a thousand times, what was found of each class is matched with
the true boxes once; a draw then only weighs each picture by how often it came. Weighed by ones it is the same figure.

D candidates of a class in all pictures, the surest first, G true boxes of a class in a picture, N pictures,
T thresholds of overlap, P candidates that are right by one, R draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from trivium.data.detection import DetectionRows
from trivium.evaluate.results import LEVEL, REPLICATES
from trivium.models.encoded import Objects

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)  # at which precision is read
MOST = 100  # candidates of a class that count in a picture
NAMES = ("ap", "ap50", "ap75")
AT_ONCE = 50  # draws that are computed together, in memory
Interval = tuple[float, float]


@dataclass(frozen=True)
class OfClass:
    """What was found of one class."""

    picture_D: np.ndarray  # int64, which of the pictures
    right_TD: np.ndarray  # bool, it covers a true box
    on_crowd_TD: np.ndarray | None  # bool, it fell on a crowd and counts neither way; None: nowhere
    true_N: np.ndarray  # true boxes in each picture


def intervals(rows: DetectionRows, found: dict[int, Objects]) -> dict[str, Interval]:
    """The 95 % percentile interval of each of NAMES; none where there is no true box."""
    matched = of_classes(rows, found)
    if not matched:
        return {}
    draw, num = np.random.default_rng(0), len(found)
    drawn = (np.bincount(draw.integers(num, size=num), minlength=num).astype(np.float64) for _ in range(REPLICATES))
    parts = [precision(matched, np.stack([*islice(drawn, AT_ONCE)])) for _ in range(-(-REPLICATES // AT_ONCE))]
    values = np.concatenate(parts)
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: (float(low[n]), float(high[n])) for n, name in enumerate(NAMES)}


def precision(matched: list[OfClass], weight_RN: np.ndarray) -> np.ndarray:
    """The figures of NAMES by each draw, [R, 3], each class counting the same; not a number where no picture drawn has
    a true box."""
    sum_RT, classes_R1 = np.zeros((len(weight_RN), len(THRESHOLDS))), np.zeros((len(weight_RN), 1))
    for each in matched:
        num_R = weight_RN @ each.true_N
        has_R = num_R > 0
        sum_RT[has_R] += _of_one(each, weight_RN[has_R], num_R[has_R])
        classes_R1[has_R] += 1
    mean_RT = np.divide(sum_RT, classes_R1, out=np.full_like(sum_RT, np.nan), where=classes_R1 > 0)
    return np.stack([mean_RT.mean(1), mean_RT[:, 0], mean_RT[:, 5]], axis=1)


def _of_one(each: OfClass, weight_RN: np.ndarray, num_R: np.ndarray) -> np.ndarray:
    """Of one class by draw and threshold: precision, nowhere below that at a higher recall, averaged over RECALLS."""
    weight_RD = weight_RN[:, each.picture_D]
    so_far_RD = weight_RD.cumsum(1)
    result_RT = np.zeros((len(weight_RN), len(THRESHOLDS)))
    for t, right_D in enumerate(each.right_TD):
        # Precision is highest where a candidate is right, so nothing is read elsewhere.
        places_P = right_D.nonzero()[0]
        counted_RP = so_far_RD[:, places_P]
        if each.on_crowd_TD is not None:
            counted_RP = counted_RP - (weight_RD * each.on_crowd_TD[t]).cumsum(1)[:, places_P]
        right_RP = weight_RD[:, places_P].cumsum(1)
        best_RP = np.maximum.accumulate((right_RP / np.maximum(counted_RP, 1e-9))[:, ::-1], axis=1)[:, ::-1]
        passed_RP = np.searchsorted(RECALLS, right_RP / num_R[:, None], side="right")  # recalls that are reached there
        result_RT[:, t] = (best_RP * np.diff(passed_RP, axis=1, prepend=0)).sum(1) / len(RECALLS)
    return result_RT


def of_classes(rows: DetectionRows, found: dict[int, Objects]) -> list[OfClass]:
    """What was found of each class that has a true box, matched picture by picture."""
    order = sorted(found)
    true_of: dict[int, np.ndarray] = {}
    for place, row in enumerate(order):
        here = rows.of(row)
        for number in rows.classes_M[here][~rows.crowd_M[here]].tolist():
            true_of.setdefault(number, np.zeros(len(order)))[place] += 1
    parts: dict[int, list[tuple[np.ndarray, ...]]] = {number: [] for number in true_of}
    for place, row in enumerate(order):
        here = rows.of(row)
        for number, (score_D, box_D4) in _by_class(found[row]).items():
            if number in parts:
                mine_G = rows.classes_M[here] == number
                right_TD, on_crowd_TD = cover(box_D4, rows.boxes_M4[here][mine_G], rows.crowd_M[here][mine_G])
                parts[number].append((score_D, np.full(len(score_D), place), right_TD, on_crowd_TD))
    nothing = (np.zeros(0), np.zeros(0, np.int64), *np.zeros((2, len(THRESHOLDS), 0), bool))
    matched = []
    for number, true_N in sorted(true_of.items()):
        scores, *columns = (np.concatenate(each, axis=-1) for each in zip(*(parts[number] or [nothing]), strict=True))
        surest = np.argsort(-scores, kind="stable")
        picture_D, right_TD, on_crowd_TD = (each[..., surest] for each in columns)
        matched.append(OfClass(picture_D, right_TD, on_crowd_TD if on_crowd_TD.any() else None, true_N))
    return matched


def _by_class(objects: Objects) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Of one picture by class: scores and boxes (left, top, right, bottom), the surest first."""
    scores_Q, labels_Q = objects.scores_Q.numpy().astype(np.float64), objects.labels_Q.numpy()
    boxes_Q4 = objects.boxes_Q4.numpy().astype(np.float64)
    order = np.argsort(-scores_Q, kind="stable")
    by_class = {}
    for number in np.unique(labels_Q):
        chosen = order[labels_Q[order] == number][:MOST]
        by_class[int(number)] = scores_Q[chosen], boxes_Q4[chosen]
    return by_class


def cover(box_D4: np.ndarray, true_G4: np.ndarray, crowd_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates of a picture are right by each threshold, and which fall on a crowd, [T, D] each: in order, each
    takes the true box that it covers best of those that none before it took.

    box_D4: (left, top, right, bottom), the surest first. true_G4: (left, top, width, height).
    """
    right_TD, on_crowd_TD = (np.zeros((len(THRESHOLDS), len(box_D4)), bool) for _ in range(2))
    if not len(true_G4):
        return right_TD, on_crowd_TD
    end_G2 = true_G4[:, :2] + true_G4[:, 2:]
    sides_DG2 = np.minimum(box_D4[:, None, 2:], end_G2) - np.maximum(box_D4[:, None, :2], true_G4[:, :2])
    both_DG = sides_DG2.clip(min=0).prod(2)
    area_D = (box_D4[:, 2:] - box_D4[:, :2]).prod(1)
    # Of a crowd it counts how much of the candidate lies in it.
    union_DG = np.where(crowd_G, area_D[:, None], area_D[:, None] + true_G4[:, 2:].prod(1) - both_DG)
    overlap_DG = both_DG / np.maximum(union_DG, 1e-9)
    reaching = (overlap_DG.max(1) >= THRESHOLDS[0]).nonzero()[0]
    for t, threshold in enumerate(THRESHOLDS):
        free_G = ~crowd_G
        for d in reaching:
            open_G = np.where(free_G, overlap_DG[d], -1.0)
            best = int(open_G.argmax())
            if open_G[best] >= threshold:
                right_TD[t, d] = True
                free_G[best] = False
            else:
                on_crowd_TD[t, d] = bool((overlap_DG[d][crowd_G] >= threshold).any())
    return right_TD, on_crowd_TD
