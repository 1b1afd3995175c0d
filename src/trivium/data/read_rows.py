"""Rows that a reader of annotation files made beforehand, as a Source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from trivium.data.files import Kind, RowSource
from trivium.errors import BadSample


class HasPlace(Protocol):
    """A row that knows how messages name it."""

    @property
    def file(self) -> str: ...

    @property
    def where(self) -> str: ...


Place = TypeVar("Place", bound=HasPlace)


class ReadRows(RowSource, Generic[Place]):
    """Rows that a reader made beforehand, each as it is or why it cannot be used."""

    def __init__(self, rows: Sequence[Place | BadSample], kind: Kind) -> None:
        self.rows = list(rows)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> Place:
        """Raises BadSample."""
        row = self.rows[number]
        if isinstance(row, BadSample):
            raise row
        return row

    def where(self, row: int) -> tuple[str, str]:
        found = self.rows[row]
        return found.file, found.where
