"""Five kills of the hundred that benchmarks/kill.py makes: two in time, three at named points of a save."""

from __future__ import annotations

from pathlib import Path

import kill
import pytest


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of 200 steps lies that was never killed."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture(scope="module")
def points(straight: Path) -> list[str]:
    """The operations of its save after 100 steps."""
    return kill.points_of_a_save(straight, 100)


def test_the_points_of_a_save_are_all_there(points: list[str]) -> None:
    """In this order: beside, every file, the manifest, the rename; and only then the older checkpoint goes."""
    files = [f"open checkpoint/training/{name}.json" for name in ("tensors", "optimizer", "state")]
    story = ["make checkpoint", "open checkpoint/model/config.json", *files, "rename checkpoint/.manifest.json",
             "rename checkpoint", "rename older checkpoint", "remove older checkpoint"]  # fmt: skip
    places = [next(n for n, point in enumerate(points) if point.startswith(part)) for part in story[:-3]]
    places += [points.index(part) for part in story[-3:]]
    assert places == sorted(places)
    assert points[0] == "make checkpoint"


@pytest.mark.parametrize("point", ["open checkpoint/training/optimizer.json", "rename checkpoint",
                                   "rename older checkpoint"])  # fmt: skip
def test_killed_at_a_point_of_a_save(straight: Path, points: list[str], tmp_path: Path, point: str) -> None:
    kill.kill_in_save(tmp_path / "run", 120, points.index(point))
    before = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    left = {"step-00000080", "step-00000100"}
    assert before == left | ({"step-00000120"} if "older" in point else {".tmp-step-00000120"})
    assert kill.survives(tmp_path / "run", kill.result_of(straight)) == (True, True)


@pytest.mark.parametrize("seconds", [0.1, 0.3])
def test_killed_in_time(straight: Path, points: list[str], tmp_path: Path, seconds: float) -> None:
    kill.kill_after(tmp_path / "run", seconds)
    assert kill.survives(tmp_path / "run", kill.result_of(straight)) == (True, True)
