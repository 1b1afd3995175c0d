"""Outcomes on disk, and the paired bootstrap that they are kept for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from trivium.errors import TriviumError
from trivium.evaluate import matching, outcomes, results
from trivium.evaluate.compare import Side, compare, difference, render, shown
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.results import Result, mean_of, median_of


def side(name: str, found: dict[str, Result], **more: object) -> Side:
    kept = {figure: result.outcomes for figure, result in found.items() if result.outcomes is not None}
    return Side(name, results=found, outcomes=kept, **more)  # type: ignore[arg-type]


def names(number: int) -> list[str]:
    return [f"query {row}" for row in range(number)]


def two_models(rng: np.random.Generator, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Hits on 400 queries, of which most are easy or hard for both; the second model does better by `gain`."""
    easy = rng.choice([0.02, 0.98], size=400)
    return rng.random(400) < easy, rng.random(400) < np.clip(easy + gain, 0, 1)


def test_pairing_tells_apart_what_two_intervals_do_not() -> None:
    left, right = two_models(np.random.default_rng(0), gain=0.06)
    found = difference(
        "r1", side("a", {"r1": mean_of(left, names(400))}), side("b", {"r1": mean_of(right, names(400))})
    )
    assert found.left.high > found.right.low  # type: ignore[operator]
    assert found.low is not None
    assert 0 < found.low < found.value < found.high  # type: ignore[operator]
    assert found.verdict == "better"
    assert found.pairs == 400


def test_two_models_that_are_alike_are_seldom_told_apart() -> None:
    rng = np.random.default_rng(1)
    verdicts = []
    for _ in range(40):
        left, right = two_models(rng, gain=0.0)
        sides = [side(name, {"r1": mean_of(hits, names(400))}) for name, hits in (("a", left), ("b", right))]
        verdicts.append(difference("r1", *sides).verdict)
    assert verdicts.count("") >= 34


def test_queries_are_paired_by_name_and_only_those_that_both_have() -> None:
    ranks = np.arange(1.0, 101.0)
    left = side("a", {"median_rank": median_of(ranks, names(100))})
    order = np.random.default_rng(0).permutation(80)  # another order, and 20 queries fewer
    right = side("b", {"median_rank": median_of(ranks[order] + 5, [names(100)[row] for row in order])})
    found = difference("median_rank", left, right)
    assert found.pairs == 80
    assert (found.low, found.high) == (5.0, 5.0)  # each query lost five places, whichever are drawn
    assert found.verdict == "worse"  # a lower rank is the better one
    assert difference("median_rank", right, left).verdict == "better"


def test_auroc_is_drawn_again_by_picture() -> None:
    rng = np.random.default_rng(0)
    true, false = rng.normal(1.0, 1.0, 300), rng.normal(0.0, 1.0, 300)

    def scored(shift: float) -> dict[str, Result]:
        return matching.balanced(torch.tensor(true + shift), torch.tensor(false), names(300))

    found = difference("auroc", side("a", scored(0.0)), side("b", scored(0.3)))
    assert found.value == pytest.approx(matching.auroc(true + 0.3, false) - matching.auroc(true, false), abs=1e-6)
    assert found.low is not None
    assert 0 < found.low < found.value
    assert found.left.n == 600


def test_outcomes_of_another_evaluation_are_not_used() -> None:
    hits = np.random.default_rng(0).random(50) < 0.5
    left = side("a", {"r1": mean_of(hits, names(50))})
    right = replace(side("b", {"r1": mean_of(hits, names(50))}), results={"r1": mean_of(~hits)})
    assert difference("r1", left, right).pairs is None


def test_what_is_missing_is_a_sentence() -> None:
    hits = np.ones(10)
    with_outcomes = side("a", {"r1": mean_of(hits, names(10))})
    without = side("b", {"r1": mean_of(hits)})
    found = compare(with_outcomes, without)
    assert [(each.low, each.pairs, each.verdict) for each in found.differences] == [(None, None, "")]
    assert found.summary() == [
        "b kept no outcomes of its queries, so both intervals stand where that of the difference would: trivium"
        " evaluate b writes outcomes.parquet."
    ]
    curves = {"itm": [(1, 0.5)]}
    found = compare(replace(with_outcomes, curves=curves), Side("b", curves=curves))
    assert found.summary() == ["b has no results yet: trivium evaluate b measures it."]
    other_queries = side("b", {"r1": mean_of(hits, [f"other {row}" for row in range(10)])})
    assert "measured on different queries" in compare(with_outcomes, other_queries).summary()[0]


def test_runs_without_anything_in_common_are_refused() -> None:
    left, right = side("a", {"retrieval.r1": Result(0.5)}), side("b", {"vqa.accuracy": Result(0.5)})
    with pytest.raises(TriviumError, match="a was measured in retrieval and b in vqa, so no figure is common"):
        compare(left, right)
    with pytest.raises(TriviumError, match="neither curves nor results in common"):
        compare(left, Side("b"))


