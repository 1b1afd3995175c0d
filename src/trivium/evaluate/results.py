"""results.json: every figure of an evaluation under one name, with its interval and the number it rests on.

    {schema, command, version, machine, seconds, results: {name: {value, low, high, n, published?}}}

Intervals are percentile bootstraps (Efron 1979) of 95 %: the units (queries, pictures) are drawn again with
replacement, always with the same seed, so a report made twice is the same report. What each unit gave stands in
outcomes.parquet beside it (see outcomes.py). N units.
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


def bootstrap(statistic: Callable[[np.ndarray], float], num_units: int, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic.

    Args:
        statistic: takes the indices of the units drawn, int64 [N] with repeats, and returns a number.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(num_units, size=num_units)) for _ in range(REPLICATES)]
    return _ends(values)


def mean_of(values: np.ndarray, units: Sequence[str] | None = None) -> Result:
    """Mean of one value per unit (a hit, a correct answer), [N], with its interval. units: their names."""
    return _over_units("mean", np.mean, values, units)


def median_of(values: np.ndarray, units: Sequence[str] | None = None) -> Result:
    """Median of one value per unit, [N], with its interval. units: their names."""
    return _over_units("median", np.median, values, units)


def _over_units(
    statistic: Statistic, function: Callable[[np.ndarray], Any], values: np.ndarray, units: Sequence[str] | None
) -> Result:
    assert len(values), f"the {statistic} of nothing"
    values = np.asarray(values, dtype=np.float64)
    low, high = bootstrap(lambda drawn: float(function(values[drawn])), len(values))
    kept = None if units is None else Outcomes(statistic, tuple(units), values.astype(np.float32))
    return Result(float(function(values)), low, high, len(values), outcomes=kept)


def mean_over(parts: Sequence[Result]) -> Result:
    """Mean of several means over units of their own, such as those of two splits, each of which counts alike. For the
    interval the units of each are drawn for themselves; there is none where one came without its outcomes."""
    value, count = float(np.mean([part.value for part in parts])), sum(part.n or 0 for part in parts)
    kept = [part.outcomes.values for part in parts if part.outcomes is not None and part.outcomes.statistic == "mean"]
    if len(kept) < len(parts):
        return Result(value, n=count)
    rng = np.random.default_rng(0)
    draws = [
        np.mean([values[rng.integers(len(values), size=len(values))].mean() for values in kept])
        for _ in range(REPLICATES)
    ]
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
) -> None:
    """Write results.json, and outcomes.parquet beside it, each whole or not at all.

    `seconds` ("train", "total", ...) stands at the top and, as `seconds.train` and so on, among the results.

    Raises:
        TriviumError: the folder cannot be written to.
    """
    timed = {f"seconds.{name}": Result(value) for name, value in seconds.items()}
    content = {
        "schema": SCHEMA,
        "command": command,
        "version": version,
        "machine": dict(machine),
        "seconds": dict(seconds),
        "results": {name: result.as_json() for name, result in {**timed, **results}.items()},
    }
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
