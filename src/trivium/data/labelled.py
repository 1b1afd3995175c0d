"""Labelled rows for fine-tuning: what every reader of a task gives.

A row that cannot be used (a field is missing, a label is none of the task's) keeps its place and raises BadSample when
it is read: in training it is replaced and counted, in evaluation left out and named. One of a held-out table whose
class no training row has can be used: every answer to it is wrong.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trivium.data.read_rows import ReadRows
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import Blocks, Sample

NAMED = 5  # classes in a sentence
UNSEEN = -1  # the label of a held-out row whose class no training row has; its name stands in `truths`


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of a task. Absent parts are None."""

    file: str
    where: str  # line, row or entry in it
    key: str  # how its task names it in predictions: an index, a question's number
    text: str | None = None
    second_text: str | None = None
    image: str | None = None  # path
    second_image: str | None = None
    label: int | None = None
    value: float | None = None
    answers: Mapping[int, float] | None = None
    truths: tuple[str, ...] = ()  # answers as people gave them: what VQA is scored by, and a writer learns to write
    weight: float = 1.0  # of them together, to a writer

    @property
    def is_labelled(self) -> bool:
        return self.label is not None or self.value is not None or self.answers is not None

    @property
    def picture_name(self) -> str:
        """As its table names it, so the same wherever the table lies; "" without a picture."""
        return "" if self.image is None else os.path.relpath(self.image, os.path.dirname(self.file))


