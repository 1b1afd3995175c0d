"""The ablation's table as files: table.csv, table.json and report.html."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.evaluate import report
from trivium.evaluate.ablation import MACRO_ROWS, Column, Measured, Table, Value
from trivium.evaluate.paper_tasks import DOMAINS
from trivium.manifest import write_whole

TITLES = {
    "language": "Language", "vision": "Vision", "multimodal": "Multimodal", "macro": "Macro average",
    "macro, every dash 0": "Macro average, every dash 0",
}  # fmt: skip
CIRCUMSTANCES: dict[str, Callable[[Measured], float]] = {  # of a run; seeds differ where steps are drawn, or timed
    "updates on pairs": lambda run: run.pair_updates,
    "updates in all": lambda run: run.updates,
    "updates of its towers": lambda run: run.tower_updates,
    "seconds of training": lambda run: run.seconds,
}


def write(
    out: Path, found: Table, *, command: str, machine: Mapping[str, Any], version: str, settings: Sequence[str] = ()
) -> Path:
    """All three into a folder; returns the page's path.

    Args:
        settings: sentences on how the runs were made.

    Raises:
        TriviumError: the folder cannot be written to.
    """
    document = as_json(found) | {"command": command, "machine": dict(machine), "version": version}
    document["settings"] = list(settings)
    write_whole(out / "table.json", json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(out / "table.csv", as_csv(found))
    page = out / "report.html"
    write_whole(page, render(found, command, machine, settings))
    return page


def as_json(found: Table) -> dict[str, Any]:
    """Everything, in shares of 1; the paper's numbers in per cent."""

    def by_column(values: Mapping[tuple[str, str], Value], rows: Sequence[str]) -> dict[str, Any]:
        return {
            row: {c.name: asdict(values[c.name, row]) for c in found.columns if (c.name, row) in values} for row in rows
        }

    return {
        "schema": 1,
        "columns": {c.name: _column(found, c) for c in found.columns},
        "figures": by_column(found.cells, [figure.name for figure in found.figures]),
        "averages": by_column(found.averages, [*DOMAINS, *MACRO_ROWS]),
        "averaged": found.shared,
        "orderings": [
            {
                "claim": each.claim.sentence, "first": each.claim.first, "second": each.claim.second,
                "seeds": each.seeds, "verdict": each.verdict,
                "differences": [
                    asdict(d.ours) | {"domain": d.domain, "paper": d.paper, "verdict": d.verdict}
                    for d in each.differences
                ],
            }
            for each in found.orderings
        ],
        "missing": found.missing,
    }  # fmt: skip


def _column(found: Table, column: Column) -> dict[str, Any]:
    spreads = circumstances(found, column)
    return {
        "title": column.title, "paper": column.paper, "seeds": _seeds(found, column),
        **{name: spread.mean for name, spread in spreads.items()},
        "ranges": {name: [spread.low, spread.high] for name, spread in spreads.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Of a number over the seeds of a column."""

    mean: float
    low: float
    high: float


def circumstances(found: Table, column: Column) -> dict[str, Spread]:
    """Updates and seconds of the runs of this column."""
    runs = [run for run in found.runs if run.column == column.name]
    spreads = {}
    for name, of_run in CIRCUMSTANCES.items():
        values = [of_run(run) for run in runs]
        spreads[name] = Spread(*map(_tenths, (sum(values) / len(values), min(values), max(values))))
    return spreads


def _tenths(number: float) -> float:
    rounded = round(number, 1)
    return int(rounded) if rounded == int(rounded) else rounded


def _seeds(found: Table, column: Column) -> str:
    return ", ".join(map(str, found.seeds(column.name)))


def as_csv(found: Table) -> str:
    """One line a figure or average, in per cent; of each column the mean, both ends, and the paper's number."""
    page = io.StringIO()
    writer = csv.writer(page, lineterminator="\n")
    parts = ("", " low", " high", " paper")
    writer.writerow(["domain", "figure", "n", *(column.name + part for column in found.columns for part in parts)])
    for domain, title, values in _lines(found):
        n = next((value.n for value in values if value is not None and value.n), "")
        writer.writerow([domain, title, n, *(number for value in values for number in _in_csv(value))])
    writer.writerow(["", "seeds", "", *(x for column in found.columns for x in (_seeds(found, column), "", "", ""))])
    for name in CIRCUMSTANCES:
        spreads = [circumstances(found, column)[name] for column in found.columns]
        writer.writerow(["", name, "", *(x for each in spreads for x in (each.mean, each.low, each.high, ""))])
    return page.getvalue()


def _in_csv(value: Value | None) -> list[str]:
    if value is None:
        return [""] * 4
    ours = [value.value, value.low, value.high]
    return [*("" if x is None else f"{100 * x:.2f}" for x in ours), "" if value.paper is None else f"{value.paper:.2f}"]


def _lines(found: Table) -> list[tuple[str, str, list[Value | None]]]:
    """Domain, title and the value of each column: the figures of a domain, then its average."""
    lines = []
    for domain in DOMAINS:
        for figure in found.figures:
            if figure.domain == domain:
                cells = [found.cells.get((column.name, figure.name)) for column in found.columns]
                lines.append((TITLES[domain], figure.title, cells))
        lines.append((TITLES[domain], "average", [found.averages.get((c.name, domain)) for c in found.columns]))
    for row in MACRO_ROWS:
        lines.append(("", TITLES[row], [found.averages.get((column.name, row)) for column in found.columns]))
    return lines


def render(found: Table, command: str, machine: Mapping[str, Any], settings: Sequence[str] = ()) -> str:
    """One self-contained page."""
    titles = {figure.name: figure.title for figure in found.figures}
    template = report.environment().get_template("ablation.html")
    return template.render(
        found=found,
        lines=_lines(found),
        seeds=[_seeds(found, column) for column in found.columns],
        circumstances=[(n, [circumstances(found, column)[n] for column in found.columns]) for n in CIRCUMSTANCES],
        averaged=[(TITLES[domain], [titles[name] for name in names]) for domain, names in found.shared.items()],
        command=command,
        machine=machine,
        settings=settings,
    )