def test_fields_that_differ_and_chances_that_do_not() -> None:
    found = {"losses.itm.final": Result(0.4), "losses.itm.chance": Result(0.5)}
    left = side("a", found, config={"optim.lr": 0.1, "train.seed": 0, "init": None})
    right = side("b", found, config={"optim.lr": 0.2, "train.seed": 0, "model.width": 8})
    both = compare(left, right)
    assert both.fields == [("optim.lr", "0.1", "0.2"), ("init", "None", "–"), ("model.width", "–", "8")]
    assert [each.name for each in both.differences] == ["losses.itm.final"]


def test_the_page_escapes_names_and_holds_both_curves() -> None:
    curves = {"itm": [(step, 1 / step) for step in range(1, 100)], "mine": [(1, float("nan"))]}
    name = "runs/<script>alert(1)</script>"
    left = side(name, {"r1": mean_of(np.ones(9), names(9))}, curves=curves)
    page = render(compare(left, side("b", {"r1": mean_of(np.zeros(9), names(9))}, curves={"itm": [(1, 0.5)]})))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "Training curves of the loss Matching (ITM)" in page
    assert page.count("<figure>") == 2
    assert "-100.0\N{NO-BREAK SPACE}%" in page
    assert 'class="worse"' in page


def test_how_a_figure_is_written() -> None:
    assert shown("retrieval.style.text_to_image_r10", 0.2214) == "22.1\N{NO-BREAK SPACE}%"
    assert shown("retrieval.style.text_to_image_median_rank", -12.5, sign=True) == "-12.5"
    assert shown("losses.itm.final", 0.41234, sign=True) == "+0.412"
    assert shown("losses.itm.final", float("nan")) == "–"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("reconstruction.psnr", 12.0, "12.00\N{NO-BREAK SPACE}dB"),
        ("reconstruction.gain", -0.5, "-0.50\N{NO-BREAK SPACE}dB"),
        ("codes.perplexity", 312.25, "312.2"),
        ("codes.perplexity_beyond_white", 1312.25, "1,312.2"),
        ("codes.used_beyond_white", 0.5, "50.0\N{NO-BREAK SPACE}%"),
        ("matthews", 0.5065, "0.506"),
        ("glue.cola", -0.01, "-0.010"),
        ("spearman.lowest", 0.8, "0.800"),
        ("cola.dev.matthews.majority", 0.0, "0.000"),
        ("accuracy.median", 0.8, "80.0\N{NO-BREAK SPACE}%"),
        ("retrieval.text_to_image_median_rank.highest", 12.5, "12.5"),
        ("updates.pairs", 12_000, "12,000"),
        ("attention.jaccard.all", 0.25, "25.0\N{NO-BREAK SPACE}%"),
        ("ap", 0.43, "43.0\N{NO-BREAK SPACE}%"),
    ],
)
def test_each_figure_has_its_unit(name: str, value: float, told: str) -> None:
    assert shown(name, value) == told


def test_outcomes_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    scores = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    found = {
        "r1": mean_of(np.arange(40) % 3 == 0, names(40)),
        "median_rank": median_of(np.arange(40.0), names(40), [f"picture {n // 5}" for n in range(40)]),
        "auroc": Result(0.5, outcomes=Outcomes("auroc", tuple(names(40)), scores)),
        "losses.itm.final": Result(0.1),
    }
    results.write(path, found, command="", version="0", machine={}, seconds={})
    back = outcomes.read(tmp_path / "outcomes.parquet")
    assert list(back) == ["r1", "median_rank", "auroc"]
    for name, read in back.items():
        kept = found[name].outcomes
        assert kept is not None
        assert (read.statistic, read.units, read.groups) == (kept.statistic, kept.units, kept.groups)
        assert np.array_equal(read.values, kept.values)
    written = pq.read_table(tmp_path / "outcomes.parquet")
    pq.write_table(written.drop_columns("group"), tmp_path / "older.parquet")
    older = outcomes.read(tmp_path / "older.parquet")
    assert older["median_rank"].units == back["median_rank"].units and older["median_rank"].groups is None
    results.write(path, {"r1": Result(1.0)}, command="", version="0", machine={}, seconds={})
    assert not (tmp_path / "outcomes.parquet").exists()  # they were of the evaluation before
    assert outcomes.read(tmp_path / "outcomes.parquet") == {}


def test_a_foreign_file_of_outcomes_is_one_clear_sentence(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(TriviumError, match="evaluate again"):
        outcomes.read(path)
    pq.write_table(pa.table({"figure": ["a"], "value": [1.0]}), path)
    with pytest.raises(TriviumError, match="evaluate again"):
        outcomes.read(path)
    twice = {
        "figure": ["a", "a"],
        "statistic": ["mean"] * 2,
        "unit": ["q", "q"],
        "value": [1.0, 0.0],
        "other": [0.0] * 2,
    }
    pq.write_table(pa.table(twice), path)
    with pytest.raises(TriviumError, match="each unit has one name"):
        outcomes.read(path)
    unknown = {**twice, "unit": ["q", "p"], "statistic": ["mode"] * 2}
    pq.write_table(pa.table(unknown), path)
    with pytest.raises(TriviumError, match="evaluate again"):
        outcomes.read(path)
