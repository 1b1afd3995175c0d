"""results.json: every figure of an evaluation under one name, with its interval and the number it rests on.

    {schema, command, version, machine, seconds, results: {name: {value, low, high, n, published?}}, notes?}

Intervals are percentile bootstraps (Efron 1979) of 95 %: the units (queries, pictures) are drawn again with
replacement, always with the same seed, so a report made twice is the same report. Units of one group, such as the
captions of a picture or the questions on it, are right and wrong together, so they are drawn together: taken for
independent they would make an interval too narrow. What each unit gave stands in outcomes.parquet beside it (see
outcomes.py). N units.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trivium.errors import TriviumError
from trivium.evaluate import outcomes
from trivium.evaluate.outcomes import Outcomes, Statistic
from trivium.manifest import write_whole

SCHEMA = 1
REPLICATES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Result:
    """One figure. low and high: the ends of its 95 % interval, None where it has none. n: units it is taken over."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    published: float | None = None  # the same figure in a paper
    outcomes: Outcomes | None = field(default=None, compare=False, repr=False)  # unit by unit

    def as_json(self) -> dict[str, float | int | None]:
        entry = {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
        if self.published is not None:
            entry["published"] = self.published
        # JSON knows no NaN: a loss that diverged is null.
        return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in entry.items()}


Results = dict[str, Result]


class Draws:
    """Units that are drawn again. groups: of each unit; None: each is alone."""

    def __init__(self, num_units: int, groups: Sequence[str] | None = None) -> None:
        self._num_units = num_units
        self._groups: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        if groups is not None:
            number_of: dict[str, int] = {}
            number_N = np.array([number_of.setdefault(group, len(number_of)) for group in groups], dtype=np.int64)
            size_G = np.bincount(number_N)
            self._groups = np.argsort(number_N, kind="stable"), np.cumsum(size_G) - size_G, size_G

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """Indices with repeats, as many groups as there are: int64 [N], where groups are of one size."""
        if self._groups is None:
            return rng.integers(self._num_units, size=self._num_units)
        order_N, first_G, size_G = self._groups
        drawn_G = rng.integers(len(size_G), size=len(size_G))
        size, end = size_G[drawn_G], np.cumsum(size_G[drawn_G])
        inside = np.arange(end[-1]) - np.repeat(end - size, size)
        return np.asarray(order_N[np.repeat(first_G[drawn_G], size) + inside])


def bootstrap(
    statistic: Callable[[np.ndarray], float], num_units: int, groups: Sequence[str] | None = None
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic.

    Args:
        statistic: takes the indices of the units drawn, int64 with repeats, and returns a number.
        groups: of each unit; None: each is alone.
    """
    rng, drawn = np.random.default_rng(0), Draws(num_units, groups)
    return _ends([statistic(drawn(rng)) for _ in range(REPLICATES)])


def mean_of(values: np.ndarray, units: Sequence[str] | None = None, groups: Sequence[str] | None = None) -> Result:
    """Mean of one value per unit (a hit, a correct answer), [N], with its interval. units: their names."""
    return _over_units("mean", np.mean, values, units, groups)


def median_of(values: np.ndarray, units: Sequence[str] | None = None, groups: Sequence[str] | None = None) -> Result:
    """Median of one value per unit, [N], with its interval. units: their names."""
    return _over_units("median", np.median, values, units, groups)


def _over_units(
    statistic: Statistic,
    function: Callable[[np.ndarray], Any],
    values: np.ndarray,
    units: Sequence[str] | None,
    groups: Sequence[str] | None,
) -> Result:
    assert len(values), f"the {statistic} of nothing"
    values = np.asarray(values, dtype=np.float64)
    low, high = bootstrap(lambda drawn: float(function(values[drawn])), len(values), groups)
    kept = None
    if units is not None:
        kept = Outcomes(statistic, tuple(units), values.astype(np.float32), None if groups is None else tuple(groups))
    return Result(float(function(values)), low, high, len(values), outcomes=kept)


def mean_over(parts: Sequence[Result]) -> Result:
    """Mean of several means over units of their own, such as those of two splits, each of which counts alike. For the
    interval the units of each are drawn for themselves; there is none where one came without its outcomes."""
    value, count = float(np.mean([part.value for part in parts])), sum(part.n or 0 for part in parts)
    kept = [part.outcomes for part in parts if part.outcomes is not None and part.outcomes.statistic == "mean"]
    if len(kept) < len(parts):
        return Result(value, n=count)
    rng, of_parts = np.random.default_rng(0), [(each.values, Draws(len(each.units), each.groups)) for each in kept]
    draws = [np.mean([values[drawn(rng)].mean() for values, drawn in of_parts]) for _ in range(REPLICATES)]
    return Result(value, *_ends(draws), count)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def write(
    path: Path,
    results: Mapping[str, Result],
    *,
    command: str,
    version: str,
    machine: Mapping[str, Any],
    seconds: Mapping[str, float],
    notes: Sequence[str] = (),
) -> None:
    """Write results.json, and outcomes.parquet beside it, each whole or not at all.

    `seconds` ("train", "total", ...) stands at the top and, as `seconds.train` and so on, among the results. notes:
    what whoever reads the figures elsewhere is to know of them, a sentence each.

    Raises:
        TriviumError: the folder cannot be written to.
    """
    timed = {f"seconds.{name}": Result(value) for name, value in seconds.items()}
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "version": version,
        "machine": dict(machine),
        "seconds": dict(seconds),
        "results": {name: result.as_json() for name, result in {**timed, **results}.items()},
    }
    if notes:
        content["notes"] = list(notes)
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    kept = {name: result.outcomes for name, result in results.items() if result.outcomes is not None}
    outcomes.write(path.with_name(outcomes.NAME), kept)


def read(path: Path) -> Results:
    """The figures of a results.json.

    Raises:
        TriviumError: there is none, or it is not one of ours.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise TriviumError(f"{path}: schema {content['schema']}, this version reads {SCHEMA}; evaluate again")
        return {
            name: Result(**{**entry, "value": math.nan if entry["value"] is None else entry["value"]})
            for name, entry in content["results"].items()
        }
    except OSError as error:
        raise TriviumError(f"{path} cannot be read ({error.strerror}); evaluate first") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, TriviumError):
            raise
        raise TriviumError(f"{path}: not a results.json of ours ({error!r}); evaluate again") from None


def read_notes(path: Path) -> list[str]:
    """What is to be known of the figures of a results.json that `read` takes."""
    return [str(note) for note in json.loads(path.read_text(encoding="utf-8")).get("notes", [])]
