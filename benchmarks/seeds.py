"""Whether one way of training is better than another, from few runs of each.

Two things are left to chance: which units a figure is measured on, and the seed of a run. An interval over the units
alone takes whatever the seeds did for the way's doing: with two seeds whose figures differ by a point or two it calls a
third of all differences real where there is none. So the spread of the seeds is in it too. Of two or three runs no
spread can be told; it is taken over all cells that are beside each other in a table, about the mean of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from scipy import stats

from trivium.evaluate.results import Result


class Spread(NamedTuple):
    """Of a run's figure about the mean of its cell."""

    variance: float
    freedom: int  # of how many runs beyond one a cell it was taken

    def half_width(self, seeds: int) -> float:
        """Of the 95 % interval of a difference between two means over so many seeds each; without end where unknown."""
        if self.freedom == 0:
            return math.inf
        return float(stats.t.ppf(0.975, self.freedom)) * math.sqrt(2 * self.variance / seeds)


def spread(cells: Iterable[Sequence[float]]) -> Spread:
    """Pooled over cells, each with the figures of its seeds."""
    squares, freedom = 0.0, 0
    for figures in cells:
        mean = sum(figures) / max(1, len(figures))
        squares += sum((figure - mean) ** 2 for figure in figures)
        freedom += max(0, len(figures) - 1)
    return Spread(squares / max(1, freedom), freedom)


def widened(gap: Result, over: Spread, seeds: int) -> Result:
    """A difference whose interval is that over units, with the spread of its seeds beside."""
    assert gap.low is not None and gap.high is not None
    half = over.half_width(seeds)
    return replace(
        gap,
        low=gap.value - math.hypot(gap.value - gap.low, half),
        high=gap.value + math.hypot(gap.high - gap.value, half),
    )


def brackets(result: Result) -> str:
    """An interval in per cent; from one run of each way it would be without end."""
    assert result.low is not None and result.high is not None
    if not math.isfinite(result.low):
        return "[one seed]"
    return f"[{100 * result.low:.1f}, {100 * result.high:.1f}]"


def verdict(gap: Result, each: Sequence[float], seeds: int) -> str:
    """ "better" or "worse" where the interval of the difference is beyond 0 and all so many seeds say the same, too.

    each: the differences seed by seed.
    """
    assert gap.low is not None and gap.high is not None
    if len(each) < seeds:
        return "not all seeds"
    if gap.low > 0 and min(each) > 0:
        return "better"
    return "worse" if gap.high < 0 and max(each) < 0 else "undecided"
