"""What a suite found: results.json, results.csv with the published columns, and one self-contained page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from trivium import __version__
from trivium.evaluate import report, results
from trivium.evaluate.paper_tasks import DOMAINS
from trivium.evaluate.published import Averages, Column, Place, averages, columns
from trivium.evaluate.results import Result
from trivium.evaluate.task_runs import HAS_FIGURES, SuiteRun, TaskRun
from trivium.manifest import write_whole

OURS = "this model"
OPEN_TABLES = 2  # of the published ones; the others are folded
# Whose number stands as `published` in results.json and is compared with first: the paper's own model, of ALBEF by the
# kind of task.
PAPERS_OWN = (
    ("FLAVA", ("FLAVA full (col 6)",)),
    ("ALBEF", ("14M images, fine-tuned", "14M images, as in the ALBEF paper", "ITM Grad-CAM, third multimodal layer")),
    ("UniT", ("8 datasets, shared decoder, COCO init", "8 datasets, shared decoder, COCO init, released model")),
)
DOMAIN_TITLES = {"language": "Language", "vision": "Vision", "multimodal": "Multimodal"}
STATE_TITLES = {
    "unscored": "Predicted, and without labels to score by",
    "missing": "Not on the disk",
    "not fine-tuned": "To be fine-tuned first",
    "not applicable": "Not applicable",
    "damaged": "There, but not readable",
    "failed": "Failed",
}


@dataclass(frozen=True)
class SuiteReport:
    """All that the page shows."""

    title: str
    run: SuiteRun
    seconds: Mapping[str, float]
    command: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def write(out: Path, given: SuiteReport) -> Path:
    """results.json, outcomes.parquet, results.csv and report.html into a folder; returns the page's path.

    Raises:
        TriviumError: the folder cannot be written to.
    """
    published = columns([each.task for each in given.run.tasks])
    results.write(
        out / "results.json",
        with_published(given.run, published),
        command=given.command,
        version=__version__,
        machine=given.machine,
        seconds=given.seconds,
        notes=[*filter(None, [given.note]), *given.run.notes],
    )
    write_whole(out / "results.csv", as_csv(given.run, published))
    page = out / "report.html"
    write_whole(page, render(given, published))
    return page


def with_published(run: SuiteRun, published: Sequence[Column]) -> dict[str, Result]:
    """Our results, and beside those that a paper prints the number of its own model, as a share."""
    found = dict(run.results)
    own = papers_own(published)
    for each in run.tasks:
        for place, figure in enumerate(each.task.figures):
            name = None if each.is_other(figure) else each.own_name(figure)
            cell = None if own is None else own.cells.get((each.task.key, place))
            if name is not None and cell is not None and cell.is_comparable:
                name = each.written(name)
                found[name] = replace(found[name], published=cell.value / 100)
    return found


def papers_own(published: Sequence[Column]) -> Column | None:
    """The column of the paper that has the most figures of its own model for these tasks, with what the paper prints of
    that model's other settings. Recalled ones do not count."""
    joined = []
    for system, settings in PAPERS_OWN:
        there = {column.setting: column for column in published if column.system == system and column.values()}
        own = [there[setting] for setting in settings if setting in there]
        cells = {place: cell for column in reversed(own) for place, cell in column.cells.items() if cell.is_comparable}
        joined += [replace(own[0], cells=cells)] if own else []
    return max(joined, key=lambda column: len(column.cells), default=None)


def as_csv(run: SuiteRun, published: Sequence[Column]) -> str:
    """One line a figure: ours in per cent with its interval, then every published column, as printed and with the marks
    of the page; behind a recalled number, which is grey there, stands "?"."""
    page = io.StringIO()
    writer = csv.writer(page, lineterminator="\n")
    head = ["domain", "task", "protocol", "metric", "state", OURS, "low", "high", "n", "seconds"]
    writer.writerow([*head, *(column.name for column in published)])
    for each in run.tasks:
        for place, figure in enumerate(each.task.figures):
            ours = each.figure(figure)
            numbers = [None] * 3 if ours is None else [ours.value, ours.low, ours.high]
            cells = [column.cells.get((each.task.key, place)) for column in published]
            writer.writerow([
                each.task.domain, each.task.name, figure.protocol or each.task.protocol, each.metric(figure),
                each.state,
                *("" if x is None or not math.isfinite(x) else f"{100 * x:.3f}" for x in numbers),
                "" if ours is None or ours.n is None else ours.n, f"{each.seconds:.1f}",
                *("" if cell is None else cell.shown + "?" * cell.is_recalled for cell in cells),
            ])  # fmt: skip
    return page.getvalue()


def render(given: SuiteReport, published: Sequence[Column]) -> str:
    """The page as a string."""
    run = given.run
    tasks = [each.task for each in run.tasks]
    ours = run.values()
    own = papers_own(published)
    tables = [_table(run, source, group) for source, group in _by_source(published)]
    drawn = chart(run, published)
    template = report.environment().get_template("suite.html")
    return template.render(
        given=given,
        headline=headline(run, averages(tasks, ours, run.cannot())),
        measured=[each for each in run.tasks if each.state in HAS_FIGURES],
        beyond=[_beyond(each) for each in run.tasks if each.state in HAS_FIGURES],
        tables=tables[:OPEN_TABLES],
        folded=tables[OPEN_TABLES:],
        absent=[
            (title, [each for each in run.tasks if each.state == state])
            for state, title in STATE_TITLES.items()
            if any(each.state == state for each in run.tasks)
        ],
        chart=json.dumps(drawn, separators=(",", ":")).replace("<", "\\u003c"),  # may stand in a page
        comparable=len(drawn["columns"]) > 1,
        first=own.name if own is not None else "",
        ours=OURS,
        domain_titles=DOMAIN_TITLES,
    )


