"""Five kills of the hundred that benchmarks/kill.py makes: two in time, three at named points of a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import kill
import pytest


class Straight(NamedTuple):
    """A run of 200 steps that was never killed."""

    result: dict[str, Any]
    points: list[str]  # the operations of its save after 100 steps


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    run = tmp_path_factory.mktemp("straight") / "run"
    kill.warm_up(run.with_name("warm"))
    points = kill.points_of_a_save(run, 100)
    return Straight(kill.result_of(run), points)


def test_the_points_of_a_save_are_all_there(straight: Straight) -> None:
    """In this order: beside, every file, the manifest, the rename; and only then the older checkpoint goes."""
    points = straight.points
    files = [f"open checkpoint/training/{name}.json" for name in ("tensors", "optimizer", "state")]
    story = ["make checkpoint", "open checkpoint/model/config.json", *files, "rename checkpoint/.manifest.json",
             "rename checkpoint", "rename older checkpoint", "remove older checkpoint"]  # fmt: skip
    places = [next(n for n, point in enumerate(points) if point.startswith(part)) for part in story[:-3]]
    places += [points.index(part) for part in story[-3:]]
    assert places == sorted(places)
    assert places[0] == 0


@pytest.mark.parametrize(
    "point", ["open checkpoint/training/optimizer.json", "rename checkpoint", "rename older checkpoint"]
)
def test_killed_at_a_point_of_a_save(straight: Straight, tmp_path: Path, point: str) -> None:
    kill.kill_in_save(tmp_path / "run", 120, straight.points.index(point))
    found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    newest = "step-00000120" if "older" in point else ".tmp-step-00000120"
    assert found == {"step-00000080", "step-00000100", newest}
    assert kill.survives(tmp_path / "run", straight.result) == (True, True)


@pytest.mark.parametrize("seconds", [0.1, 0.3])
def test_killed_in_time(straight: Straight, tmp_path: Path, seconds: float) -> None:
    kill.kill_after(tmp_path / "run", seconds)
    assert kill.survives(tmp_path / "run", straight.result) == (True, True)
