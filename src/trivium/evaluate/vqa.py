"""VQA accuracy (Antol et al. 2015, section 3; the form of VQAv2): how far an answer agrees with those of ten people."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.data.answers import agreement, normalized, trimmed


def accuracy(answer: str, truths: Sequence[str]) -> float:
    """In [0, 1]: mean over leaving one annotator out of min(1, others that say the same / 3).

    Answers are compared in their normal form, unless all annotators wrote the same: then as they stand, so that "Yes"
    is not "yes".
    """
    assert truths, "a question without answers has no accuracy"
    answer, given = trimmed(answer), [trimmed(truth) for truth in truths]
    if len(set(given)) > 1:
        answer, given = normalized(answer), [normalized(truth) for truth in given]
    return agreement(given.count(answer), len(given))


def exact(answer: str, truth: str) -> float:
    """1 or 0, of data with one answer to a question: whether it is that one, in normal form."""
    return float(normalized(answer) == normalized(truth))


def score(answer: str, truths: Sequence[str]) -> float:
    """`exact` where one person answered, `accuracy` where several did."""
    return exact(answer, truths[0]) if len(truths) == 1 else accuracy(answer, truths)
