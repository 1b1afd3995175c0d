"""Files of records, gone through once: JSON, JSON lines, CSV and TSV (each also as .gz), and Parquet.

Samples are read by row and in any order (``tables.py``); annotation files are read from first to last, some are packed
and larger than memory, and their fields differ. A record that is broken costs itself alone and is handed on as the
BadSample that says so; a file that cannot be read on is a TriviumError.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from trivium.data.tables import long_fields
from trivium.errors import BadSample, TriviumError

CHUNK = 2**20  # bytes of a JSON array that are read at once
ELEMENT_LIMIT = 2**28  # characters of one element of a JSON array


@dataclass(frozen=True, slots=True)
class Record:
    """What stands at one place of a file. Names of a table's columns are in small letters."""

    file: str
    entry: str  # "line 3", "entry 17": the first line is 1, the first entry and the first row 0
    fields: Any

    def bad(self, why: str) -> BadSample:
        return BadSample(self.file, self.entry, why)

    def optional(self, *names: str) -> Any:
        """The value under the first of some names that is there and holds one; None without. Raises BadSample."""
        if not isinstance(self.fields, dict):
            raise self.bad("it is no record of named fields")
        value = next((self.fields[name] for name in names if self.fields.get(name) not in (None, "")), None)
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:  # JSON can spell half a character
                raise self.bad(f'its "{"|".join(names)}" is no Unicode (a lone surrogate)') from None
        return value

    def value(self, *names: str) -> Any:
        """Raises BadSample."""
        value = self.optional(*names)
        if value is None:
            raise self.bad(f'it has no "{"|".join(names)}"')
        return value

    def text(self, *names: str) -> str:
        """Not blank, without blanks at its ends. Raises BadSample."""
        value = self.value(*names)
        if not isinstance(value, str) or not value.strip():
            raise self.bad(f'its "{"|".join(names)}" holds no text')
        return value.strip()

    def number(self, name: str) -> float:
        """Raises BadSample."""
        value = self.value(name)
        if not is_number(value):
            raise self.bad(f'its "{name}" is no number')
        return value

    def integer(self, *names: str) -> int:
        """Raises BadSample."""
        value = self.value(*names)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(f'its "{"|".join(names)}" is no whole number')
        return value

    def items(self, name: str) -> list[Any]:
        """Raises BadSample."""
        value = self.value(name) if isinstance(self.fields, dict) and self.fields.get(name) != [] else []
        if not isinstance(value, list):
            raise self.bad(f'its "{name}" is no list')
        return value


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def records(file: str, quoted_tsv: bool = False) -> Iterator[Record | BadSample]:
    """The records of a table, by its suffix, with the names of its columns in small letters. Raises TriviumError.

    A quote in a TSV is a plain character, as in ``tables.py``, unless the TSV is `quoted_tsv`.
    """
    suffix = os.path.splitext(file.removesuffix(".gz"))[1].lower()
    found: Iterator[Record | BadSample]
    if suffix in (".csv", ".tsv"):
        found = _separated(file, "," if suffix == ".csv" else "\t", suffix == ".csv" or quoted_tsv)
    elif suffix in (".jsonl", ".ndjson"):
        found = json_lines(file)
    elif suffix == ".json":
        found = json_elements(file)
    elif suffix == ".parquet":
        found = _parquet(file)
    else:
        raise TriviumError(f"{file} is no table we know: give .csv, .tsv, .jsonl, .json (each also .gz) or .parquet")
    for record in found:
        if isinstance(record, Record) and isinstance(record.fields, dict):
            record = Record(record.file, record.entry, {name.lower(): v for name, v in record.fields.items()})
        yield record


def lines(file: str) -> Iterator[tuple[int, str] | BadSample]:
    """Number, from 1, and text of each line that is not blank. Raises TriviumError."""
    with opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                yield BadSample(file, f"line {number}", "it is not UTF-8")
                continue
            if text.strip():
                yield number, text


def json_lines(file: str) -> Iterator[Record | BadSample]:
    """One JSON object a line. Raises TriviumError."""
    for line in lines(file):
        if isinstance(line, BadSample):
            yield line
            continue
        number, text = line
        try:
            yield Record(file, f"line {number}", json.loads(text))
        except (ValueError, RecursionError):
            yield BadSample(file, f"line {number}", "it is no JSON object")


def json_object(file: str) -> Record:
    """A JSON file that holds one object. Raises TriviumError."""
    with opened(file) as stream:
        try:
            content = json.loads(stream.read())
        except (ValueError, RecursionError) as error:
            raise TriviumError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise TriviumError(f"{file} holds no JSON object: is it the file you mean?")
    return Record(file, "", content)


