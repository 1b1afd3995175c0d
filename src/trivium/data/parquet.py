"""Samples that are rows of Parquet files, which are read by row groups, the last of which are kept."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trivium.data.files import Kind, readable
from trivium.data.order import WINDOW
from trivium.data.tables import IMAGE_COLUMNS, TEXT_COLUMNS, Table, find_column
from trivium.errors import BadSample, TriviumError, UnreadableNow
from trivium.train.protocol import Blocks

CACHE_BYTES = 256 * 2**20  # of row groups, in each process


class ParquetFiles(Table):
    """Rows of one or more Parquet files. Pictures are bytes, ``{bytes, path}`` or paths; a caption may be a list.

    A block is a row group, and one row costs the whole group unless the cache still has it. So the groups that an
    ``Order`` mixes should fit CACHE_BYTES: of text a few thousand rows each, of pictures about a hundred.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        kind: Kind,
        image_column: str | None = None,
        text_column: str | None = None,
        root: str | Path | None = None,
    ) -> None:
        self.kind = kind
        self.paths = [str(path) for path in paths]
        self.root = root
        rows_of = [self._rows(file) for file in range(len(paths))]
        self._first_rows = list(itertools.accumulate(map(sum, rows_of), initial=0))  # of each file
        groups = [(file, group, rows) for file, held in enumerate(rows_of) for group, rows in enumerate(held)]
        self._groups = [(file, group) for file, group, rows in groups if rows]
        self._starts = np.cumsum([0] + [rows for _, _, rows in groups if rows])
        self._cache: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        self._lengths: np.ndarray | None = None
        names_files = False
        for number, path in enumerate(self.paths):
            schema = self._open(number).schema_arrow
            if kind != "text":
                held = [
                    field.name for field in schema if _holds_pictures(field) and field.name.lower() in IMAGE_COLUMNS
                ]
                named = image_column or (held[0] if len(held) == 1 else None)
                self.image_column = image_column = find_column(path, schema.names, named, IMAGE_COLUMNS, "image-column")
                names_files |= not _holds_pictures(schema.field(image_column))
            if kind != "images":
                self.text_column = text_column = find_column(
                    path, schema.names, text_column, TEXT_COLUMNS, "text-column"
                )
        if not self._groups:
            raise TriviumError(f"{', '.join(self.paths)} has no rows: give a table with at least one")
        if names_files:
            self.refuse_web_addresses()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blocks(self) -> Sequence[range]:
        return Blocks(self._starts)

    @property
    def notes(self) -> list[str]:
        """A sentence where the row groups that an ``Order`` mixes do not fit the cache."""
        window = min(WINDOW, len(self._groups))
        size = sum(map(self._bytes_read, range(len(self.paths)))) / len(self._groups)
        if window * size <= CACHE_BYTES:
            return []
        rows = max(1, int(len(self) / len(self._groups) * CACHE_BYTES / (WINDOW * size)))
        mixed, kept = (f"{number / 2**20:,.0f} MB" for number in (size, CACHE_BYTES))
        return [
            f"{self.paths[0]}: training mixes {window} row groups of {mixed}, and {kept} are kept, so that many samples"
            f" cost a whole group: write groups of at most {rows:,} rows, or use `trivium data pack`"
        ]

    def where(self, row: int) -> tuple[str, str]:
        """Rows are counted from 0 within a file, as Parquet's own tools do."""
        file = self._groups[self._group(row)][0]
        return self.paths[file], f"row {row - self._first_rows[file]}"

    def cell(self, row: int, column: str) -> Any:
        group = self._group(row)
        return self._column(group, column)[row - int(self._starts[group])].as_py()

    def lengths(self) -> Sequence[int] | None:
        """In characters; of several captions the longest; 0 in a row group that is damaged. Raises UnreadableNow."""
        if self.kind == "images":
            return None
        if self._lengths is None:
            self._lengths = np.concatenate([self._lengths_in(group) for group in range(len(self._groups))])
        return self._lengths  # type: ignore[return-value]  # an array serves as the sequence

    def _lengths_in(self, group: int) -> np.ndarray:
        try:
            return _text_lengths(self._column(group, self.text_column or ""))
        except BadSample as error:
            if isinstance(error, UnreadableNow):  # another process may read it, and would sort its batches otherwise
                raise
            return np.zeros(self._starts[group + 1] - self._starts[group], np.int64)

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _column(self, group: int, column: str) -> pa.ChunkedArray:
        """A column of a row group, from the cache or the file. Raises BadSample."""
        if (group, column) in self._cache:
            self._cache.move_to_end((group, column))
            return self._cache[group, column]
        file, number = self._groups[group]
        try:
            values = pq.ParquetFile(self.paths[file]).read_row_group(number, columns=[column])[column]
        except (pa.ArrowException, OSError) as error:
            # A number is of the system's own error; Arrow says without one that the bytes are damaged.
            is_damaged = getattr(error, "errno", None) is None
            kind = BadSample if is_damaged else UnreadableNow
            raise kind(self.paths[file], f"row group {number}", f"it cannot be read: {error}") from None
        self._cache[group, column] = values
        while len(self._cache) > 2 and sum(kept.nbytes for kept in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return values

    def _rows(self, file: int) -> list[int]:
        facts = self._open(file).metadata
        return [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]

    def _bytes_read(self, file: int) -> int:
        """What the columns that are read hold, unpacked."""
        facts = self._open(file).metadata
        groups = map(facts.row_group, range(facts.num_row_groups))
        columns = (group.column(column) for group in groups for column in range(facts.num_columns))
        wanted = (self.image_column, self.text_column)
        return sum(each.total_uncompressed_size for each in columns if each.path_in_schema.split(".")[0] in wanted)

    def _open(self, file: int) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.paths[file])
        except UnicodeEncodeError:  # Arrow has no other paths
            raise TriviumError(
                f"{readable(self.paths[file])}: the path of a Parquet file must be UTF-8: rename it"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise TriviumError(f"{self.paths[file]} is no readable Parquet file: {error}") from None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_cache": OrderedDict()}


def _holds_pictures(field: pa.Field) -> bool:
    return pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type) or pa.types.is_struct(field.type)


def _text_lengths(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return pc.fill_null(pc.utf8_length(column), 0).to_numpy().astype(np.int64)
    texts = (cell if isinstance(cell, list) else [cell] for cell in column.to_pylist())
    return np.array([max((len(text) for text in cell if isinstance(text, str)), default=0) for cell in texts], np.int64)
