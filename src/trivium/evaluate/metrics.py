"""Metrics of classification and regression, each over N samples, with bootstrap intervals.

scikit-learn and scipy have no number, or only a warning, where a prediction or a label is constant: a Matthews or
rank correlation over nothing that varies, an F1 without a single positive. Here it is 0, since a constant tells nothing
apart, so that a run that collapsed can still be compared with others.

N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

from trivium.evaluate import matching
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.results import Result, bootstrap, mean_of

Metric = Callable[[np.ndarray, np.ndarray], float]  # answers [N] and truths [N] -> a number, the higher the better


def accuracy(answers_N: np.ndarray, truths_N: np.ndarray) -> float:
    """Share of equal labels."""
    return float((answers_N == truths_N).mean())


def f1(answers_N: np.ndarray, truths_N: np.ndarray) -> float:
    """Of class 1: 2 TP / (2 TP + FP + FN)."""
    positive, true = answers_N == 1, truths_N == 1
    denominator = int(positive.sum() + true.sum())
    return 2 * int((positive & true).sum()) / denominator if denominator else 0.0


def accuracy_and_f1(answers_N: np.ndarray, truths_N: np.ndarray) -> float:
    """Their mean: what the FLAVA paper reports for MRPC and QQP."""
    return (accuracy(answers_N, truths_N) + f1(answers_N, truths_N)) / 2


def macro_f1(answers_N: np.ndarray, truths_N: np.ndarray) -> float:
    """Mean of F1 over the classes that are answered or true: each counts alike, however rare."""
    classes = np.union1d(answers_N, truths_N)
    answer_KN, truth_KN = (classes[:, None] == labels_N for labels_N in (answers_N, truths_N))
    return float((2 * (answer_KN & truth_KN).sum(1) / (answer_KN.sum(1) + truth_KN.sum(1))).mean())


def matthews(answers_N: np.ndarray, truths_N: np.ndarray) -> float:
    """Matthews' correlation of two labellings, of any number of classes (Gorodkin 2004)."""
    classes = np.union1d(answers_N, truths_N)
    if len(classes) < 2:
        return 0.0
    answer_KN, truth_KN = (classes[:, None] == labels_N for labels_N in (answers_N, truths_N))
    answer_K, truth_K = answer_KN.sum(1).astype(float), truth_KN.sum(1).astype(float)
    num, right = len(answers_N), int((answers_N == truths_N).sum())
    spread = (num**2 - answer_K @ answer_K) * (num**2 - truth_K @ truth_K)
    return float((right * num - answer_K @ truth_K) / math.sqrt(spread)) if spread > 0 else 0.0


def pearson(answers_N: np.ndarray, truths_N: np.ndarray) -> float:
    """Linear correlation."""
    answers_N, truths_N = answers_N.astype(np.float64), truths_N.astype(np.float64)
    if np.ptp(answers_N) == 0 or np.ptp(truths_N) == 0:  # the mean of a constant may differ from it in the last bit
        return 0.0
    one_N, other_N = answers_N - answers_N.mean(), truths_N - truths_N.mean()
    one_N, other_N = one_N / np.linalg.norm(one_N), other_N / np.linalg.norm(other_N)
    return float(np.clip(one_N @ other_N, -1.0, 1.0))


def spearman(answers_N: np.ndarray, truths_N: np.ndarray) -> float:
    """Linear correlation of the ranks; equal values share the mean of theirs."""
    return pearson(rankdata(answers_N), rankdata(truths_N))


def auroc(scores_N: np.ndarray, truths_N: np.ndarray) -> float:
    """Chance that a sample of class 1 scores above one of class 0, an equal one half; other samples count nothing."""
    true, false = scores_N[truths_N == 1], scores_N[truths_N == 0]
    return matching.auroc(true, false) if len(true) and len(false) else 0.5


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "accuracy_and_f1": accuracy_and_f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "auroc": auroc,
}


def measured(
    name: str,
    answers_N: np.ndarray,
    truths_N: np.ndarray,
    units: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
) -> Result:
    """One of METRICS with its 95 % interval. units: the name of each sample. groups: samples of one are drawn together,
    such as those about one picture."""
    if name == "accuracy":
        return mean_of((answers_N == truths_N).astype(float), units, groups)
    metric = METRICS[name]
    kept = None
    if name == "matthews" and units is not None:
        both = np.stack([answers_N, truths_N], axis=1).astype(np.float32)
        kept = Outcomes("matthews", tuple(units), both, None if groups is None else tuple(groups))
    low, high = bootstrap(lambda drawn: metric(answers_N[drawn], truths_N[drawn]), len(truths_N), groups)
    return Result(metric(answers_N, truths_N), low, high, len(truths_N), outcomes=kept)
