"""outcomes.parquet: what a figure is made of, unit by unit, so that two runs can be compared on the same units.

One row for each figure and unit (a query, a picture), in the columns

    figure      its name in results.json
    statistic   how it comes from the values: "mean", "median", "auroc" or "matthews"
    unit        name of the query or picture, the same in every run
    group       what units that are right and wrong together have in common, such as the picture of its captions; else
                null
    value       a hit (1 or 0), a rank; for "auroc" the score of the unit's true pair; for "matthews" the answer
    other       for "auroc" the score of its false pair, for "matthews" the truth, else null
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trivium.errors import TriviumError
from trivium.manifest import file_beside

NAME = "outcomes.parquet"
COLUMNS = {
    "figure": pa.string(), "statistic": pa.string(), "unit": pa.string(), "group": pa.string(), "value": pa.float32(),
    "other": pa.float32(),
}  # fmt: skip
Statistic = Literal["mean", "median", "auroc", "matthews"]
OF_TWO = ("auroc", "matthews")  # numbers of each unit


@dataclass(frozen=True)
class Outcomes:
    """The values of one figure. N units."""

    statistic: Statistic
    units: tuple[str, ...]  # N names, each once
    values: np.ndarray  # float32 [N]; [N, 2] for OF_TWO: the true pair first, the answer first
    groups: tuple[str, ...] | None = None  # N; units of one group are drawn together. None: each is alone

    def __post_init__(self) -> None:
        assert len(set(self.units)) == len(self.units) == len(self.values), "each unit has one name and one outcome"
        assert self.groups is None or len(self.groups) == len(self.units), "each unit has one group"


def write(path: Path, outcomes: Mapping[str, Outcomes]) -> None:
    """Write the file whole or not at all; with no outcomes, remove the one that stands there.

    Raises:
        TriviumError: the folder cannot be written to.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for figure, found in outcomes.items():
        pairs = np.asarray(found.values, dtype=np.float32).reshape(len(found.units), -1)
        columns["figure"].append(np.full(len(pairs), figure, dtype=object))
        columns["statistic"].append(np.full(len(pairs), found.statistic, dtype=object))
        columns["unit"].append(np.array(found.units, dtype=object))
        columns["group"].append(np.array(found.groups or [None] * len(pairs), dtype=object))
        columns["value"].append(pairs[:, 0])
        columns["other"].append(pairs[:, 1] if pairs.shape[1] > 1 else np.full(len(pairs), np.nan, dtype=np.float32))
    try:
        if not outcomes:
            path.unlink(missing_ok=True)
            return
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        table = pa.table({name: pa.array(array, COLUMNS[name], from_pandas=True) for name, array in arrays.items()})
        with file_beside(path) as beside:
            pq.write_table(table, beside, compression="zstd")
    except OSError as error:
        raise TriviumError(f"{path} cannot be written ({error.strerror}): free space or name another folder") from error


def read(path: Path) -> dict[str, Outcomes]:
    """The outcomes of each figure; none where there is no such file.

    Raises:
        TriviumError: the file is not one of ours.
    """
    if not path.exists():
        return {}
    try:
        table = pq.read_table(path)
        if "group" not in table.column_names:  # written before there were any
            table = table.append_column("group", pa.nulls(len(table), pa.string()))
        figures, statistics, units, groups = (
            table[name].to_numpy(zero_copy_only=False) for name in ("figure", "statistic", "unit", "group")
        )
        values = np.stack([table[name].to_numpy().astype(np.float32) for name in ("value", "other")], axis=1)
        found = {}
        for figure in dict.fromkeys(figures.tolist()):
            rows = figures == figure
            statistic = statistics[rows][0]
            if statistic not in get_args(Statistic):
                raise ValueError(f"there is no statistic {statistic}")
            kept = values[rows] if statistic in OF_TWO else values[rows, 0]
            together = tuple(groups[rows].tolist())
            found[figure] = Outcomes(
                statistic, tuple(units[rows].tolist()), kept, None if None in together else together
            )
        return found
    except (OSError, ValueError, KeyError, TypeError, AssertionError, pa.ArrowException) as error:
        raise TriviumError(f"{path}: not the outcomes of an evaluation of ours ({error}); evaluate again") from None
