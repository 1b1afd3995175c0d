"""Figures that rest on other splits than what papers measured are found, each by its own split."""

from __future__ import annotations

import pytest

from trivium.evaluate.comparable import HELD_OUT_ROWS, parts
from trivium.evaluate.paper_tasks import SUITES, PaperTask
from trivium.evaluate.results import Result
from trivium.evaluate.task_runs import TaskRun


def task_of(suite: str, name: str) -> PaperTask:
    return next(task for task in SUITES[suite] if task.name == name)


@pytest.mark.parametrize(
    ("suite", "name", "counts", "told"),
    [
        ("language", "SST-2", {"SST-2": 40, "SST-2.dev.accuracy": 40}, ["40 of 872"]),
        ("language", "SST-2", {"SST-2": 868, "SST-2.dev.accuracy": 868}, [""]),
        ("language", "MNLI", {"MNLI": 19_647, "MNLI.dev_matched.accuracy": 9815}, [""]),
        ("language", "MNLI", {"MNLI": 9815, "MNLI.dev_matched.accuracy": 9815}, ["9,815 of 19,647"]),
        ("albef", "SNLI-VE", {"SNLI-VE.dev.accuracy": 17_858, "SNLI-VE.test.accuracy": 6}, ["", "6 of 17,901"]),
        ("flava35", "SNLI-VE", {"SNLI-VE.dev.accuracy": 5, "SNLI-VE.test.accuracy": 17_901}, [""]),
        ("flava35", "SNLI-VE", {"SNLI-VE.dev.accuracy": 5}, ["5 of 17,858"]),
        ("albef", "RefCOCO+", {"RefCOCO+.testA.accuracy": 5726, "RefCOCO+.testB.accuracy": 489}, ["", "489 of 4,889"]),
        ("multimodal", "HatefulMemes", {"Hateful Memes.dev_unseen.auroc": 540}, [""]),
        ("vision", "DTD", {"DTD.linear_probe.accuracy": 1850, "DTD.knn.accuracy": 1850}, ["1,850 of 1,880"]),
        ("vision", "EuroSAT", {"EuroSAT.linear_probe.accuracy": 5400}, ["5,400, the paper's 5,000"]),
        ("vision", "SUN397", {"SUN397.linear_probe.accuracy": 108_754}, ["108,754, the paper's 19,850"]),
        ("vision", "EuroSAT", {"EuroSAT.linear_probe.accuracy": 5040}, [""]),
        ("language", "QNLI", {"QNLI": 5732}, ["5,732, the paper's 5,463"]),
    ],
)
def test_each_figure_by_the_rows_of_its_own_split(
    suite: str, name: str, counts: dict[str, int], told: list[str]
) -> None:
    task = task_of(suite, name)
    found = TaskRun(task, "measured", {result: Result(0.6, n=n) for result, n in counts.items()})
    shown = [figure for figure in task.figures if found.figure(figure) is not None]
    assert [parts(found).get(figure, "") for figure in shown] == told
    assert set(parts(found, rows=9).values()) == {"at most 9 of each split"}


def test_recalls_of_a_part_of_the_pictures() -> None:
    [task] = [each for each in SUITES["albef"] if each.name == "COCO retrieval"]
    recalls = {f"COCO retrieval.test.{way}_r1": Result(0.5, n=n) for way, n in (("tr", 1000), ("ir", 5000))}
    assert set(parts(TaskRun(task, "read", recalls)).values()) == {"1,000 of 5,000"}


def test_a_probe_learns_from_training_pictures_and_zero_shot_from_none() -> None:
    task = task_of("vision", "ImageNet")
    results = {f"ImageNet.{name}.accuracy": Result(0.5, n=50_000) for name in ("linear_probe", "knn", "zero_shot")}
    found = parts(TaskRun(task, "measured", results), trained=10_000)
    assert {figure.result: why for figure, why in found.items()} == {
        f"{name}.accuracy": "trained on 10,000 of 1,281,167" for name in ("linear_probe", "knn")
    }
    assert parts(TaskRun(task, "measured", results), trained=1_281_167) == {}


@pytest.mark.parametrize(("trained", "told"), [(39_209, {"trained on 39,209, the paper's 26,640"}), (26_700, set())])
def test_a_probe_of_more_training_pictures_is_another_figure(trained: int, told: set[str]) -> None:
    found = TaskRun(task_of("vision", "GTSRB"), "measured", {"GTSRB.linear_probe.accuracy": Result(0.5, n=12_630)})
    assert set(parts(found, trained=trained).values()) == told


def test_every_task_of_fine_tuning_has_its_sizes() -> None:
    tasks = {task for suite in SUITES.values() for task in suite if task.kind in ("fine-tuning", "grounding")}
    assert {task.name for task in tasks} == HELD_OUT_ROWS.keys()
