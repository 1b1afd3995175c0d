"""The two runs of UniT on real input: what the second changes of the first, and what is not trained twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import unit_scenes

from trivium.train import config
from trivium.train.config import leaves


def test_the_second_run_goes_on_from_the_first_with_other_shares_batches_and_rate() -> None:
    first = unit_scenes.recipe(Path("out"), Path("data"), Path("easy.whl"), minutes=33.0)
    second = unit_scenes.second(first, Path("out/run"), 1100)
    before, after = leaves(first), leaves(second)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    tasks = {f"tasks.{name}.ratio" for name in unit_scenes.THEN}
    tasks |= {f"tasks.{name}.batch" for name in unit_scenes.LARGE}
    tasks |= {f"tasks.{name}.of_one_picture" for name in unit_scenes.TOGETHER}
    assert changed == tasks | {"init", "optim.lr", "train.minutes", "train.steps"}
    for recipe in (first, second):
        assert sum(task.ratio for task in recipe.tasks.values()) == pytest.approx(1)
    assert second.init == "out/run" and second.tasks["snli_ve"].batch == 96 == 3 * first.tasks["snli_ve"].batch
    assert second.tasks["snli_ve"].of_one_picture == 3  # a scene has one statement of each label


def test_a_run_that_is_done_is_not_begun_again_and_another_is_refused(tmp_path: Path) -> None:
    first = unit_scenes.recipe(tmp_path / "nowhere", tmp_path / "nothing", tmp_path / "none.whl", minutes=33.0)
    settled = replace(first, train=replace(first.train, minutes=None, steps=6384)).with_absolute_paths()
    config.save(config.Config("unit", {"size": "tiny"}, config.leaves(settled)), tmp_path / "config.json")
    (tmp_path / "results.json").write_text("{}")
    assert unit_scenes.trained(first, tmp_path)
    for other in (replace(first, train=replace(first.train, seed=1)), unit_scenes.second(first, tmp_path, 1100)):
        with pytest.raises(SystemExit, match="is a run with other settings"):
            unit_scenes.trained(other, tmp_path)


REACHED = {"new-scenes": {"ap50": {"value": 0.46}}, "held-out-both": {"ap50": {"value": 0.31}}}


@pytest.mark.parametrize(
    ("splits", "low", "seconds", "said"),
    [
        ({}, 0.45, 2700.0, []),
        (
            {"held-out-both": {"ap50": {"value": 0.29}}},
            0.45,
            60.0,
            ["mAP at IoU 0.5 on held-out-both is 0.290, below 0.3"],
        ),
        ({}, 0.37, 60.0, ["SNLI-VE.dev.accuracy is 0.370 at its lower end, the majority class gives 0.333"]),
        ({}, 0.45, 2790.0, ["training took 46.5 minutes, more than 45"]),
    ],
)
def test_each_floor_that_is_missed_is_told(splits: dict, low: float, seconds: float, said: list[str]) -> None:
    found = {
        "VG detection.val.attributes": {"value": 0.9, "low": 0.1},  # of boxes, as their majority is
        "VG detection.val.attributes.majority": {"value": 0.8},
        "SNLI-VE.dev.accuracy": {"value": 0.5, "low": low},
        "SNLI-VE.dev.accuracy.majority": {"value": 0.333},
        "SNLI-VE.dev.f1": {"value": 0.2, "low": 0.1},  # where guessing gives far less than a share of the rows
        "SNLI-VE.dev.f1.majority": {"value": 0.17},
        "losses.vg.class.final": {"value": 2.7},
    }
    words = unit_scenes.of_words(found)
    assert list(words) == ["SNLI-VE.dev.accuracy"]
    assert unit_scenes.misses(REACHED | splits, words, seconds) == said
