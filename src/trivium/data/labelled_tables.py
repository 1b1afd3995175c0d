"""Labelled rows of one's own CSV, TSV, JSONL, JSON or Parquet tables, whose columns have names."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from trivium.data.files import Kind
from trivium.data.labelled import UNSEEN, LabelledRows, Row, Splits, of_unseen_classes
from trivium.data.records import Record, records
from trivium.data.tables import IMAGE_COLUMNS, LOOKED_AT, TEXT_COLUMNS, find_column
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import hash64

LABEL_COLUMNS = ("label", "class", "category", "target", "score")
TEXTS = (*TEXT_COLUMNS, "sentence", "sentence1", "question", "premise")
SECOND_TEXTS = ("text2", "second_text", "sentence2", "hypothesis", "answer")


@dataclass(frozen=True)
class Columns:
    """Which columns of one's own tables are what; None: found by its usual name."""

    image: str | None = None
    text: str | None = None
    second_text: str | None = None
    label: str | None = None


def read_tables(
    train: Sequence[str],
    dev: Sequence[str],
    test: Sequence[str],
    columns: Columns,
    *,
    kind: Kind,
    regression: bool,
    held_out_share: float,
) -> Splits:
    """One's own CSV, TSV, JSONL, JSON or Parquet tables with named columns.

    Where no dev table is given, a share of the training rows is held out by a hash of what they hold, so that equal
    rows stay together. Labels are sorted, as numbers where all of them are. Paths of pictures are relative to their
    table.

    Raises TriviumError for a column that is not there, or a held-out table none of whose classes is one of training.
    """
    opened, notes = open_tables(train, dev, test, columns, kind, regression, held_out_share)
    if regression:
        values = [row.value for row, _ in good(opened["train"]) if row.value is not None]
        center, scale = float(np.mean(values or [0.0])), float(np.std(values or [0.0])) or 1.0
        splits = {name: LabelledRows([_first(each) for each in found], kind) for name, found in opened.items()}
        return Splits(splits.pop("train"), splits, (), center, scale, notes)
    unusable = next((each for each in opened["train"] if isinstance(each, BadSample)), None)
    if unusable is not None and not any(good(opened["train"])):
        raise TriviumError(f"{', '.join(train)}: no training row can be used; the first: {unusable}")
    names = {label for _, label in good(opened["train"]) if label}
    labels = tuple(sorted(names, key=_by_number if all(map(_is_number, names)) else str))
    if len(labels) < 2:
        have = f"one class ({labels[0]})" if labels else "no class"
        raise TriviumError(f"{', '.join(train)}: the training rows have {have}, and a classifier needs two at least")
    number_of = {name: number for number, name in enumerate(labels)}
    splits = {
        name: LabelledRows([_numbered(each, number_of, optional=name != "train") for each in found], kind)
        for name, found in opened.items()
    }
    for name, rows in splits.items():
        given = [row for row in rows.good() if row.label is not None]
        if given and all(row.label == UNSEEN for row in given):
            first = f'the first: {given[0].file} ({given[0].where}), "{given[0].truths[0]}"'
            raise TriviumError(f"no row of {name} has a class that a training row has; {first}")
        notes += of_unseen_classes(name, rows)
    return Splits(splits.pop("train"), splits, labels, notes=notes)


Found = list["tuple[Row, str] | BadSample"]  # a row, and the name of its label, "" without one


def open_tables(
    train: Sequence[str],
    dev: Sequence[str],
    test: Sequence[str],
    columns: Columns,
    kind: Kind,
    regression: bool,
    held_out_share: float,
) -> tuple[dict[str, Found], list[str]]:
    """The rows of "train", "dev" and, where there is one, "test", and sentences on them. Raises TriviumError."""
    if not train:
        raise TriviumError("no training table is given: name one with --data.train (CSV, TSV, JSONL or Parquet)")
    opened = {name: _read(files, columns, kind, regression, is_test=name == "test") for name, files in
              {"train": train, "dev": dev, "test": test}.items() if files}  # fmt: skip
    notes = []
    if "dev" not in opened:
        kept: list[tuple[Row, str] | BadSample] = []
        held: list[tuple[Row, str] | BadSample] = []
        pictures = _held_out_pictures([row for row, _ in good(opened["train"])], held_out_share)
        for each in opened["train"]:
            apart = isinstance(each, tuple) and _is_held_out(each[0], held_out_share, pictures)
            (held if apart else kept).append(each)
        opened |= {"train": kept, "dev": held}
        notes.append(f"no --data.dev is given: {len(held):,} of {len(held) + len(kept):,} training rows are held out")
    return opened, notes


