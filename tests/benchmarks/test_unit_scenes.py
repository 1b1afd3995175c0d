"""The two runs of UniT on real input: what the second changes of the first, and what is not trained twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import unit_scenes

from trivium.train.config import leaves


def test_the_second_run_goes_on_from_the_first_with_other_shares_batches_and_rate() -> None:
    first = unit_scenes.recipe(Path("out"), Path("data"), Path("easy.whl"), minutes=33.0)
    second = unit_scenes.second(first, Path("out/run"), 1100)
    before, after = leaves(first), leaves(second)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    tasks = {f"tasks.{name}.ratio" for name in unit_scenes.THEN}
    tasks |= {f"tasks.{name}.batch" for name in unit_scenes.LARGE}
    assert changed == tasks | {"init", "optim.lr", "train.minutes", "train.steps"}
    for recipe in (first, second):
        assert sum(task.ratio for task in recipe.tasks.values()) == pytest.approx(1)
    assert second.init == "out/run" and second.tasks["snli_ve"].batch == 96 == 3 * first.tasks["snli_ve"].batch


def test_a_run_that_is_done_is_not_begun_again(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    first = unit_scenes.recipe(tmp_path / "nowhere", tmp_path / "nothing", tmp_path / "none.whl")
    assert unit_scenes.trained(first, tmp_path)
