"""What UniT's table says of runs of which some are missing, and how updates are shared out."""

from __future__ import annotations

from pathlib import Path

import pytest
import unit_table


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [
        ({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5}, "holds in all 2 seeds (+10.0, +10.0)"),
        ({0: 0.4, 1: 0.5}, {0: 0.5, 1: 0.7}, "the other way round in all 2 seeds (-10.0, -20.0)"),
        ({0: 0.5, 1: 0.5}, {0: 0.4, 1: 0.6}, "cannot be told: the seeds differ (+10.0, -10.0)"),
        ({1: 0.5}, {0: 0.9, 1: 0.4}, "holds in all 1 seeds (+10.0)"),  # by seed, not by place
        ({0: 0.5}, {1: 0.4}, "not run"),
    ],
)
def test_orderings_are_of_the_seeds_that_both_have(better: dict, worse: dict, said: str) -> None:
    assert unit_table.verdict(better, worse) == said


def test_a_task_gets_as_many_updates_alone_as_beside_others(tmp_path: Path) -> None:
    joint = unit_table.Cell("shared", None, 0, tmp_path).recipe(tmp_path, 400, "cpu", 1)
    total = sum(task.ratio for task in joint.tasks.values())
    for name, share in unit_table.SHARES.items():
        alone = unit_table.Cell("single", name, 0, tmp_path).recipe(tmp_path, 400, "cpu", 1)
        assert alone.train.steps == 4 * share == joint.train.steps * joint.tasks[name].ratio / total
        assert [n for n, task in alone.tasks.items() if task.ratio] == [name]


def test_the_page_shows_what_is_there_with_the_papers_figures_beside(tmp_path: Path) -> None:
    table: dict = {task: {setting: {} for setting in unit_table.SETTINGS} for task in unit_table.TASKS}
    table["sst2"]["single"] = {1: 0.75, 0: 0.7}
    lines = unit_table.page(table, "the command", 400).splitlines()
    [row] = [line for line in lines if line.startswith("| SST-2")]
    assert row.startswith("| SST-2 | 70.0, 75.0 (91.6") and row.count("| – (") == 3
    assert any("vg 800, vqav2 400, snli_ve 400, sst2 200" in line for line in lines)
