"""The best evaluation of a run, and when to give up."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from trivium.train.selection import Selection, value_of


def results(value: object) -> dict:
    return {"figures": {"dev.accuracy": value, "dev.f1": 0.5}, "losses": {"a": 1.0}}


@given(st.lists(st.sampled_from([0.1, 0.2, 0.2, 0.3]), min_size=1, max_size=12), st.integers(1, 4))
def test_the_first_of_the_highest_is_best_and_patience_counts_what_came_since(
    values: list[float], patience: int
) -> None:
    selection = Selection("figures.dev.accuracy", patience)
    for step, value in enumerate(values):
        assert selection.note(step, results(value)) == (value > max(values[:step], default=-1))
    assert selection.best_step == values.index(max(values))
    assert selection.since == len(values) - 1 - values.index(max(values))
    assert selection.is_exhausted == (selection.since >= patience)


def test_what_is_no_number_is_never_the_best() -> None:
    selection = Selection("figures.dev.accuracy")
    for step, value in enumerate([math.nan, None, "high", math.inf]):
        assert not selection.note(step, results(value))
    assert selection.best_step is None
    assert not selection.is_exhausted
    assert selection.note(9, results(-1.0))


def test_names_with_dots_and_groups() -> None:
    assert value_of(results(0.25), "figures.dev.accuracy") == 0.25
    assert value_of(results(0.25), "losses.a") == 1.0
    assert value_of(results(0.25), "dev.accuracy") is None
    assert value_of({}, "losses.a") is None


def test_a_log_gives_the_choice_of_the_run_that_wrote_it(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert Selection.of_log(log, "figures.dev.accuracy").best_step is None
    lines = [{"step": 10, "stream": "sst2", "losses": {}}]
    lines += [{"step": step, "results": results(value)} for step, value in ((10, 0.5), (20, 0.7), (30, 0.6))]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    selection = Selection.of_log(log, "figures.dev.accuracy", patience=1)
    assert (selection.best_step, selection.best, selection.since) == (20, 0.7, 1)
    assert selection.is_exhausted
    assert str(selection) == "figures.dev.accuracy was highest at step 20 (0.7)"
