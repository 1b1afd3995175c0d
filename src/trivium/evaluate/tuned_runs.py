"""What runs of `trivium finetune` left: the suite reads a task from one run, and says where it is another model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trivium.errors import TriviumError
from trivium.evaluate.paper_tasks import PaperTask
from trivium.evaluate.results import Results
from trivium.evaluate.task_runs import TaskRun
from trivium.manifest import checkpoints_in

PART = "fine-tuned on at most {:,} training rows"


@dataclass(frozen=True, eq=False)
class TunedRun:
    """One run, or the median over those of several seeds."""

    folder: Path
    results: Results
    inits: tuple[
        str, ...
    ] = ()  # the model that it began from, and where that is a run, what that began from; (): unsaid
    rows: int | None = None  # training rows that it was given at most; None: all
    notes: tuple[str, ...] = ()  # what it says of its figures: which held-out rows training has too

    @property
    def seconds(self) -> float:
        """How long it took in all; 0 where that is not known."""
        timed = [self.results[name].value for name in ("seconds.total", "seconds.train") if name in self.results]
        return timed[0] if timed else 0.0

    def figures(self, task: PaperTask) -> tuple[Results, bool]:
        """Those of a task under its own name, and whether picture and text were read side by side: then they stand
        under "title (concatenated)". Of several seeds the median counts."""
        for title in (task.prefix, f"{task.prefix} (concatenated)"):
            mine = {}
            for name, result in self.results.items():
                plain = name.removesuffix(".median")
                if plain == title or plain.startswith(f"{title}."):
                    mine[task.prefix + plain.removeprefix(title)] = result
            if mine:
                return mine, title != task.prefix
        return {}, False

    def doubt(self, model: str | None) -> str | None:
        """Why its figures may not be those of the model at a path, or by which other run they are; None where it is, or
        began from, that one."""
        if model is None or _places(model) & _places(str(self.folder)):
            return None
        if not self.inits:
            return f"nothing says which model {self.folder} was fine-tuned from, so it may not be {model}"
        for way, init in enumerate(self.inits):
            if init == model or _places(model) & _places(init):
                by = " and ".join(self.inits[:way])
                return f"{self.folder} was fine-tuned from {model} by way of {by}" if by else None
        last = self.inits[-1]
        if not Path(last).exists():
            return f"{self.folder} was fine-tuned from {last}, which is not there: it may not be {model}"
        return (
            f"{self.folder} was fine-tuned from {self.inits[0]}, not from {model}: these are figures of another model"
        )

    @property
    def part(self) -> str | None:
        """That it may not have been given all training rows, as the papers' were."""
        return None if self.rows is None else PART.format(self.rows)


def of_task(task: PaperTask, runs: Sequence[TunedRun]) -> TunedRun | None:
    """The run that has a figure which the task asks for; of tasks that take no fine-tuning none is asked. Raises
    TriviumError where several have."""
    if task.kind in ("classification", "retrieval"):
        return None
    found = [run for run in runs if _has_one(run, task)]
    if len(found) > 1:
        raise TriviumError(
            f"--fine-tuned names two runs of {task.name}, {found[0].folder} and {found[1].folder}: name the one that is"
            " to stand in the report"
        )
    return found[0] if found else None


def _has_one(run: TunedRun, task: PaperTask) -> bool:
    there = TaskRun(task, "read", run.figures(task)[0])
    return any(there.figure(figure) is not None for figure in task.figures)


def _places(path: str) -> set[Path]:
    """Folders that `load` opens as the same model: a run, what it kept as its best, its newest checkpoint."""
    here = Path(path).resolve()
    newest = checkpoints_in(here / "checkpoints")[-1:]
    return {here, here / "model", *newest, *(checkpoint / "model" for checkpoint in newest)}