def headline(run: SuiteRun, own: Averages) -> list[str]:
    """What was measured, in a few sentences."""
    counts = {domain: [each for each in run.tasks if each.task.domain == domain] for domain in DOMAINS}
    sentences = []
    done = sum(each.state in HAS_FIGURES for each in run.tasks)
    sentences.append(f"Figures of {done} of {len(run.tasks)} tasks.")
    for domain, tasks in counts.items():
        if not tasks:
            continue
        have = sum(each.is_comparable for each in tasks)
        average = own.domains.get(domain)
        title = DOMAIN_TITLES[domain]
        if average is not None:
            sentences.append(f"{title}: {average:.2f} on average over all {len(tasks)} tasks.")
        elif have:
            sentences.append(
                f"{title}: {have} of {len(tasks)} tasks, so there is no average to set beside the paper's."
            )
    if own.macro is not None:
        sentences.append(f"Macro average: {own.macro:.2f}; a domain that the model cannot do counts 0.")
    return sentences


def _by_source(published: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Columns of one published table together; those tables first that have most of these figures."""
    groups: dict[str, list[Column]] = {}
    for column in published:
        groups.setdefault(column.source, []).append(column)
    return sorted(groups.items(), key=lambda group: -sum(len(column.cells) for column in group[1]))


def _table(run: SuiteRun, source: str, group: list[Column]) -> dict[str, Any]:
    """Rows of one published table: those that it has a number for, with ours first."""
    rows: list[dict[str, Any]] = []
    for domain in DOMAINS:
        inside = []
        for each in run.tasks:
            for place, figure in enumerate(each.task.figures):
                cells = [column.cells.get((each.task.key, place)) for column in group]
                if each.task.domain == domain and any(cells):
                    inside.append({
                        "title": run.title(each.task), "metric": each.metric(figure), "ours": each.figure(figure),
                        "cells": cells, "state": each.state,
                    })  # fmt: skip
        if inside:
            rows.append({"domain": DOMAIN_TITLES[domain], "rows": inside})
    tasks = [each.task for each in run.tasks]
    formed = [averages(tasks, run.values(), run.cannot())]
    formed += [averages(tasks, column.values()) for column in group]
    means = [
        (title, [values.domains.get(domain) for values in formed])
        for domain, title in DOMAIN_TITLES.items()
        if any(values.domains.get(domain) is not None for values in formed)
    ]
    if any(values.macro is not None for values in formed):
        means.append(("Macro", [values.macro for values in formed]))
    return {"source": source, "columns": group, "domains": rows, "averages": means}


def _beyond(each: TaskRun) -> dict[str, Any]:
    """Every figure of a task, those that no paper prints among them."""
    prefix = f"{each.task.prefix}."
    named = {name.removeprefix(prefix): result for name, result in each.results.items()}
    reported = named.pop(each.task.prefix, None)  # what fine-tuning reports: the task's own title
    figures = list(named.items())
    if reported is not None and reported not in named.values():  # a mean of several, of MNLI say
        figures.insert(0, ("mean" if figures else "reported", reported))
    return {"run": each, "figures": figures}


def relative_differences(first: Mapping[Place, float], second: Mapping[Place, float]) -> dict[Place, float]:
    """100 (first - second) / |second| for the figures that both have, in the first's order; where the second is 0 there
    is none. A correlation may be negative: its size, not its sign, is what a difference is a share of."""
    return {
        place: 100 * (value - second[place]) / abs(second[place]) for place, value in first.items() if second.get(place)
    }


def chart(run: SuiteRun, published: Sequence[Column]) -> dict[str, Any]:
    """All that the page's chart can draw.

    Returns:
        `columns`: names, ours first. `figures`: labels. `pairs[a][b]`: of two columns, by domain, the difference of
        each figure, as [title of the domain, [[place among `figures`, per cent], ...]].
    """
    placed = [
        (domain, each.task, place, figure)
        for domain in DOMAINS
        for each in run.tasks
        if each.task.domain == domain
        for place, figure in enumerate(each.task.figures)
    ]
    order: dict[Place, int] = {(task.key, place): number for number, (_, task, place, _) in enumerate(placed)}
    ours = {place: value for place, value in run.values().items() if math.isfinite(value)}
    given = [(OURS, ours), *((column.name, column.values()) for column in published)]
    given = [(name, {place: values[place] for place in order if place in values}) for name, values in given if values]

    def by_domain(differences: Mapping[Place, float]) -> list[tuple[str, list[tuple[int, float]]]]:
        rows = [(order[place], round(change, 1)) for place, change in differences.items()]
        return [
            (DOMAIN_TITLES[domain], list(inside)) for domain, inside in groupby(rows, key=lambda row: placed[row[0]][0])
        ]

    return {
        "columns": [name for name, _ in given],
        "figures": [
            f"{run.title(task)} {task.metric(figure)}" if len(task.figures) > 1 else run.title(task)
            for _, task, _, figure in placed
        ],
        "pairs": [[by_domain(relative_differences(first, second)) for _, second in given] for _, first in given],
    }
