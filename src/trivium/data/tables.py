"""Samples that are rows of a table: what all tables share, and CSV, TSV and JSONL.

Text tables are scanned once, for the byte offset of each row, and read row by row: a broken row costs that row alone,
and a million rows cost 16 MB.

Easy to get wrong: a CSV field may hold line breaks; a TSV has no quoting, a quote there is a plain character.
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
import zlib
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trivium.data.files import TEXT_LIMIT, Kind, RandomFile, RowSource, readable
from trivium.errors import BadSample, TriviumError

IMAGE_COLUMNS = ("image", "file", "filepath", "path", "url")  # taken, in any case, where no column is named
TEXT_COLUMNS = ("caption", "captions", "text", "title")
LOOKED_AT = 100  # objects of a file without a header, whose names together are its columns

_csv_lock = threading.Lock()
os.register_at_fork(before=_csv_lock.acquire, after_in_parent=_csv_lock.release, after_in_child=_csv_lock.release)


def find_column(
    path: str,
    columns: Sequence[str],
    named: str | None,
    usual: Sequence[str],
    option: str,
    objects: Sequence[Collection[str]] = (),
) -> str:
    """The column that was `named` ("a,b": the first that there is, for tables that differ), or the one with a `usual`
    name. Raises TriviumError with the columns there are.

    objects: the names in each of the first objects of a file without a header. Where they differ, the column is the
        one that most of them have, for one damaged object is not to speak for its file; of a tie the first decides.
    """
    have = f"its columns are {', '.join(columns)}"
    if named is not None:
        known = next((name for name in (named, *named.split(",")) if name in columns), None)
        if known is None:
            raise TriviumError(f'{path} has no column "{named}"; {have}: name one of them with --data.{option}')
        return known
    found = [column for column in columns if column.lower() in usual]
    if len(found) > 1 and objects:
        in_each = (tuple(column for column in found if column in names) for names in objects)
        found = list(Counter(filter(None, in_each)).most_common(1)[0][0])
    if len(found) == 1:
        return found[0]
    trouble = (
        f"more than one column that may be meant ({', '.join(found)})" if found else f"no column {'|'.join(usual)}"
    )
    raise TriviumError(f"{path} has {trouble}; {have}: name one of them with --data.{option}")


class Table(RowSource):
    """Rows with named cells: a picture cell (a path, or the bytes) and a text cell (one or several).

    A path is below `root`; where that is None, below the folder of the row's own file.
    """

    image_column: str | None = None
    text_column: str | None = None
    root: str | Path | None = None

    @abstractmethod
    def cell(self, row: int, column: str) -> Any:
        """Raises BadSample."""

    def picture(self, row: int) -> bytes:
        assert self.image_column is not None
        cell = self.cell(row, self.image_column)
        data = _embedded(cell)
        if data == b"":
            raise self.bad(row, "its picture has zero bytes")
        if data is not None:
            return data
        path = self._path_in(row, cell)
        if path is None:
            raise self.bad(row, f'its column "{self.image_column}" names no picture')
        return self.picture_file(row, path)

    def captions(self, row: int) -> list[str]:
        assert self.text_column is not None
        cell = self.cell(row, self.text_column)
        texts = cell if isinstance(cell, list) else [] if cell is None else [cell]
        if not all(isinstance(text, str) for text in texts):
            raise self.bad(row, f'its column "{self.text_column}" holds no text')
        return texts

    def identity(self, row: int) -> str:
        """A picture that stands in the table is known by its bytes, as in a shard: the path beside them is often only
        the last part of one, and then that of many pictures."""
        if self.image_column is None:
            return super().identity(row)
        cell = self.cell(row, self.image_column)
        if data := _embedded(cell):
            return f"{zlib.crc32(data)} {len(data)}"
        return self._path_in(row, cell) or super().identity(row)

    def picture_path(self, row: int) -> str | None:
        cell = None if self.image_column is None else self.cell(row, self.image_column)
        return self._path_in(row, cell) if _embedded(cell) is None else None

    def refuse_web_addresses(self) -> None:
        """Raises TriviumError where the first row names its picture by address: every other row would fail, too."""
        try:
            cell = None if self.image_column is None else self.cell(0, self.image_column)
        except BadSample:
            return
        if isinstance(cell, str) and cell.startswith(("http://", "https://")):
            file = self.where(0)[0]
            raise TriviumError(f"{file} names pictures by web address ({cell}): download them and name the files")

    def _path_in(self, row: int, cell: object) -> str | None:
        path = cell.get("path") if isinstance(cell, dict) else cell
        if not isinstance(path, str) or not path.strip():
            return None
        root = os.path.dirname(self.where(row)[0]) if self.root is None else self.root
        return os.path.abspath(os.path.join(root, path))


def _embedded(cell: object) -> bytes | None:
    """The bytes of a picture that stands in its cell."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None


