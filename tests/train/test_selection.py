"""The best evaluation of a run, and when to give up."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import make, with_train

from tests.train.test_trainer import assert_same_state, state_of
from trivium.manifest import checkpoints_in
from trivium.train import checkpoint
from trivium.train.run import Outcome
from trivium.train.selection import Selection, value_of
from trivium.train.trainer import train


def results(value: object) -> dict:
    return {"figures": {"dev.accuracy": value, "dev.f1": 0.5}, "losses": {"a": 1.0}}


@given(st.lists(st.sampled_from([0.1, 0.2, 0.2, 0.3]), min_size=1, max_size=12), st.integers(1, 4))
def test_the_first_of_the_highest_is_best_and_patience_counts_what_came_since(
    values: list[float], patience: int
) -> None:
    selection = Selection("figures.dev.accuracy", patience)
    for step, value in enumerate(values):
        assert selection.note(step + 1, results(value)) == (value > max(values[:step], default=-1))
    assert selection.best_step == 1 + values.index(max(values))
    assert selection.since == len(values) - 1 - values.index(max(values))
    assert selection.is_exhausted == (selection.since >= patience)


def test_what_is_no_number_is_never_the_best() -> None:
    selection = Selection("figures.dev.accuracy")
    for step, value in enumerate([math.nan, None, "high", math.inf], start=1):
        assert not selection.note(step, results(value))
    assert selection.best_step is None
    assert not selection.is_exhausted
    assert selection.note(9, results(-1.0))


def test_the_start_is_never_chosen_and_what_is_no_better_is_told() -> None:
    selection = Selection("figures.dev.accuracy", patience=1)
    assert not selection.note(0, results(0.5)) and not selection.is_exhausted
    assert selection.note(5, results(0.4)) and selection.best_step == 5
    assert str(selection).endswith(
        "at step 5 (0.4), no higher than before training (0.5): the model that it began with is at least as good"
    )
    assert selection.note(10, results(0.6))
    assert str(selection) == "figures.dev.accuracy was highest at step 10 (0.6), from 0.5 before training"


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
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    log.write_bytes(b"\xff\xfe\n7\n" + whole.encode() + b'{"step": 40, "resu')  # damaged bytes, and cut by a kill
    selection = Selection.of_log(log, "figures.dev.accuracy", patience=1)
    assert (selection.best_step, selection.best, selection.since) == (20, 0.7, 1)
    assert selection.is_exhausted
    assert str(selection) == "figures.dev.accuracy was highest at step 20 (0.7)"


# ------------------------------------------------------------------------------------------------- in the trainer

VALUES = {4: 0.5, 8: 0.9, 12: 0.1, 16: 0.9, 20: 1.0}


def run(folder: Path, patience: int | None, resume: bool = False, stop_at: int | None = None) -> Outcome:
    """20 steps with an evaluation after every fourth, whose figure is known; nothing is saved but what must be."""
    settings = with_train(save_every=100, keep_last=1, evaluate_every=4, log_every=1, patience=patience)
    chosen = replace(make(settings), select="figures.good")

    def evaluate(method: object) -> dict[str, dict[str, float]]:
        done = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return {"figures": {"good": VALUES[done]}}

    chosen.evaluate = evaluate

    def stop(step: int) -> None:
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    chosen.method.before_accept = stop  # type: ignore[assignment]
    return train(chosen, folder, resume=resume)


def kept(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoints_in(folder / "checkpoints")]


def test_the_best_checkpoint_stays_beside_the_last_ones(tmp_path: Path) -> None:
    assert run(tmp_path, None).done == 20
    assert kept(tmp_path) == [20]  # the best and the last in one
    VALUES[20] = 0.2
    assert run(tmp_path / "again", None).done == 20
    VALUES[20] = 1.0
    assert kept(tmp_path / "again") == [8, 20]


def test_patience_stops_a_run_which_then_stays_stopped(tmp_path: Path) -> None:
    outcome = run(tmp_path, 2)
    assert (outcome.done, outcome.signal) == (16, None)  # 16 is as good as 8, and no better
    assert kept(tmp_path) == [8, 16]
    before = state_of(tmp_path, 16)
    again = run(tmp_path, 2, resume=True)
    assert (again.done, again.results) == (16, {"figures": {"good": 0.9}})
    assert kept(tmp_path) == [8, 16]
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(tmp_path, 16).items())


def test_a_run_that_is_stopped_on_its_way_chooses_as_one_that_was_not(tmp_path: Path) -> None:
    run(tmp_path / "straight", 2)
    assert run(tmp_path / "stopped", 2, stop_at=10).done == 10
    assert kept(tmp_path / "stopped") == [8, 10]
    assert run(tmp_path / "stopped", 2, resume=True).done == 16
    assert kept(tmp_path / "stopped") == kept(tmp_path / "straight") == [8, 16]
    for step in (8, 16):
        assert_same_state(tmp_path / "straight", tmp_path / "stopped", step)
