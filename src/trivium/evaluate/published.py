"""Published numbers beside our own: published.csv by columns, and the averages as the papers form them.

Each row of the file is one number of one table, as printed, with where it was read. A printed number that is known to
be wrong has a second row, marked "corrected", which is preferred; one that nobody has checked is marked "recalled". A
note that calls a number an erratum or doubtful marks it wherever it goes, also into a pair.
"""

from __future__ import annotations

import csv
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trivium.evaluate.paper_tasks import DOMAINS, Figure, PaperTask

FILE = Path(__file__).with_name("published.csv")
PAIRS = {"mean(accuracy, F1)": ("accuracy", "F1")}  # a mean that some tables print as its two parts
CONFIDENCE = ("recalled", "corrected", "read")  # of two numbers, that of the first of these stands for both
DOUBT = re.compile(r"\b(erratum|doubtful)\b")  # in a note

Place = tuple[str, int]  # a task's key, and the place of the figure among its figures


@dataclass(frozen=True)
class Cell:
    """One published number, in per cent or times 100."""

    value: float
    printed: str  # with the digits of the paper; a pair as "accuracy / F1", of which `value` is the mean
    confidence: str  # one of CONFIDENCE
    note: str = ""
    doubted: bool = False  # known or suspected to be wrong, or the correction of such a number, or made with one
    unlike: str = ""  # its metric, where that is not the one of the figure it stands beside

    @property
    def is_recalled(self) -> bool:
        return self.confidence == "recalled"

    @property
    def is_comparable(self) -> bool:
        """May stand for the figure in an average and in a difference."""
        return not self.is_recalled and not self.unlike

    @property
    def shown(self) -> str:
        """As printed, with a mark where the note says what is wrong (*) or other (†) about it."""
        return self.printed + ("*" if self.doubted else "") + ("†" if self.unlike else "")


@dataclass(frozen=True)
class Column:
    """What one system with one setting reaches."""

    system: str
    setting: str
    source: str  # the table that most of it stands in
    cells: Mapping[Place, Cell]

    @property
    def name(self) -> str:
        return f"{self.system}: {self.setting}"

    def values(self) -> dict[Place, float]:
        """What may be averaged and compared with, in per cent."""
        return {place: cell.value for place, cell in self.cells.items() if cell.is_comparable}


@dataclass(frozen=True)
class Averages:
    """In per cent; None where too little is there to form one. A domain that a model cannot do counts 0 in `macro`."""

    domains: Mapping[str, float | None]
    macro: float | None


@functools.cache
def rows() -> tuple[Mapping[str, str], ...]:
    """Every row of published.csv."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def columns(tasks: Sequence[PaperTask]) -> list[Column]:
    """Each system and setting with a number for one of the tasks, those of a table beside each other."""
    found: dict[tuple[str, str], dict[Place, Cell]] = {}
    sources: dict[tuple[str, str], Counter[str]] = {}
    for row in rows():
        sources.setdefault((row["system"], row["setting"]), Counter())[row["source"]] += 1
    for task in tasks:
        for place, figure in enumerate(task.figures):
            for key, cell in _cells(task, figure).items():
                found.setdefault(key, {})[task.key, place] = cell
    made = [
        Column(system, setting, sources[system, setting].most_common(1)[0][0], cells)
        for (system, setting), cells in found.items()
    ]
    order = {source: place for place, source in enumerate(dict.fromkeys(row["source"] for row in rows()))}
    return sorted(made, key=lambda column: (order[column.source], _place_in_table(column.setting)))


def _place_in_table(setting: str) -> int:
    """The number of its column or row, where the setting states it."""
    stated = re.search(r"\b(?:col|row) (\d+)\)", setting)
    return int(stated[1]) if stated else 0


def _cells(task: PaperTask, figure: Figure) -> dict[tuple[str, str], Cell]:
    """The cell of each system and setting for one figure."""
    found = _of_metric(task, figure.metric, figure)
    if figure.metric in PAIRS:
        first, second = (_of_metric(task, metric, figure) for metric in PAIRS[figure.metric])
        for key in first.keys() & second.keys() - found.keys():
            one, two = first[key], second[key]
            value = (one.value + two.value) / 2
            found[key] = Cell(
                value,
                f"{one.printed} / {two.printed}",
                min(one.confidence, two.confidence, key=CONFIDENCE.index),
                "; ".join(dict.fromkeys(filter(None, (f"mean {value:.2f}", one.note, two.note)))),
                one.doubted or two.doubted,
            )
    for metric in figure.unlike:
        for key, cell in _of_metric(task, metric, figure).items():
            note = "; ".join(filter(None, (f"{metric} alone", cell.note)))
            found.setdefault(key, replace(cell, note=note, unlike=metric))
    return found


def _of_metric(task: PaperTask, metric: str, figure: Figure) -> dict[tuple[str, str], Cell]:
    best: dict[tuple[str, str], tuple[tuple[int, bool], Cell]] = {}
    protocols = (figure.protocol,) if figure.protocol else (task.protocol, *task.beside)
    for row in rows():
        if (row["task"], row["metric"]) != (task.name, metric) or row["protocol"] not in protocols:
            continue
        if figure.splits and row["split"] not in figure.splits:
            continue
        key = row["system"], row["setting"]
        preference = (figure.splits.index(row["split"]) if figure.splits else 0, row["confidence"] != "corrected")
        if key not in best or preference < best[key][0]:
            doubted = row["confidence"] == "corrected" or DOUBT.search(row["note"]) is not None
            best[key] = preference, Cell(float(row["value"]), row["value"], row["confidence"], row["note"], doubted)
    return {key: cell for key, (_, cell) in best.items()}


def averages(
    tasks: Sequence[PaperTask], values: Mapping[Place, float], cannot: Sequence[str] | None = None
) -> Averages:
    """The mean of each domain over the figures that the paper averages, and the mean of the domains.

    Args:
        values: in per cent.
        cannot: domains that the model cannot do; None: not known, as of a published column, where one without any value
            is taken for such.
    """
    domains: dict[str, float | None] = {}
    empty = []
    for domain in DOMAINS:
        places = [
            (task.key, place)
            for task in tasks
            if task.domain == domain
            for place, figure in enumerate(task.figures)
            if figure.averaged
        ]
        if not places:
            continue
        present = [values[place] for place in places if place in values]
        domains[domain] = sum(present) / len(present) if len(present) == len(places) else None
        if not present if cannot is None else domain in cannot:
            empty.append(domain)
    counted = [0.0 if domain in empty else value for domain, value in domains.items()]
    known = [value for value in counted if value is not None]
    whole = len(known) == len(counted) > 1 and len(empty) < len(counted)
    return Averages(domains, sum(known) / len(known) if whole else None)
