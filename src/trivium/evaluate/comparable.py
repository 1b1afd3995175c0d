"""Which of our figures are not those that papers print, and why: they are shown, and compared with nothing."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.data.detection import LAYOUTS
from trivium.evaluate.datasets import layouts
from trivium.evaluate.datasets.captions import BY_NAME as CAPTIONED
from trivium.evaluate.paper_tasks import Figure
from trivium.evaluate.task_runs import TaskRun

NEARLY = 0.99  # of the published samples: a few that cannot be read do not make another figure, nor a few more

# Rows of each held-out split that published figures rest on, by the task's name and the split's in our results; of
# retrieval pictures. Those of RefCOCO+ are recalled.
HELD_OUT_ROWS: dict[str, dict[str, int]] = {
    "MNLI": {"dev_matched": 9815, "dev_mismatched": 9832}, "CoLA": {"dev": 1043}, "MRPC": {"dev": 408},
    "QQP": {"dev": 40_430}, "SST-2": {"dev": 872}, "QNLI": {"dev": 5463}, "RTE": {"dev": 277}, "STS-B": {"dev": 1500},
    "VQAv2": {"dev": 214_354, "test_dev": 107_394, "test": 447_793}, "SNLI-VE": {"dev": 17_858, "test": 17_901},
    "HatefulMemes": {"dev_seen": 500, "dev_unseen": 540}, "NLVR2": {"dev": 6982, "test-P": 6967},
    "RefCOCO+": {"val": 10_758, "testA": 5726, "testB": 4889},
    "Flickr30K retrieval": {"test": 1000}, "COCO retrieval": {"test": 5000},
}  # fmt: skip


def parts(
    found: TaskRun, rows: int | None = None, trained: int | None = None, tuned_for: Sequence[str] = ()
) -> dict[Figure, str]:
    """Of each figure that is not the published one, what it rests on.

    Args:
        rows: what every split was cut to; None: it was not.
        trained: pictures that a probe was fitted on.
        tuned_for: retrieval tasks, for one of which the model was fine-tuned.
    """
    told = {}
    for figure in found.task.figures:
        if found.figure(figure) is None:
            continue
        if rows is not None:
            told[figure] = f"at most {rows:,} of each split"
        elif found.task.protocol == "zero-shot" and tuple(tuned_for) == (found.task.name,):
            told[figure] = "of a model that was tuned for it"
        elif of_split := _other_split(found, figure) or _other_training(found, figure, trained):
            told[figure] = of_split
    return told


def _other_split(found: TaskRun, figure: Figure) -> str:
    """What is reported under a task's title alone is of all its splits together."""
    task, results = found.task, found.results
    if task.kind in ("fine-tuning", "grounding"):
        sizes = HELD_OUT_ROWS.get(task.name, {})
        name = (found.own_name(figure) or figure.instead).removeprefix(task.prefix).lstrip(".")
        split = name.split(".")[0]
        whole = sizes.get(split) if split else sum(sizes.values())
        beside = f"{task.prefix}.{split}." if split else task.prefix
        counted = [each for name, each in results.items() if name.startswith(beside) and (split or name == beside)]
    else:
        whole = (
            layouts.BY_NAME[task.name].test_size if task.kind == "classification"
            else CAPTIONED[task.name].pictures if task.kind == "retrieval"
            else LAYOUTS[task.verb].num_validation
        )  # fmt: skip
        counted = list(results.values())
    measured = min((result.n for result in counted if result.n is not None), default=None)
    return _unlike(measured, whole) if measured is not None and whole else ""


def _other_training(found: TaskRun, figure: Figure, trained: int | None) -> str:
    """Zero-shot takes no training picture."""
    if trained is None or figure.protocol == "zero-shot":
        return ""
    unlike = _unlike(trained, layouts.BY_NAME[found.task.name].train_size)
    return f"trained on {unlike}" if unlike else ""


def _unlike(count: int, published: int) -> str:
    """Both, where they are not nearly as many: another split of the same data is another figure, a larger one too."""
    if count < NEARLY * published:
        return f"{count:,} of {published:,}"
    return f"{count:,}, the paper's {published:,}" if count > published / NEARLY else ""