# --------------------------------------------------------------------------------- one text file, one row a line


class TextTable(Table):
    """What CSV and JSONL share: where each row begins and ends in the file, and on which line."""

    def __init__(
        self,
        path: str | Path,
        kind: Kind,
        image_column: str | None = None,
        text_column: str | None = None,
        root: str | Path | None = None,
    ) -> None:
        self.kind = kind
        self.root = os.path.dirname(path) if root is None else root  # not of `where`, which is for people
        self.columns: list[str] = []
        self._objects: list[list[str]] = []  # the names in each of the first, where rows are objects
        self._file = RandomFile(str(path))
        self._last: tuple[int, Mapping[str, Any]] = (-1, {})
        starts, stops, lines = array("q"), array("q"), array("q")
        with open(path, "rb") as file:
            for start, stop, line in self._scan(file):
                starts.append(start)
                stops.append(stop)
                lines.append(line)
        self._starts, self._stops, self._lines = (np.frombuffer(column, np.int64) for column in (starts, stops, lines))
        if kind != "text":
            self.image_column = self._find(image_column, IMAGE_COLUMNS, "image-column")
        if kind != "images":
            self.text_column = self._find(text_column, TEXT_COLUMNS, "text-column")
        if not len(self):
            raise TriviumError(f"{path} has no rows below its header: give a table with at least one")
        self.refuse_web_addresses()

    def _find(self, named: str | None, usual: Sequence[str], option: str) -> str:
        return find_column(self._file.path, self.columns, named, usual, option, self._objects)

    @abstractmethod
    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, int, int]]:
        """Start, stop and line number of each row; sets `columns`. Raises TriviumError."""

    @abstractmethod
    def _parse(self, row: int, text: str) -> Mapping[str, Any]:
        """The cells of a row by column. Raises BadSample."""

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, row: int) -> tuple[str, str]:
        return readable(self._file.path), f"line {self._lines[row]}"

    def cell(self, row: int, column: str) -> Any:
        last_row, record = self._last
        if last_row != row:
            data = self.bytes_of(row, self._file, int(self._starts[row]), int(self._stops[row]))
            record = self._parse(row, self.utf8(row, data))
            self._last = (row, record)
        if column not in record:
            raise self.bad(row, f'it has no "{column}"')
        return record[column]

    def cut_texts(self) -> int:
        if self.kind == "images":
            return 0
        cut = 0
        for row in np.flatnonzero(self._stops - self._starts > TEXT_LIMIT).tolist():
            with suppress(BadSample):
                cut += sum(len(text) > TEXT_LIMIT for text in self.captions(row))
        return cut


