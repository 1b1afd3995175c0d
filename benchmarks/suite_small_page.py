"""The page of the small table: a line a figure and start, a column a model, and below it what is to be said of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FLOOR, RANDOM = "no model", "random start"


def page(cells: Sequence[dict[str, Any]], command: str, about: Sequence[str]) -> str:
    """Markdown: a line a figure and start, a column a model, in per cent with 95 % intervals."""
    columns = list(dict.fromkeys(cell["model"] for cell in cells))
    columns = [FLOOR, *(name for name in columns if name != FLOOR)]
    lines = ["# Tiny models on real data", "", *about, "", f"    {command}", ""]
    lines += ["| | | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        of_task = [cell for cell in cells if cell["task"] == task]
        names = dict.fromkeys(name for cell in of_task for name in cell["figures"] if "mean_per_class" not in name)
        for name in names:
            for start in ("trained", RANDOM):
                shown = [
                    _shown(
                        name, next((cell["figures"].get(name) for cell in of_task if _fits(cell, column, start)), None)
                    )
                    for column in columns
                ]
                if any(each != "–" for each in shown):
                    title = name.replace("zero_shot", "zero-shot").replace("_", " ").replace(".", ", ")
                    lines.append(f"| {task}: {title} | {start} | " + " | ".join(shown) + " |")
    lines += ["", "Notes", "", *_footnotes(cells)]
    return "\n".join(lines) + "\n"


def _footnotes(cells: Sequence[dict[str, Any]]) -> list[str]:
    """A line a note and task, with the cells that it is of, where there are others."""
    lines = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        of_task = [cell for cell in cells if cell["task"] == task]
        for note in dict.fromkeys(note for cell in of_task for note in cell["notes"]):
            noted = [f"{cell['model']}, {cell['variant']}" for cell in of_task if note in cell["notes"]]
            of = "" if len(noted) == len(of_task) else f" ({'; '.join(noted)})"
            lines.append(f"- {task}{of}: {note}")
    return lines


def _fits(cell: dict[str, Any], column: str, start: str) -> bool:
    return cell["model"] == column and (cell["variant"] == RANDOM) == (start == RANDOM)


def _shown(name: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    if name.endswith("median_rank"):
        return f"{result['value']:g}"
    value = f"{100 * result['value']:.1f}"
    return value if result.get("low") is None else f"{value} ({100 * result['low']:.1f}–{100 * result['high']:.1f})"
