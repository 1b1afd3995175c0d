"""Two runs side by side: the fields that differ, the curves on one pair of axes, the results with their differences.

A difference has an interval of its own where both runs kept their outcomes (see outcomes.py): a paired bootstrap draws
the same queries again for both and takes the difference each time. What is hard for both models then cancels, so that
it tells apart what two intervals that overlap do not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trivium.errors import TriviumError
from trivium.evaluate import charts, matching, metrics, outcomes, report, results
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.report import LOSS_TITLES
from trivium.evaluate.results import Result, Results, bootstrap

NONE = "–"
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(values.mean()),
    "median": lambda values: float(np.median(values)),
    "auroc": lambda pairs: matching.auroc(pairs[:, 0], pairs[:, 1]),
    "matthews": lambda answers: metrics.matthews(answers[:, 0], answers[:, 1]),
}


@dataclass(frozen=True)
class Side:
    """One of the two runs. What it has not got yet is empty."""

    name: str  # how messages and the page call it
    config: Mapping[str, Any] = field(default_factory=dict)  # leaves by their dotted path
    curves: Mapping[str, charts.Curve] = field(default_factory=dict)
    results: Results = field(default_factory=dict)  # without "seconds."
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One figure of both runs. low and high: of the difference, None where its queries cannot be paired."""

    name: str
    left: Result
    right: Result
    value: float  # right - left, over the units that can be paired where there are some
    low: float | None = None
    high: float | None = None
    pairs: int | None = None  # units that both were measured on

    @property
    def verdict(self) -> str:
        """ "better" or "worse", of the right run, where the interval leaves out 0; else empty."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return ""
        return "better" if (self.high < 0) == _less_is_better(self.name) else "worse"


@dataclass(frozen=True)
class Comparison:
    left: Side
    right: Side
    fields: list[tuple[str, str, str]]  # dotted path, and the value in both
    differences: list[Difference]
    notes: list[str]  # what is missing, a sentence each

    def summary(self) -> list[str]:
        """What a terminal and the page say first."""
        paired = [difference for difference in self.differences if difference.pairs]
        found = Counter(difference.verdict for difference in paired)
        if not paired:
            return self.notes
        first = (
            f"Of {len(paired)} figures that both runs were measured on, query by query, {self.right.name} is better in"
            f" {found['better']} and worse in {found['worse']}; {found['']} cannot be told apart."
        )
        return [first, *self.notes]


def read_side(run: Path, config: Mapping[str, Any], name: str) -> Side:
    """What a run folder holds. config: its leaves. Raises TriviumError where one of its files is damaged."""
    measured = results.read(run / "results.json") if (run / "results.json").exists() else {}
    return Side(
        name,
        config,
        report.read_curves(run / "metrics.jsonl"),
        {figure: result for figure, result in measured.items() if not figure.startswith("seconds.")},
        outcomes.read(run / outcomes.NAME),
    )


def compare(left: Side, right: Side) -> Comparison:
    """Raises TriviumError where the two have nothing in common."""
    differences = [
        difference(name, left, right)
        for name in left.results
        if name in right.results and not _same_chance(name, left, right)
    ]
    if left.results and right.results and not differences:
        raise TriviumError(
            f"{left.name} was measured in {_kinds(left)} and {right.name} in {_kinds(right)}, so no figure is common to"
            " both: run trivium evaluate on both in the same way"
        )
    if not differences and not (left.curves and right.curves):
        raise TriviumError(
            f"{left.name} and {right.name} have neither curves nor results in common: train or evaluate them first"
        )
    return Comparison(left, right, differing_fields(left, right), differences, list(_notes(left, right, differences)))


def difference(name: str, left: Side, right: Side) -> Difference:
    """One figure that both have, with the interval of its difference where queries of the same name can be paired."""
    results_of = left.results[name], right.results[name]
    apart = Difference(name, *results_of, results_of[1].value - results_of[0].value)
    mine, theirs = _outcomes(left, name), _outcomes(right, name)
    if mine is None or theirs is None or mine.statistic != theirs.statistic:
        return apart
    place = {unit: row for row, unit in enumerate(theirs.units)}
    rows = np.array([(row, place[unit]) for row, unit in enumerate(mine.units) if unit in place], dtype=np.int64)
    if not len(rows):
        return apart
    statistic, of_left, of_right = STATISTICS[mine.statistic], mine.values[rows[:, 0]], theirs.values[rows[:, 1]]

    def between(drawn: np.ndarray) -> float:
        return statistic(of_right[drawn]) - statistic(of_left[drawn])

    groups = None if mine.groups is None else [mine.groups[row] for row in rows[:, 0]]
    low, high = bootstrap(between, len(rows), groups)
    return Difference(name, *results_of, between(np.arange(len(rows))), low, high, len(rows))


def differing_fields(left: Side, right: Side) -> list[tuple[str, str, str]]:
    """(dotted path, value, value) where two configs differ; what one of them has not got is a dash."""
    paths = [*left.config, *(path for path in right.config if path not in left.config)]
    both = [(path, str(left.config.get(path, NONE)), str(right.config.get(path, NONE))) for path in paths]
    return [entry for entry in both if entry[1] != entry[2]]


def _outcomes(side: Side, name: str) -> Outcomes | None:
    """The outcomes of a figure, where they are those that it was made of: another evaluation may have been since."""
    found = side.outcomes.get(name)
    if found is None or not math.isclose(
        STATISTICS[found.statistic](found.values), side.results[name].value, rel_tol=1e-4, abs_tol=1e-6
    ):
        return None
    return found


def _notes(left: Side, right: Side, differences: list[Difference]) -> Iterator[str]:
    for side in (left, right):
        if not side.results:
            yield f"{side.name} has no results yet: trivium evaluate {side.name} measures it."
        elif not side.outcomes:
            yield (
                f"{side.name} kept no outcomes of its queries, so both intervals stand where that of the difference"
                f" would: trivium evaluate {side.name} writes outcomes.parquet."
            )
    if left.outcomes and right.outcomes and differences and not any(difference.pairs for difference in differences):
        yield "The two were measured on different queries, so both intervals stand where that of the difference would."


def _same_chance(name: str, left: Side, right: Side) -> bool:
    """Whether a loss is measured against the same guess in both, as people read it: then nobody needs to see it."""
    mine, theirs = (shown(name, side.results[name].value) for side in (left, right))
    return name.endswith(".chance") and mine == theirs


def _kinds(side: Side) -> str:
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in side.results))


def _less_is_better(name: str) -> bool:
    return name.startswith("losses.") or "median_rank" in name


# --------------------------------------------------------------------------------------------- what is shown


# What a figure is by its name, with the form of its number and its unit; every other one is a share, in per cent.
# Of several seeds, or of guessing, its name goes on.
_BESIDE = r"(\.(median|lowest|highest|majority))?"
FORMS = {
    re.compile(f"(?:{pattern}){_BESIDE}"): form
    for pattern, form in {
        r"losses\..*": (".3f", ""),
        r".*median_rank": (",.4g", ""),
        r"codes\.perplexity(_\w+)?": (",.1f", ""),
        r"reconstruction\.(psnr|mean_picture_psnr|gain)": (".2f", "dB"),
        r"(.*\.)?(matthews|pearson|spearman)|glue\.cola": (".3f", ""),  # a correlation
        r"updates(\.pairs)?": (",.0f", ""),
    }.items()
}


def shown(name: str, value: float, *, sign: bool = False) -> str:
    """A figure as people read it: shares in per cent, others as they are, with their unit."""
    if not math.isfinite(value):
        return NONE
    plus = "+" if sign and value >= 0 else ""
    form, unit = next((form for pattern, form in FORMS.items() if pattern.fullmatch(name)), (".1f", "%"))
    number = f"{plus}{100 * value if unit == '%' else value:{form}}"
    return f"{number}\N{NO-BREAK SPACE}{unit}" if unit else number


def interval(name: str, result: Result | Difference, *, sign: bool = False) -> str:
    """The two ends as people read them; empty where there is none."""
    if result.low is None or result.high is None:
        return ""
    return f"{shown(name, result.low, sign=sign)} to {shown(name, result.high, sign=sign)}"


def render(found: Comparison, command: str = "") -> str:
    """One self-contained HTML page. command: that made it."""
    sides = (found.left, found.right)
    names = dict.fromkeys([*LOSS_TITLES, *(name for side in sides for name in side.curves)])
    curves = {report.loss_title(name)[0]: [side.curves.get(name, []) for side in sides] for name in names}
    template = report.environment().get_template("compare.html")
    return template.render(
        found=found,
        sides=list(zip(sides, charts.COMPARED, strict=True)),
        charts=[(title, charts.compared_curves(title, both)) for title, both in curves.items() if any(both)],
        shown=shown,
        interval=interval,
        command=command,
    )