class LabelledRows(ReadRows[Row]):
    """Rows of a task as a Source."""

    _blocks: Blocks | None = None  # of rows that belong together

    def blocks(self) -> Sequence[range]:
        return super().blocks() if self._blocks is None else self._blocks

    def picture(self, row: int) -> bytes:
        image = self.row(row).image
        assert image is not None
        return self.picture_file(row, image)

    def picture_path(self, row: int) -> str | None:
        return self.row(row).image

    def captions(self, row: int) -> list[str]:
        return [self.row(row).text or ""]

    def identity(self, row: int) -> str:
        image = self.row(row).image
        return super().identity(row) if image is None else os.path.abspath(image)

    def lengths(self) -> Sequence[int] | None:
        """In characters, of both texts together."""
        if self.kind == "images":
            return None
        return [
            0 if isinstance(row, BadSample) else len(row.text or "") + len(row.second_text or "") for row in self.rows
        ]

    def read(self, image_row: int, text_row: int) -> Sample:
        assert image_row == text_row, "a task has no false pairs"
        row = self.row(image_row)
        sample = super().read(image_row, text_row)
        if row.second_image is not None:
            sample["second_image"] = self.picture_file(image_row, row.second_image)
        if row.second_text is not None:
            sample["second_text"] = row.second_text
        if row.label is not None:
            sample["label"] = row.label
        if row.value is not None:
            sample["value"] = row.value
        if row.answers is not None:
            sample["answers"] = dict(row.answers)
        if row.truths:
            share = row.weight / len(row.truths)
            sample["written"] = {answer: share * number for answer, number in Counter(row.truths).items()}
        return sample

    def of_known_classes(self) -> LabelledRows:
        """Without rows whose class training lacks: no loss is defined of them."""
        return self.with_rows([row for row in self.rows if isinstance(row, BadSample) or row.label != UNSEEN])

    def good(self) -> Iterator[Row]:
        return (row for row in self.rows if isinstance(row, Row))

    def capped(self, limit: int | None) -> LabelledRows:
        """`limit` of the rows, evenly spread over all."""
        if limit is None or limit >= len(self):
            return self
        return self.with_rows([self.rows[n] for n in np.arange(limit) * len(self) // limit])

    def by_picture(self, most: int) -> LabelledRows:
        """The same rows, those of one picture behind each other, at most `most` of them in a block."""
        rows_of: dict[str, list[Row | BadSample]] = {}
        for number, row in enumerate(self.rows):
            alone = isinstance(row, BadSample) or row.image is None
            rows_of.setdefault(f"\n{number}" if alone else self.identity(number), []).append(row)
        sizes = [min(most, len(rows) - first) for rows in rows_of.values() for first in range(0, len(rows), most)]
        found = self.with_rows([row for rows in rows_of.values() for row in rows])
        found._blocks = Blocks(np.append(0, np.cumsum(sizes)))
        return found

    def with_rows(self, rows: Sequence[Row | BadSample]) -> LabelledRows:
        """Other rows of the same kind, whose pictures are where those of these are."""
        return LabelledRows(rows, self.kind)


@dataclass(frozen=True)
class Splits:
    """What a reader gives."""

    train: LabelledRows
    held_out: dict[str, LabelledRows]  # "dev", "dev_matched", "test"; a split may be without labels
    labels: tuple[str, ...] = ()  # the name of each class; none in a regression
    center: float = 0.0  # of the values of a regression, as the model sees them: (value - center) / scale
    scale: float = 1.0
    notes: list[str] = field(default_factory=list)  # sentences for the start of a run

    def checked(self) -> Splits:
        """With a sentence for each thing in the data that a person should know.

        Raises TriviumError where nothing is left to train or to measure on.
        """
        notes = list(self.notes)
        if not len(self.train):
            beside = "".join(f", beside {rows.where(0)[0]}" for rows in list(self.held_out.values())[:1] if len(rows))
            raise TriviumError(f"there are no training rows{beside}: put the training file there, or give it")
        held_out = {name: wholly_labelled(rows) for name, rows in self.held_out.items()}
        for name, rows in {"train": self.train, **held_out}.items():
            bad = [row for row in rows.rows if isinstance(row, BadSample)]
            if len(bad) == len(rows):
                first = f"; the first: {bad[0]}" if bad else ""
                raise TriviumError(f"the split {name} has no usable row{first}")
            if bad:
                notes.append(f"{name}: {len(bad)} of {len(rows):,} rows cannot be used; the first: {bad[0]}")
        if not all(row.is_labelled for row in self.train.good()):
            row = next(row for row in self.train.good() if not row.is_labelled)
            raise TriviumError(f"{row.file} ({row.where}) has no label, and the model is trained on it: give it one")
        if not any(is_labelled(rows) for rows in held_out.values()):
            raise TriviumError("no held-out row has a label, so no checkpoint can be chosen: give labelled ones")
        counts = Counter(row.label for row in self.train.good())
        if self.train.rows and any(row.label is not None for row in self.train.good()):
            absent = [name for number, name in enumerate(self.labels) if not counts[number]]
            if absent:
                notes.append(f"no row of the training split has the class {' or '.join(absent)}: it is never learned")
        return replace(self, held_out=held_out, notes=notes)


def is_labelled(rows: LabelledRows) -> bool:
    """Whether a split can be measured."""
    return any(row.is_labelled for row in rows.good())


def of_unseen_classes(name: str, rows: LabelledRows) -> list[str]:
    """A sentence on the rows of a held-out split whose class no training row has, where there are any."""
    classes = [row.truths[0] for row in rows.good() if row.label == UNSEEN]
    if not classes:
        return []
    names = list(dict.fromkeys(classes))
    named = ", ".join([*names[:NAMED], *([f"and {len(names) - NAMED:,} more"] if len(names) > NAMED else [])])
    what = f"{len(classes):,} of {len(rows):,} rows of {name} have a class that no training row has ({named})"
    return [f"{what}: counted as wrong"]


def wholly_labelled(rows: LabelledRows) -> LabelledRows:
    """A row without a label among others that have one cannot be measured; where none has one, all are predicted."""
    if not is_labelled(rows):
        return rows
    of = "it has no label, where others of its split have one"
    return rows.with_rows(
        [
            BadSample(row.file, row.where, of) if isinstance(row, Row) and not row.is_labelled else row
            for row in rows.rows
        ]
    )
