from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from trivium.errors import TriviumError
from trivium.train.logs import Log
from trivium.train.step import StepResult


def result(accepted: bool = True, **losses: float) -> StepResult:
    return StepResult(losses, {}, dict.fromkeys(losses, 1.0), 2.0 if accepted else float("nan"), accepted)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_means_of_one_stream(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Log(path, first=0, total=9, out=io.StringIO()) as log:
        log.step(1, "pairs", result(itm=1.0, mim=4.0), lr=0.1, samples=8, seconds=2.0)
        log.step(2, "text", result(mlm=7.0), lr=0.2, samples=4, seconds=1.0)
        log.step(3, "pairs", result(itm=3.0), lr=0.3, samples=8, seconds=2.0)
        assert lines_of(path) == []
        log.flush()
        pairs, text = lines_of(path)  # flushed to the disk: whoever watches sees them now
        log.step(4, "pairs", result(itm=5.0), lr=0.4, samples=8, seconds=1.0)
        log.results(4, {"loss": {"itm": 1.0}})
    assert pairs["losses"] == {"itm": 2.0, "mim": 4.0}
    assert (pairs["step"], pairs["steps"], pairs["lr"], pairs["samples_per_second"]) == (3, 2, 0.3, 4.0)
    assert (text["stream"], text["losses"], text["samples_per_second"]) == ("text", {"mlm": 7.0}, 4.0)
    later = lines_of(path)[2:]
    assert later[0]["losses"] == {"itm": 5.0}
    assert later[1]["results"] == {"loss": {"itm": 1.0}}
    assert pairs["seconds"] <= later[1]["seconds"]


def test_skipped_steps_are_counted_and_spoil_no_mean(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Log(path, first=0, total=9, out=io.StringIO()) as log:
        log.step(1, "pairs", result(itm=1.0), lr=0.1, samples=8, seconds=2.0)
        log.step(2, "pairs", result(False, itm=float("nan")), lr=0.1, samples=8, seconds=2.0)
        log.flush()
        log.step(3, "pairs", result(False, itm=float("nan")), lr=0.1, samples=8, seconds=2.0)
    first, second = lines_of(path)
    assert (first["losses"], first["skipped"], first["grad_norm"]) == ({"itm": 1.0}, 1, 2.0)
    assert (second["losses"], second["skipped"], second["grad_norm"]) == ({}, 1, None)


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    with Log(tmp_path / "m.jsonl", first=0, total=3, out=out, seconds_between_lines=1e9) as log:
        for done in (1, 2, 3):
            log.step(done, "pairs", result(itm=0.5, mim=float(done)), lr=0.1, samples=8, seconds=0.5)
        log.say("[not markup]")
    first, last, said = out.getvalue().splitlines()  # the first step and the last, whatever the time between lines
    assert first.startswith("step 1/3  itm 0.500  mim 1.000  16 samples/s")
    assert last.startswith("step 3/3  itm 0.500  mim 3.000")
    assert "left" in last
    assert said == "[not markup]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    out = Terminal()
    with Log(tmp_path / "m.jsonl", first=0, total=2, out=out) as log:
        log.step(1, "pairs", result(itm=0.25), lr=0.1, samples=8, seconds=0.5)
        log.step(2, "pairs", result(itm=0.125), lr=0.1, samples=8, seconds=0.5)
        log.say("[b]kept[/b]")
    assert "itm 0.125" in out.getvalue().replace("\u00a0", " ")
    assert "2/2" in out.getvalue()
    assert "[b]kept[/b]" in out.getvalue()


def test_all_of_it_fits_a_terminal_of_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    out, losses = Terminal(), dict.fromkeys(("mim", "mlm", "mmm_image", "mmm_text", "itm", "contrastive"), 12.3456)
    with Log(tmp_path / "m.jsonl", first=0, total=10_000, out=out) as log:
        for done in (1, 2, 3):
            log.step(done, "pairs", result(**losses), lr=0.1, samples=64, seconds=0.1)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\u00a0", " ")
    *_, how_far, first, second = [line.strip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert re.fullmatch(r"\S+ +3/10000 640 samples/s \d+:\d\d:\d\d", how_far)
    assert re.sub(" +", " ", f"{first} {second}") == " ".join(f"{name} 12.346" for name in losses)


def test_time_counts_on_over_resumption(tmp_path: Path) -> None:
    with Log(tmp_path / "m.jsonl", first=5, total=9, seconds_before=1000.0, out=io.StringIO()) as log:
        log.step(6, "pairs", result(itm=1.0), lr=0.1, samples=8, seconds=2.0)
    assert 1000 <= lines_of(tmp_path / "m.jsonl")[0]["seconds"] < 1100


def test_a_quiet_log_touches_nothing(tmp_path: Path) -> None:
    out = io.StringIO()
    with Log(tmp_path / "m.jsonl", first=0, total=3, quiet=True, tensorboard=True, out=out) as log:
        log.step(1, "pairs", result(itm=0.5), lr=0.1, samples=8, seconds=0.5)
        log.results(1, {"a": 1})
        log.say("x")
    assert list(tmp_path.iterdir()) == []
    assert out.getvalue() == ""


def test_tensorboard_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path / "m.jsonl", first=0, total=3, tensorboard=True, out=io.StringIO()) as log:
        log.step(1, "pairs", result(itm=0.5), lr=0.1, samples=8, seconds=0.5)
        log.flush()
        log.results(1, {"retrieval": {"r10": 0.25}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("pairs/losses/itm")[0].value == 0.5
    assert events.Scalars("results/results/retrieval/r10")[0].step == 1


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TriviumError, match=r"pip install 'trivium\[track\]'"):
        Log(tmp_path / "m.jsonl", first=0, total=3, tensorboard=True)
