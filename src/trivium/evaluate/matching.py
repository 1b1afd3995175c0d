"""Image-text matching: does the model tell a true pair from a false one?

The head learned from pairs of which a share s was false, so its log-odds hold the prior of training:

    log p(true | pair) / p(false | pair) = log p(pair | true) / p(pair | false) + log (1 - s) / s

On balanced pairs the last term is zero, so it is taken off before the answer is read; the order of the pairs, and
with it AUROC, does not change. N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from trivium.bundle import Bundle
from trivium.bundle.pictures import Pictures
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.results import Result, Results, bootstrap, mean_of

BATCH = 256


@torch.inference_mode()
def scores(
    bundle: Bundle, pictures: Pictures, own: Sequence[str], others: Sequence[str], false_share: float
) -> tuple[Tensor, Tensor]:
    """Log-odds [N] of each picture with its own text and with another's, of a model that matches.

    Args:
        pictures: several, as `Bundle.encode_image` takes them.
        false_share: share of false pairs in training; outside (0, 1) taken as a half.
    """
    model: Any = bundle.model
    share = false_share if 0 < false_share < 1 else 0.5
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, len(own), BATCH):
        rows = slice(first, first + BATCH)
        image = bundle.encode_image(pictures[rows])  # type: ignore[index]
        for scored, texts in zip(found, (own[rows], others[rows]), strict=True):
            fused = model.fuse(image, bundle.encode_text(list(texts)), rows=1)
            scored.append(log_odds(model.match(fused).float().cpu(), share))
    return torch.cat(found[0]), torch.cat(found[1])


def log_odds(logits_N2: Tensor, false_share: float) -> Tensor:
    """Log-odds of "belong together" (class 1) at equal priors, [N].

    Args:
        false_share: share of false pairs in training, inside (0, 1).
    """
    assert 0 < false_share < 1, f"a share of false pairs lies between 0 and 1, not {false_share}"
    return logits_N2[:, 1] - logits_N2[:, 0] - math.log((1 - false_share) / false_share)


def auroc(true_scores: np.ndarray, false_scores: np.ndarray) -> float:
    """Chance that a true pair scores above a false one; an equal score counts half (Mann-Whitney)."""
    rank = rankdata(np.concatenate([true_scores, false_scores]))
    num_true, num_false = len(true_scores), len(false_scores)
    return float((rank[:num_true].sum() - num_true * (num_true + 1) / 2) / (num_true * num_false))


def balanced(true_N: Tensor, false_N: Tensor, pictures: Sequence[str] | None = None) -> Results:
    """`accuracy` and `auroc` of N pictures, each once with its own text and once with another.

    Args:
        true_N, false_N: log-odds of the two pairs of each picture. Exactly 0 is no answer and counts as wrong.
        pictures: the name of each, kept with its outcome.
    """
    true, false = true_N.double().numpy(), false_N.double().numpy()
    accuracy = mean_of(((true > 0).astype(float) + (false < 0)) / 2, pictures)
    # A picture is the unit that is drawn again: its two pairs are not independent.
    low, high = bootstrap(lambda drawn: auroc(true[drawn], false[drawn]), len(true))
    pairs = 2 * len(true)
    scores = None if pictures is None else Outcomes("auroc", tuple(pictures), np.stack([true, false], axis=1))
    return {
        "accuracy": replace(accuracy, n=pairs),
        "auroc": Result(auroc(true, false), low, high, pairs, outcomes=scores),
    }