class Csv(TextTable):
    """A CSV with a header line; below, a TSV."""

    dialect: Mapping[str, Any] = {"delimiter": ","}

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, int, int]]:
        offset = start = number = 0
        last = (0, 0)  # where the last record starts, and its line

        def lines() -> Iterator[str]:
            nonlocal offset
            for line in file:
                mark = b"" if offset else b"\xef\xbb\xbf"  # of UTF-8: before a quoted name it would hide the quote
                offset += len(line)
                # A line that is not UTF-8 is its own row's trouble.
                yield line.removeprefix(mark).decode("utf-8", "surrogateescape")

        with long_fields():
            records = csv.reader(lines(), **self.dialect)
            try:
                for cells in records:
                    if cells and self.columns:
                        yield start, offset, number + 1
                    elif cells:
                        self.columns = self._header(cells)
                    last, start, number = (start, number + 1), offset, records.line_num
            except csv.Error as error:
                raise TriviumError(f"{file.name} (line {records.line_num}) is no CSV: {error}") from None
        if not self.columns:
            raise TriviumError(f"{file.name} is empty: its first line must name the columns")
        if number > last[1] and self._never_closes(last[0], offset):
            raise TriviumError(
                f"{file.name}: a quote opened in the row at line {last[1]} never closes: close or double it"
            )

    def _never_closes(self, start: int, stop: int) -> bool:
        """Whether the rest of the file was taken for one quoted field."""
        text = self._file.read(start, stop).decode("utf-8", "surrogateescape")
        try:
            with long_fields():
                list(csv.reader(io.StringIO(text, newline=""), strict=True, **self.dialect))
        except csv.Error as error:
            return "unexpected end" in str(error)
        return False

    def _header(self, cells: list[str]) -> list[str]:
        columns = [cell.strip() for cell in cells]
        if any("\0" in column or not _is_utf8(column) for column in columns):
            raise TriviumError(f"{self._file.path} (line 1) is not UTF-8: convert the file to UTF-8")
        return columns

    def _parse(self, row: int, text: str) -> Mapping[str, Any]:
        with long_fields():
            try:
                # In one piece: the scan found where the row ends, and Windows may have written \r\r\n there.
                [cells] = csv.reader([text], strict=True, **self.dialect)
            except csv.Error as error:
                raise self.bad(row, f"it is no CSV row ({error}): a quote inside a quoted field is doubled") from None
        if len(cells) != len(self.columns):
            raise self.bad(
                row, f"it has {len(cells)} fields, the header {len(self.columns)}: put fields with commas in quotes"
            )
        return dict(zip(self.columns, cells, strict=True))


class Tsv(Csv):
    """Fields between tabs. A quote is a plain character, so a field holds neither a tab nor a line break."""

    dialect: Mapping[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


class ObjectTable(TextTable):
    """What JSONL and a JSON list share: a row is an object, which names its cells itself."""

    def _looks_on(self) -> bool:
        return len(self._objects) < LOOKED_AT

    def _look_at(self, data: bytes) -> None:
        """Adds to `columns` the names in an object, if it is one."""
        if record := json_object(data):
            self._objects.append(list(record))
            self.columns += [name for name in record if name not in self.columns]

    def _parse(self, row: int, text: str) -> Mapping[str, Any]:
        record = json_object(text.encode())
        if record is None:
            raise self.bad(row, "it is no JSON object")
        return record


class Jsonl(ObjectTable):
    """One JSON object a line; a caption may be a list of captions."""

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, int, int]]:
        offset = 0
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                start, line = 3, line[3:]
            if not line.strip():
                continue
            if self._looks_on():
                self._look_at(line)
            yield start, offset, number
        if not self.columns:
            raise TriviumError(f"{file.name} holds no JSON object: write one to a line, as {{...}}")


@contextmanager
def long_fields() -> Iterator[None]:
    """The limit on a field's length belongs to the whole process: lifted for us alone, and put back."""
    with _csv_lock:
        limit = csv.field_size_limit(2**31 - 1)
        try:
            yield
        finally:
            csv.field_size_limit(limit)


def _is_utf8(text: str) -> bool:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") == text


def json_object(line: bytes) -> dict[str, Any] | None:
    """None for anything else."""
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
