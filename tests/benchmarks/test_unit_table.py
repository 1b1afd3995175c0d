"""What UniT's table says of runs of which some are missing, and how updates are shared out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import seeds
import unit_table
from unit_table import Figure


def of(values: dict[int, float], half_width: float) -> dict[int, Figure]:
    return {seed: Figure(value, value - half_width, value + half_width) for seed, value in values.items()}


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [
        ({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5}, "holds (+10.0 [7.0, 13.0])"),
        ({0: 0.4, 1: 0.5}, {0: 0.5, 1: 0.7}, "the other way round (-15.0 [-18.0, -12.0])"),
        ({0: 0.5, 1: 0.5}, {0: 0.4, 1: 0.52}, "cannot be told (+4.0 [1.0, 7.0])"),  # the seeds differ
        ({0: 0.52, 1: 0.42}, {0: 0.5, 1: 0.4}, "cannot be told (+2.0 [-1.0, 5.0])"),
        ({1: 0.5}, {0: 0.9, 1: 0.4}, "not all seeds (+10.0 [5.8, 14.2])"),  # by seed, not by place
        ({0: 0.5}, {1: 0.4}, "not run"),
    ],
)
def test_orderings_hold_in_every_seed_and_beyond_the_interval(
    better: dict, worse: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "spread", lambda cells: seeds.Spread(0.0, 2))
    table: dict = {task: {setting: {} for setting in unit_table.SETTINGS} for task in unit_table.TASKS}
    table["vg"] |= {"single": of(better, 0.03), "shared": of(worse, 0.03)}
    assert unit_table.orderings(table, 2)["detection loses by joint training"] == said


def test_what_the_seeds_spread_is_not_taken_for_an_ordering() -> None:
    table: dict = {task: {setting: {} for setting in unit_table.SETTINGS} for task in unit_table.TASKS}
    table["vg"] |= {"single": of({0: 0.5, 1: 0.6}, 0.01), "shared": of({0: 0.4, 1: 0.5}, 0.01)}
    # Two cells of two seeds that are 0.1 apart: a variance of 0.005, a half width of 4.303 x sqrt(0.005).
    said = unit_table.orderings(table, 2)["detection loses by joint training"]
    assert said == "cannot be told (+10.0 [-20.4, 40.4])"


def test_a_task_gets_as_many_updates_alone_as_beside_others(tmp_path: Path) -> None:
    joint = unit_table.Cell("shared", None, 0, tmp_path).recipe(tmp_path, 400, "cpu", 1)
    total = sum(task.ratio for task in joint.tasks.values())
    for name, share in unit_table.SHARES.items():
        alone = unit_table.Cell("single", name, 0, tmp_path).recipe(tmp_path, 400, "cpu", 1)
        assert alone.train.steps == 4 * share == joint.train.steps * joint.tasks[name].ratio / total
        assert [n for n, task in alone.tasks.items() if task.ratio] == [name]


def test_the_page_shows_what_is_there_with_the_papers_figures_beside(tmp_path: Path) -> None:
    table: dict = {task: {setting: {} for setting in unit_table.SETTINGS} for task in unit_table.TASKS}
    table["sst2"]["single"] = of({1: 0.75, 0: 0.7}, 0.01)
    lines = unit_table.page(table, {"sst2": 0.509}, "the command", 400, 2).splitlines()
    [row] = [line for line in lines if line.startswith("| SST-2")]
    assert row.startswith("| SST-2 | 50.9 | 70.0, 75.0 (91.6") and row.count("| – (") == 3
    assert any("vg 800, vqav2 400, snli_ve 400, sst2 200" in line for line in lines)


def test_seconds_of_runs_are_those_that_their_folders_tell(tmp_path: Path) -> None:
    for seed, results in enumerate(({"seconds.total": {"value": 61.5}}, {"seconds.train": {"value": 50.0}})):
        cell = unit_table.Cell("single", "vg", seed, tmp_path)
        cell.folder.mkdir()
        (cell.folder / "results.json").write_text(json.dumps({"results": results}))
    assert unit_table.seconds_of_runs([0, 1, 2], tmp_path) == {"single-vg-seed0": 61.5}


def test_a_process_that_makes_one_seed_leaves_the_table_to_whoever_is_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name, *_ in unit_table.TASKS.values()}
    monkeypatch.setattr(unit_table.side_by_side, "RESULTS", tmp_path)
    monkeypatch.setattr(unit_table, "write_scenes", lambda *arguments: None)
    words = ["unit_table.py", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    for seed, done in ((0, False), (1, True)):
        for cell in unit_table.cells(list(unit_table.SETTINGS), list(unit_table.TASKS), [seed], tmp_path / "out"):
            cell.folder.mkdir(parents=True)
            (cell.folder / "results.json").write_text(json.dumps({"results": figures}))
        monkeypatch.setattr("sys.argv", [*words, "--seeds", str(seed)])
        assert unit_table.main() == 0
        assert {(tmp_path / f"unit_table.{suffix}").exists() for suffix in ("md", "json")} == {done}
        assert ("still to run: single-vg-seed1" in capsys.readouterr().err) != done
    assert "| 50.0, 50.0 (40.6*) |" in (tmp_path / "unit_table.md").read_text()


def test_what_is_done_stays_what_was_stopped_goes_on_and_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: object) -> int:
        few = ("--data", tmp_path, "--out", tmp_path / "out", "--scenes", 8, "--measured", 4, "--device", "cpu")
        monkeypatch.setattr("sys.argv", ["unit_table.py", *map(str, (*few, "--threads", 1, *words))])
        return unit_table.main()

    (tmp_path / "glue" / "SST-2").mkdir(parents=True)
    for half in ("train", "dev"):
        (tmp_path / "glue" / "SST-2" / f"{half}.tsv").write_text("sentence\tlabel\na fine film\t1\na dull one\t0\n")
    chosen = ("--settings", "single", "--tasks", "vg", "--seeds", 0)
    run = tmp_path / "out" / "single-vg-seed0"
    assert call("--updates", 2, *chosen) == 0
    assert "still to run: single-vqav2-seed0" in capsys.readouterr().err
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 4
    done = (run / "results.json").read_bytes()
    assert call("--updates", 2, *chosen) == 0
    assert (run / "results.json").read_bytes() == done  # not begun again
    (run / "results.json").unlink()
    assert call("--updates", 2, *chosen) == 0
    again = json.loads((run / "results.json").read_text())["results"]
    assert again["VG detection.val.ap50"] == json.loads(done)["results"]["VG detection.val.ap50"]
    with pytest.raises(SystemExit, match="single-vg-seed0 is a run with other settings"):
        call("--updates", 3, *chosen)
    with pytest.raises(SystemExit, match="shared-init-seed1 starts from single-vg-seed1: run that first"):
        call("--updates", 2, "--settings", "shared-init", "--seeds", 1)
