"""What became of the tasks of a suite, and how that of one task is kept in a folder, to be read by the next call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from trivium import __version__
from trivium.evaluate import outcomes, results
from trivium.evaluate.datasets import Missing
from trivium.evaluate.paper_tasks import Figure, PaperTask
from trivium.evaluate.published import Place
from trivium.evaluate.results import Result, Results
from trivium.manifest import write_whole

State = Literal[
    "measured", "kept", "read", "unscored", "missing", "not applicable", "not fine-tuned", "damaged", "failed"
]
# What readers and protocols say where something is wrong, so that of a kept task it is known too.
WARNING = re.compile(
    r"leakage: \d|cannot be (read|used)|are left out; the first|never (answered|learned)|counted as wrong"
)
HAS_FIGURES: tuple[State, ...] = ("measured", "kept", "read")


@dataclass
class TaskRun:
    """What became of one task. The names of its results begin with the task's."""

    task: PaperTask
    state: State
    results: Results = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    missing: Missing | None = None
    # Of figures that are not the published ones, what they rest on (comparable.py).
    parts: Mapping[Figure, str] = field(default_factory=dict)
    side_by_side: bool = False  # its head read picture and text vector, not the model's own states

    def figure(self, figure: Figure) -> Result | None:
        """Our own value of one of its figures, as a share."""
        return self._own(figure) or self.on_another_split(figure)

    def on_another_split(self, figure: Figure) -> Result | None:
        """Ours, where it is taken on another split than the published one; else None."""
        if self._own(figure) is not None or not figure.instead:
            return None
        return self.results.get(self._name(figure.instead))

    def is_other(self, figure: Figure) -> bool:
        """Whether ours is not the published figure, but one of another split or of `parts`: shown, and compared with
        nothing."""
        return figure in self.parts or self.on_another_split(figure) is not None

    def own_name(self, figure: Figure) -> str | None:
        """Under which name of the results ours stands, on the published split; None: it is not there."""
        names = [self._name(result) for result in ([figure.first] if figure.first else []) + [figure.result]]
        return next((name for name in names if name in self.results), None)

    def _own(self, figure: Figure) -> Result | None:
        name = self.own_name(figure)
        return None if name is None else self.results[name]

    def metric(self, figure: Figure) -> str:
        """What the figure is called, and what is another of ours: its split, what it rests on, what the head read."""
        ours = [figure.instead] if self.on_another_split(figure) else []
        ours += [self.parts[figure]] if figure in self.parts else []
        ours += ["picture and text vector side by side"] if self.side_by_side and self.figure(figure) else []
        title = self.task.metric(figure)
        return f"{title} (ours: {', '.join(ours)})" if ours else title

    def rests_on(self, part: str) -> None:
        """Say it of every figure that is there."""
        self.parts = {figure: part for figure in self.task.figures if self.figure(figure) is not None}
        self.notes.append(part)

    @property
    def warnings(self) -> list[str]:
        """Its notes on what is wrong with the data: leakage, what cannot be read, classes that are never answered."""
        return [note for note in self.notes if WARNING.search(note)]

    @property
    def is_comparable(self) -> bool:
        """Whether any of its figures may stand beside a published one."""
        return any(self.figure(figure) is not None and not self.is_other(figure) for figure in self.task.figures)

    def written(self, name: str) -> str:
        """The name of one of its results in files: as `trivium finetune` writes it where vectors are side by side."""
        prefix = self.task.prefix
        return f"{prefix} (concatenated){name.removeprefix(prefix)}" if self.side_by_side else name

    def _name(self, result: str) -> str:
        return ".".join(filter(None, (self.task.prefix, result)))


@dataclass
class SuiteRun:
    """What became of all tasks, in order."""

    tasks: list[TaskRun]

    @property
    def results(self) -> Results:
        return {run.written(name): result for run in self.tasks for name, result in run.results.items()}

    @property
    def notes(self) -> list[str]:
        """What is to be known of the figures, each with its task in front."""
        return [
            f"{self.title(run.task)}: {note}" for run in self.tasks if run.state in HAS_FIGURES for note in run.notes
        ]

    def title(self, task: PaperTask) -> str:
        """A task's name, with its protocol where two of the name stand here."""
        return task.key if sum(run.task.name == task.name for run in self.tasks) > 1 else task.name

    def values(self) -> dict[Place, float]:
        """Our own figures in per cent, as published ones are; without those of another split or of `parts`."""
        found = {}
        for run in self.tasks:
            for place, figure in enumerate(run.task.figures):
                result = run.figure(figure)
                if result is not None and not run.is_other(figure):
                    found[run.task.key, place] = 100 * result.value
        return found

    def cannot(self) -> list[str]:
        """Domains of which the model can do no task at all."""
        domains = dict.fromkeys(run.task.domain for run in self.tasks)
        return [
            name
            for name in domains
            if all(run.state == "not applicable" for run in self.tasks if run.task.domain == name)
        ]


# ------------------------------------------------------------------------------------------- what is kept


def keep(found: TaskRun, folder: Path, seconds: float) -> None:
    has_outcomes = any(result.outcomes is not None for result in found.results.values())
    about = {"notes": found.notes, "seconds": seconds, "has_outcomes": has_outcomes}
    results.write(
        folder / "results.json", found.results, command="", version=__version__, machine={}, seconds={"total": seconds}
    )
    write_whole(folder / "about.json", json.dumps(about, indent=1) + "\n")  # last: with it the folder is whole


def kept(task: PaperTask, folder: Path) -> TaskRun | None:
    """What was measured before; None where nothing was, or it is damaged or not whole: then it is measured again."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        read = results.read(folder / "results.json")
        units = outcomes.read(folder / outcomes.NAME)
        notes, seconds = [str(note) for note in about["notes"]], float(about["seconds"])
        if about["has_outcomes"] and not units:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    figures = {name: replace(result, outcomes=units.get(name)) for name, result in read.items()}
    own = {name: result for name, result in figures.items() if not name.startswith("seconds.")}
    return TaskRun(task, "kept", own, notes, seconds)
