"""Samples from files of one's own: ``open_source`` recognises what a path holds; ``Concat`` joins several.

| form | file | where |
|---|---|---|
| folder of pictures, with or without photo.txt beside photo.jpg | ``files.py`` | ``Folder`` |
| plain text, one line a sample | ``files.py`` | ``TextLines`` |
| CSV, TSV, JSONL | ``tables.py`` | ``Csv``, ``Tsv``, ``Jsonl`` |
| Parquet | ``parquet.py`` | ``ParquetFiles`` |
| a JSON list of objects | ``json_table.py`` | ``Json`` |
| tar shards, here or at an address | ``shards.py`` | ``TarShards`` |
| a list of any of these, one path or address a line | ``.list`` | |

A source is read by one thread of a process at a time, and is cheap to send to a worker, which opens files anew.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trivium.data.files import INDEX_SUFFIX, PICTURE_SUFFIXES, WINDOW, Folder, Kind, TextLines, walk
from trivium.data.json_table import Json
from trivium.data.parquet import ParquetFiles
from trivium.data.remote import is_remote
from trivium.data.shards import TarShards
from trivium.data.tables import Csv, Jsonl, TextTable, Tsv
from trivium.errors import TriviumError
from trivium.train.protocol import Blocks, Sample, Source

TEXT_TABLES: dict[str, type[TextTable]] = {
    ".csv": Csv, ".tsv": Tsv, ".jsonl": Jsonl, ".ndjson": Jsonl, ".json": Json
}  # fmt: skip
SUFFIXES = (*TEXT_TABLES, ".parquet", ".tar", ".txt")


class Concat:
    """Several sources one after another, as one."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._starts = np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blocks(self) -> Sequence[range]:
        bounds = [Blocks.of(source.blocks()).bounds[1:] for source in self.sources]
        return Blocks(np.concatenate([[0], *map(np.add, self._starts[:-1], bounds)]))

    def lengths(self) -> Sequence[int] | None:
        """None where any of the sources does not know them."""
        lengths = [source.lengths() for source in self.sources]
        known = [np.asarray(length) for length in lengths if length is not None]
        return np.concatenate(known) if len(known) == len(lengths) else None  # type: ignore[return-value]

    def read(self, image_row: int, text_row: int) -> Sample:
        (first, image_row), (second, text_row) = self._find(image_row), self._find(text_row)
        if first == second:
            return self.sources[first].read(image_row, text_row)
        sample = self.sources[first].read(image_row, image_row)
        other = self.sources[second].read(text_row, text_row)
        for key in ("text", "texts", "same_text"):
            sample.pop(key, None)  # type: ignore[misc]
            if key in other:
                sample[key] = other[key]
        if "name" in sample and "name" in other:
            sample["name"] += f" with the text of {other['name']}"
        return sample

    def _find(self, row: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - int(self._starts[number])


def open_source(
    kind: Kind,
    paths: Sequence[str | Path],
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    root: str | Path | None = None,
    window: int = WINDOW,
) -> Source:
    """The samples that `paths` hold: files, folders, patterns such as ``shards/*.tar`` or ``shard-{000..127}.tar``, or
    lists of such (``.list``), joined in this order. Tar shards may stand at addresses.

    kind: "pairs" (a picture and its captions), "images" or "text". The columns are found by their usual names where
    they are not named; paths in a table are relative to `root`, else to the table's own folder. `window`: words at most
    in a sample of plain text (see ``words_within``). Raises TriviumError for a path that does not exist, holds nothing,
    or nothing we read.
    """
    assert kind in ("pairs", "images", "text")
    if not paths:
        raise TriviumError(f"no path is given for --data.{kind}: name a folder or a file")
    sources: list[Source] = []
    # Neighbouring Parquet files, and neighbouring shards, become one source: they share one cache.
    for form, group in itertools.groupby(_expand(kind, paths), key=_form):
        files = list(group)
        if form == ".parquet":
            sources.append(ParquetFiles(files, kind, image_column, text_column, root))
        elif form == ".tar":
            sources.append(TarShards(files, kind, text_column))
        elif form in TEXT_TABLES:
            sources += [TEXT_TABLES[form](file, kind, image_column, text_column, root) for file in files]
        elif kind == "text":
            sources += [TextLines(file, window) for file in files]
        elif form == ".txt":
            raise TriviumError(f"{files[0]} is plain text and has no pictures: give it to --data.text")
        else:
            sources += [Folder(file, kind) for file in files]
    return sources[0] if len(sources) == 1 else Concat(sources)


def _expand(kind: Kind, paths: Sequence[str | Path], listed: str = "") -> Iterator[str]:
    """The files and folders that paths, patterns and lists stand for; for text, a folder stands for its .txt files.

    listed: the list that names them.
    """
    for path in map(str, paths):
        if not os.path.exists(path) and RANGE.search(path):
            yield from _expand(kind, list(_numbered(path)), listed)
        elif is_remote(path):
            yield path
        elif not os.path.exists(path):
            found = [file for file in sorted(glob.glob(path, recursive=True)) if not file.endswith(INDEX_SUFFIX)]
            if not found:
                what = "matches no file" if glob.has_magic(path) else "does not exist"
                raise TriviumError(f"{path} {what}: check the path (seen from {os.getcwd()})")
            if gone := next((file for file in found if not os.path.exists(file)), None):
                raise TriviumError(f"{gone} is a link to nothing: remove it, or name the files that you mean")
            yield from _expand(kind, found, listed)
        elif path.lower().endswith(".list") and os.path.isfile(path):
            if listed:  # perhaps itself, by a pattern
                raise TriviumError(f"{listed} lists a list ({path}): name the files themselves, as in *.tar")
            yield from _expand(kind, _listed(path), path)
        elif kind == "text" and os.path.isdir(path):
            texts = sorted(file for file in walk(path) if file.lower().endswith(".txt"))
            if not texts:
                raise TriviumError(f"{path} holds no .txt file: name the files that you mean")
            yield from (f"{path}/{file}" for file in texts)
        else:
            yield path


RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as in shard-{000..127}.tar
MOST_NUMBERED = 10_000_000


def _numbered(pattern: str) -> Iterator[str]:
    """The names that a pattern with a range of numbers stands for; the first range alone is written out."""
    match = RANGE.search(pattern)
    assert match is not None
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < MOST_NUMBERED:
        raise TriviumError(f"{pattern} stands for no names: the range must rise, as in {{000..127}}")
    for number in range(int(first), int(last) + 1):
        yield f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"


def _listed(path: str) -> list[str]:
    """The lines of a list of paths and addresses. Paths are relative to its folder; lines with # say nothing."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TriviumError(f"{path} cannot be read: {error}") from None
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise TriviumError(f"{path} lists nothing: write one path or address on each line")
    return [name if is_remote(name) else os.path.join(os.path.dirname(path), name) for name in names]


def _form(path: str) -> str:
    """What a path holds: its suffix in small letters, or "folder". Raises TriviumError."""
    if is_remote(path):
        if not path.partition("?")[0].lower().endswith(".tar"):
            raise TriviumError(
                f"{path} is no tar shard, and only these are read from an address: pack the data with `trivium data"
                " pack`, or download it; several shards are named as shard-{000..127}.tar or in a file of names, .list"
            )
        return ".tar"
    if os.path.isdir(path):
        return "folder"
    suffix = os.path.splitext(path)[1].lower()
    if suffix in PICTURE_SUFFIXES:
        raise TriviumError(f"{path} is a single picture: name the folder it lies in")
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise TriviumError(f"{path} has a suffix we do not know; give a folder of pictures or a file of {known}")
    return suffix