def json_elements(file: str) -> Iterator[Record]:
    """The elements of a JSON array, never all at once; or the rows of an object of columns. Raises TriviumError."""
    decoder = json.JSONDecoder()
    with opened(file) as stream:
        reader = _decoded(file, stream)
        buffer = next(reader, "").lstrip("\ufeff \t\r\n")
        if buffer.startswith("{"):
            yield from _columns(json_object(file))
            return
        if not buffer.startswith("["):
            raise TriviumError(f"{file} holds no JSON array: is it the file you mean?")
        position, number = 1, 0
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n,":
                position += 1
            if buffer[position : position + 1] == "]":
                return
            try:
                value, position = decoder.raw_decode(buffer, position)
            except (ValueError, RecursionError) as error:
                buffer, position = buffer[position:], 0
                before = len(buffer)
                # Twice as much each time, so that a long element is not begun again too often.
                while len(buffer) < max(2 * before, CHUNK) and (more := next(reader, None)) is not None:
                    buffer += more
                if len(buffer) == before or before > ELEMENT_LIMIT:
                    raise TriviumError(f"{file} (entry {number}) is no JSON ({error}): is the file whole?") from None
                continue
            yield Record(file, f"entry {number}", value)
            number += 1


def _columns(record: Record) -> Iterator[Record]:
    """The rows of ``{"image_urls": [...], "captions": [...]}``. Raises TriviumError."""
    columns = {name: column for name, column in record.fields.items() if isinstance(column, list)}
    if not columns or len({len(column) for column in columns.values()}) != 1:
        raise TriviumError(f"{record.file} holds neither a list of records nor columns of one length")
    for number, row in enumerate(zip(*columns.values(), strict=True)):
        yield Record(record.file, f"entry {number}", dict(zip(columns, row, strict=True)))


def _decoded(file: str, stream: IO[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while data := stream.read(CHUNK):
            yield decoder.decode(data)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise TriviumError(f"{file} is not UTF-8 (before byte {stream.tell():,}), or is cut short") from None


def _separated(file: str, delimiter: str, quoted: bool) -> Iterator[Record | BadSample]:
    """CSV and TSV with a header; with quotes, as pandas, pyarrow and img2dataset read and write them."""
    with opened(file) as stream:
        raw: list[str] = []  # the lines of the record that is being read
        ended = False

        def text() -> Iterator[str]:
            nonlocal ended
            for number, line in enumerate(stream):
                mark = b"" if number else b"\xef\xbb\xbf"  # of UTF-8: before a quoted name it would hide the quote
                raw.append(line.removeprefix(mark).decode("utf-8", "surrogateescape"))
                yield raw[-1]
            ended = True

        rows = csv.reader(text(), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        header: list[str] = []
        while True:
            start = rows.line_num + 1
            raw.clear()
            try:
                with long_fields():
                    cells = next(rows, None)
            except csv.Error as error:
                raise TriviumError(f"{file} (line {start}) is no table: {error}") from None
            if cells is None:
                return
            if ended:  # a row is complete at the end of its line, unless a quote is open
                raise TriviumError(
                    f"{file}: a quote opened in the row at line {start} never closes: close or double it"
                )
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
            elif any("\udc80" <= character <= "\udcff" for line in raw for character in line):
                yield BadSample(file, f"line {start}", "it is not UTF-8")
            elif len(cells) != len(header):
                yield BadSample(file, f"line {start}", f"it has {len(cells)} fields, the header {len(header)}")
            else:
                yield Record(file, f"line {start}", dict(zip(header, cells, strict=True)))


def _parquet(file: str) -> Iterator[Record]:
    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(10_000):
            for row in batch.to_pylist():
                yield Record(file, f"row {number}", row)
                number += 1
    except FileNotFoundError:
        raise TriviumError(f"{file} does not exist: check the path") from None
    except (pa.ArrowException, OSError) as error:
        raise TriviumError(f"{file} is no readable Parquet file: {error}") from None


@contextmanager
def opened(file: str) -> Iterator[IO[bytes]]:
    """A file to read from its beginning, unpacked where it is a .gz. What goes wrong in reading is a TriviumError."""
    try:
        with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as stream:
            yield stream  # type: ignore[misc]  # a GzipFile serves
    except FileNotFoundError:
        raise TriviumError(f"{file} does not exist: check the path (seen from {os.getcwd()})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TriviumError(f"{file} cannot be read ({error}): fetch it again, or check its rights") from None
