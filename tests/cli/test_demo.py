"""`trivium demo`: what it refuses, what it would train, and, slowly, the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluate.names import OF_THE_MODEL
from tests.recipes.shop import LOSSES, lines_of, trivium
from trivium.cli.demo import MOST_STEPS, bounded, demo_recipe

# The names under which the demo's figures stand in results.json.
NAMES = {
    *OF_THE_MODEL, "seconds.train", "seconds.total",
    *(f"losses.{loss}.{figure}" for loss in LOSSES for figure in ("final", "chance")),
}  # fmt: skip


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_are_above_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], minutes: str) -> None:
    assert trivium("demo", "--minutes", minutes, "--out", tmp_path / "demo") == 2
    assert "the demo needs a number of minutes above 0" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_stands_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trivium("demo", "--out", tmp_path) == 2
    assert f"{tmp_path} exists already: give a folder that does not" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_demo_trains_all_of_flava_on_what_the_package_brings() -> None:
    recipe = demo_recipe(3.0)
    assert recipe.train.minutes == 3.0
    assert recipe.data.is_embedded
    assert all(getattr(recipe.objectives, loss) > 0 for loss in LOSSES)
    assert recipe.init is None


def test_a_fast_machine_takes_no_more_steps_than_the_pairs_bear(capsys: pytest.CaptureFixture[str]) -> None:
    prepared = demo_recipe(3.0).prepare("flava", {"size": "tiny"})
    fits, too_many = (prepared.with_train(steps=steps, minutes=None) for steps in (MOST_STEPS, MOST_STEPS + 1))
    assert bounded(fits) is fits
    assert capsys.readouterr().err == ""
    run = bounded(too_many).run
    assert run.config.values["train.steps"] == run.train.steps == MOST_STEPS
    assert f"it stops after {MOST_STEPS}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_demo_in_a_second_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert trivium("demo", "--minutes", "0.02", "--out", out) == 0
    assert f"report: {out}/report.html" in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    assert found["results"].keys() == NAMES
    assert found["results"]["retrieval.style.text_to_image_r10"]["n"] == 1366
    assert found["results"]["retrieval.concepts.text_to_image_r10"]["n"] == 160
    assert found["results"]["retrieval.style.image_to_image.pixels_r1"]["value"] == pytest.approx(0.37, abs=0.02)
    for loss in LOSSES:
        assert 0 < found["results"][f"losses.{loss}.chance"]["value"] < 9
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "passport.json", "metrics.jsonl", "skipped.jsonl", "results.json", "report.html"),
        *("checkpoints", "monitors.jsonl", "outcomes.parquet", ".lock"),
    }
    # The budget stands in the config as the number of steps that it came to, so the run can be repeated.
    values = json.loads((out / "config.json").read_text())["values"]
    assert values["train.minutes"] is None
    assert values["train.steps"] == lines_of(out / "metrics.jsonl")[-1]["step"]
    # The same figures come out of its files.
    assert trivium("evaluate", out, "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["results"].keys() == NAMES
    for name in NAMES - {"seconds.train", "seconds.total"}:
        assert again["results"][name]["value"] == pytest.approx(found["results"][name]["value"], abs=2e-3), name


@pytest.mark.slow
def test_a_first_look_ends_with_a_page_of_pictures(tmp_path: Path) -> None:
    """As it is typed, from an empty folder; two to three minutes on one thread."""
    command = [sys.executable, "-m", "trivium", "demo", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "FLAVA from nothing: 0.75 minutes of training, then a report in demo" in done.stderr
    assert "report: demo/report.html" in done.stdout
    walls = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8").split('<div class="wall')[1:]
    assert len(walls) == 2, "of names and of drawings that ask"
    assert all(wall.count('<img src="data:image/') > 40 for wall in walls)