def _read(files: Sequence[str], columns: Columns, kind: Kind, regression: bool, is_test: bool) -> Found:
    """Each row and the name of its label ("" where it has none)."""
    found: Found = []
    for file in files:
        names: dict[str, str | None] | None = None
        objects = list(islice(_named(file), LOOKED_AT))
        for record in records(file):
            if isinstance(record, BadSample):
                found.append(record)
                continue
            if names is None:
                if not objects:
                    raise TriviumError(f"{file} holds no named columns: give a table with a header, or JSON objects")
                names = _columns_of(file, objects, columns, kind, is_test)
            try:
                found.append(_row(record, names, regression))
            except BadSample as bad:
                found.append(bad)
        if names is None:
            raise TriviumError(f"{file} has no rows: give a table with at least one")
    return found


def _named(file: str) -> Iterator[list[str]]:
    """The names in each record that has some."""
    for record in records(file):
        if isinstance(record, Record) and isinstance(record.fields, dict) and record.fields:
            yield list(record.fields)


def _columns_of(
    file: str, objects: Sequence[list[str]], columns: Columns, kind: Kind, is_test: bool
) -> dict[str, str | None]:
    have = list(dict.fromkeys(chain.from_iterable(objects)))

    def find(named: str | None, usual: Sequence[str], option: str) -> str:
        return find_column(file, have, None if named is None else named.lower(), usual, option, objects)

    second, label = columns.second_text, columns.label
    of_labels = LABEL_COLUMNS if label is None else (label.lower(), *label.lower().split(","))
    has_label = any(name in of_labels for name in have)
    return {
        "image": find(columns.image, IMAGE_COLUMNS, "image-column") if kind != "text" else None,
        "text": find(columns.text, TEXTS, "text-column") if kind != "images" else None,
        "second_text": None if second is None else find(second, SECOND_TEXTS, "second-text-column"),
        # A table to be predicted has none, of whatever name.
        "label": find(label, LABEL_COLUMNS, "label-column")
        if has_label or (label is not None and not is_test)
        else None,
    }


def _row(record: Record, names: Mapping[str, str | None], regression: bool) -> tuple[Row, str]:
    """Raises BadSample."""
    image, text, second, label = (names[part] for part in ("image", "text", "second_text", "label"))
    given = None if label is None else record.optional(label)
    value = None
    if regression and given is not None:
        value = _number(record, label, given)
    row = Row(
        file=record.file,
        where=record.entry,
        key=f"{record.file}:{record.entry}",
        text=None if text is None else record.text(text),
        second_text=None if second is None else record.text(second),
        image=None if image is None else _picture_path(record, image),
        value=value,
    )
    return row, "" if given is None or regression else _name(given)


def _picture_path(record: Record, column: str) -> str:
    """Raises BadSample."""
    if isinstance(record.value(column), dict | bytes):
        raise record.bad(f'its "{column}" is a picture, not the name of one: write the pictures to files')
    return os.path.join(os.path.dirname(record.file), record.text(column))


def _number(record: Record, column: str | None, given: Any) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):  # the last: a whole number beyond all floats
        value = math.nan
    if isinstance(given, bool) or not math.isfinite(value):
        raise record.bad(f'its "{column}" is no number ({given})')
    return value


def _name(label: Any) -> str:
    return str(label).strip() if not isinstance(label, bool) else str(label).lower()


def _numbered(each: tuple[Row, str] | BadSample, number_of: Mapping[str, int], optional: bool) -> Row | BadSample:
    if isinstance(each, BadSample):
        return each
    row, label = each
    if not label:
        return row if optional else BadSample(row.file, row.where, "it has no label")
    if label not in number_of:
        return replace(row, label=UNSEEN, truths=(label,))
    return replace(row, label=number_of[label])


def _held_out_pictures(rows: Sequence[Row], share: float) -> set[str]:
    """Pictures with about this share of the rows, one at least, and never all. By a hash of their names below the
    table, so that they are the same wherever it lies."""
    rows_of = Counter(row.picture_name for row in rows if row.image is not None)
    chosen: set[str] = set()
    held = 0
    for picture in sorted(rows_of, key=lambda name: hash64("held out", name))[:-1]:
        if held >= share * rows_of.total():
            break
        chosen.add(picture)
        held += rows_of[picture]
    return chosen


def _is_held_out(row: Row, share: float, pictures: Collection[str]) -> bool:
    """With its picture; a text by a hash of what it says."""
    if row.image is not None:
        return row.picture_name in pictures
    return hash64("held out", row.text or "", row.second_text or "", "") % 10_000 < share * 10_000


def good(found: Found) -> Iterator[tuple[Row, str]]:
    return (each for each in found if not isinstance(each, BadSample))


def _first(each: tuple[Row, str] | BadSample) -> Row | BadSample:
    return each if isinstance(each, BadSample) else each[0]


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _by_number(name: str) -> tuple[float, str]:
    return float(name), name
