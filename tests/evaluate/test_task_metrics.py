"""Metrics of tasks against scikit-learn and scipy, on the cases that go wrong: ties, constants, empty classes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, roc_auc_score

from trivium.data.labelled import Row
from trivium.evaluate import metrics, tasks
from trivium.evaluate.results import mean_of
from trivium.evaluate.vqa import accuracy as vqa_accuracy

LABELS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)
NUMBERS = st.lists(
    st.tuples(*[st.sampled_from([-1.0, 0.0, 0.1, 0.1, 0.3, 2.5, 1e8, 1e8 + 1])] * 2), min_size=2, max_size=30
)


def columns(rows: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(rows)
    return table[:, 0], table[:, 1]


@given(LABELS)
@settings(deadline=None)
def test_metrics_of_labels_are_those_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    answers, truths = columns(rows)
    assert metrics.accuracy(answers, truths) == pytest.approx(accuracy_score(truths, answers), abs=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert metrics.matthews(answers, truths) == pytest.approx(matthews_corrcoef(truths, answers), abs=1e-9)
    macro = f1_score(truths, answers, average="macro", zero_division=0)
    assert metrics.macro_f1(answers, truths) == pytest.approx(macro, abs=1e-12)
    answers, truths = answers % 2, truths % 2
    theirs = f1_score(truths, answers, zero_division=0)
    assert metrics.f1(answers, truths) == pytest.approx(theirs, abs=1e-12)
    both = (theirs + accuracy_score(truths, answers)) / 2
    assert metrics.accuracy_and_f1(answers, truths) == pytest.approx(both, abs=1e-12)
    if len(set(truths.tolist())) == 2:
        assert metrics.auroc(answers, truths) == pytest.approx(roc_auc_score(truths, answers), abs=1e-12)


@given(NUMBERS)
@settings(deadline=None)
def test_correlations_are_those_of_scipy(rows: list[tuple[float, float]]) -> None:
    answers, truths = columns(rows)
    constant = np.ptp(answers) == 0 or np.ptp(truths) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mine, theirs in ((metrics.pearson, pearsonr), (metrics.spearman, spearmanr)):
            expected = 0.0 if constant else float(theirs(answers, truths)[0])
            assert mine(answers, truths) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_model_that_always_says_the_same_gets_a_number(name: str) -> None:
    truths = np.array([0, 1, 1, 0, 1])
    for constant in (0.0, 1.0, 0.3):
        value = metrics.METRICS[name](np.full(5, constant), truths)
        assert np.isfinite(value)
        if name in ("matthews", "pearson", "spearman"):
            assert value == 0
        if name == "auroc":
            assert value == 0.5
        result = metrics.measured(name, np.full(5, constant), truths)
        assert result.low is not None
        assert result.high is not None
        assert result.low <= result.value <= result.high


def test_a_constant_that_is_no_binary_fraction_is_still_constant() -> None:
    answers, truths = np.full(7, 0.1, dtype=np.float32) * np.float32(3), np.arange(7.0)
    assert metrics.pearson(answers, truths) == 0


def test_an_interval_holds_the_value_and_narrows_with_more_samples() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for num in (50, 5000):
        truths = rng.integers(2, size=num)
        answers = np.where(rng.random(num) < 0.8, truths, 1 - truths)
        found = metrics.measured("matthews", answers, truths)
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value < found.high
        assert found.n == num
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 5


def test_the_commonest_answer_is_one_that_can_be_given() -> None:
    def found(*truths: str) -> tasks.Predictions:
        rows = [Row("vqa.json", f"entry {n}", str(n), answers={}, truths=(each,)) for n, each in enumerate(truths)]
        nothing = np.zeros(len(rows))
        return tasks.Predictions(rows, nothing.astype(int), nothing, nothing, ("Two", "red"), [])

    assert tasks.chance("accuracy", found("zebra", "zebra", "red", "two", "2")) == 0.4
    assert tasks.chance("accuracy", found("zebra")) is None


def test_statements_on_one_pair_of_pictures_are_drawn_together() -> None:
    """Four to a pair, all right or all wrong, and two pairs that share their left picture."""
    rows = [
        Row("dev.json", f"line {n}", str(n), "it is so", image=f"{n // 8}-left.png", second_image=f"{n // 4}-right.png",
            label=n // 4 % 2)
        for n in range(400)
    ]  # fmt: skip
    always_true = np.ones(400, dtype=np.int64)
    said = tasks.Predictions(rows, always_true, np.ones(400), np.ones(400), ("False", "True"), [])
    found = tasks.result("accuracy", said)
    alone = mean_of(np.array([row.label == 1 for row in rows]))
    assert found.value == alone.value == 0.5
    assert found.outcomes is not None and found.outcomes.groups is not None and len(set(found.outcomes.groups)) == 100
    assert None not in (found.low, found.high, alone.low, alone.high)
    assert found.high - found.low == pytest.approx(2 * (alone.high - alone.low), rel=0.2)  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------ VQA accuracy


def official(answer: str, truths: list[str]) -> float:
    """The sum as it is written down by the data set's authors: one annotator left out at a time."""
    total = 0.0
    for left_out in range(len(truths)):
        others = [truth for number, truth in enumerate(truths) if number != left_out]
        total += min(1.0, others.count(answer) / 3)
    return total / len(truths)


@pytest.mark.parametrize(("matching", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_of_ten_people_four_make_an_answer_right(matching: int, score: float) -> None:
    truths = ["red"] * matching + [f"blue {number}" for number in range(10 - matching)]
    assert vqa_accuracy("red", truths) == pytest.approx(score, abs=1e-12)
    assert vqa_accuracy("red", truths) == pytest.approx(official("red", truths), abs=1e-12)


@given(st.lists(st.sampled_from(["cat", "dog", "bird"]), min_size=1, max_size=12))
def test_any_number_of_people_is_scored_by_leaving_one_out(truths: list[str]) -> None:
    assert vqa_accuracy("cat", truths) == pytest.approx(official("cat", truths), abs=1e-12)


def test_answers_are_normalised_only_where_people_differ() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("the two dogs", ["2 dogs"] * 5 + ["dogs"] * 5) == 1
