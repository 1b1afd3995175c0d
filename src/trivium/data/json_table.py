"""Samples that are the elements of a JSON list, as ALBEF's annotation files are: one object for each picture, its
caption a string or a list of them.

Like the other tables the file is scanned once, for where each element begins and ends, and then read by element.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from typing import BinaryIO

from trivium.data.files import readable
from trivium.data.tables import ObjectTable
from trivium.errors import TriviumError

# Strings whole, so that a bracket inside one is none; and brackets. Everything between is passed over.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
_BLANK = b" \t\r\n"


class Json(ObjectTable):
    """A JSON list of objects. Messages count its entries from 0, as a list does."""

    def where(self, row: int) -> tuple[str, str]:
        return readable(self._file.path), f"entry {row}"

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, int, int]]:
        file.seek(0, 2)
        if not file.tell():
            raise TriviumError(f"{file.name} is empty: it must hold a JSON list of objects")
        yield from self._elements(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), file.name)
        if not self.columns:
            raise TriviumError(f"{file.name} holds no JSON object: write a list of them, as [{{...}}, {{...}}]")

    def _elements(self, data: mmap.mmap, name: str) -> Iterator[tuple[int, int, int]]:
        first = 3 if data[:3] == b"\xef\xbb\xbf" else 0
        while first < len(data) and data[first] in _BLANK:
            first += 1
        if data[first : first + 1] != b"[":
            raise TriviumError(f"{name} holds no JSON list of objects: is it the file you mean?")
        depth = start = number = 0
        stop = first + 1  # of the element before

        def between(before: int, after: int) -> None:
            if data[before:after].strip(_BLANK + b","):
                raise TriviumError(f"{name} (entry {number}) is no JSON object: write a list of objects")

        for match in _TOKEN.finditer(data, first):
            token = match[0]
            if token in (b"[", b"{"):
                depth += 1
                if depth == 2:
                    start = match.start()
                    between(stop, start)
            elif token in (b"]", b"}"):
                depth -= 1
                if depth == 1:
                    if self._looks_on():
                        self._look_at(data[start : match.end()])
                    stop = match.end()
                    yield start, stop, number
                    number += 1
                elif depth == 0:
                    between(stop, match.start())
                    return
        raise TriviumError(f"{name} (entry {number}) ends before its list does: is the file whole?")
