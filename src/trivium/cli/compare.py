"""`trivium compare`: two runs side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trivium.evaluate.compare import Comparison


def compare(left: Path, right: Path, *, out: Path | None = None) -> None:
    """Lay two runs side by side: the settings that differ, and the results with a paired bootstrap of each difference.

    Args:
        left: a run folder.
        right: another, whose difference from the first is shown.
        out: a page to write that shows the training curves too, such as compare.html.
    """
    from trivium.errors import TriviumError
    from trivium.evaluate import compare as comparison
    from trivium.manifest import write_whole
    from trivium.train import config

    for run in (left, right):
        if not run.is_dir() or not (run / "config.json").is_file() or not (run / "metrics.jsonl").is_file():
            raise TriviumError(f"{run} is no run folder, which holds config.json and metrics.jsonl: give two runs")
    if left.samefile(right):
        raise TriviumError(f"{left} and {right} are the same run: give two")
    if out is not None and out.is_dir():
        raise TriviumError(f"{out} is a folder: name the page itself, such as --out {out / 'compare.html'}")
    sides = []
    for run in (left, right):
        settings = config.load(run)
        of_recipe = {f"({name})": value for name, value in settings.arguments.items()}
        values = {"(recipe)": settings.recipe, **of_recipe, **settings.values}
        sides.append(comparison.read_side(run, values, str(run)))
    found = comparison.compare(*sides)
    _print(found)
    if out is not None:
        write_whole(out, comparison.render(found, shlex.join(["trivium", *sys.argv[1:]])))
        print(f"page: {out}")


def _print(found: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trivium.evaluate.compare import interval, shown

    def table(*columns: str) -> Table:
        made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for number, column in enumerate(columns):
            made.add_column(Text(column), justify="right" if number else "left", overflow="fold")
        return made

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if found.fields:
        fields = table("settings that differ", found.left.name, found.right.name)
        for entry in found.fields:
            fields.add_row(*map(Text, entry))
        console.print(fields)
    else:
        console.print("No setting differs.\n")
    if found.differences:
        figures = table("results (95 % intervals)", found.left.name, found.right.name, "difference", "", "queries")
        for each in found.differences:
            results = [
                f"{shown(each.name, side.value)}  {interval(each.name, side)}" for side in (each.left, each.right)
            ]
            difference = f"{shown(each.name, each.value, sign=True)}  {interval(each.name, each, sign=True)}"
            verdict = Text(each.verdict, style={"better": "green", "worse": "red"}.get(each.verdict, ""))
            pairs = f"{each.pairs:,}" if each.pairs else ""
            figures.add_row(Text(each.name), *map(Text, results), Text(difference), verdict, Text(pairs))
        console.print(figures)
    for sentence in found.summary():
        console.print(Text(sentence))
