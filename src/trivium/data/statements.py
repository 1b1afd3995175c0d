"""Statements on two pictures in their official layouts, NLVR2 (Suhr et al. 2019), and pairs for text assignment, which
prepares for it.

NLVR2 as its owners publish it, or as ALBEF's files have it, below one folder:

    data/{train,dev,test1}.json   a JSON object a line; pictures images/train/<directory>/<identifier>-img{0,1}.png,
                                  dev/..., test1/...
    nlvr_{train,dev,test}.json    a JSON list of {"images": [left, right], "sentence": ..., "label": "True"}, pictures
                                  relative to the folder
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from trivium.data.labelled import LabelledRows, Row, Splits
from trivium.data.labelled_tables import Columns
from trivium.data.records import Record, json_elements, json_lines, records
from trivium.data.tables import IMAGE_COLUMNS, TEXT_COLUMNS
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import hash64

TRUTH = ("False", "True")
ASSIGNED = ("first", "second", "neither")
OFFICIAL = {"train": "train", "dev": "dev", "test-P": "test1"}
OF_ALBEF = {"train": "train", "dev": "dev", "test-P": "test"}


def read_nlvr2(root: str) -> Splits:
    """The splits whose files are there. Raises TriviumError where none is."""
    files = {name: os.path.join(root, "data", f"{file}.json") for name, file in OFFICIAL.items()}
    of_albef = {name: os.path.join(root, f"nlvr_{file}.json") for name, file in OF_ALBEF.items()}
    official = {
        name: _rows(json_lines(path), partial(_official, root, OFFICIAL[name]))
        for name, path in files.items()
        if os.path.isfile(path)
    }
    theirs = {
        name: _rows(json_elements(path), partial(_of_albef, root))
        for name, path in of_albef.items()
        if os.path.isfile(path)
    }
    read = theirs if not official or ("train" in theirs and "train" not in official) else official
    if not read:
        raise TriviumError(
            f"{root} holds neither data/train.json nor nlvr_train.json: give the folder of NLVR2 as"
            " github.com/lil-lab/nlvr publishes it, or with ALBEF's files"
        )
    return Splits(read.pop("train", LabelledRows([], "pairs")), read, TRUTH)


def _rows(found: Iterator[Record | BadSample] | Iterator[Record], row: Callable[[Record], Row]) -> LabelledRows:
    rows: list[Row | BadSample] = []
    for record in found:
        try:
            rows.append(record if isinstance(record, BadSample) else row(record))
        except BadSample as bad:
            rows.append(bad)
    return LabelledRows(rows, "pairs")


def _official(root: str, part: str, record: Record) -> Row:
    """Raises BadSample."""
    identifier = record.text("identifier")  # train-SET-PAIR-SENTENCE; pictures lack the last
    pair, _, sentence = identifier.rpartition("-")
    if not pair or not sentence.isdigit():
        raise record.bad(f'its "identifier" {identifier} does not end in the number of a sentence')
    folder = os.path.join("images", "train", str(record.value("directory"))) if part == "train" else part
    under_images = os.path.isdir(os.path.join(root, "images", part)) and part != "train"
    folder = os.path.join(root, "images", part) if under_images else os.path.join(root, folder)
    left, right = (os.path.join(folder, f"{pair}-img{side}.png") for side in (0, 1))
    return _judged(record, identifier, left, right)


def _of_albef(root: str, record: Record) -> Row:
    """Raises BadSample."""
    images = record.items("images")
    if len(images) != 2 or not all(isinstance(image, str) and image for image in images):
        raise record.bad('its "images" are not the paths of two')
    left, right = (os.path.join(root, image) for image in images)
    return _judged(record, record.entry, left, right)


def _judged(record: Record, key: str, left: str, right: str) -> Row:
    label = str(record.value("label")).capitalize()
    if label not in TRUTH:
        raise record.bad(f'its label "{label}" is neither True nor False')
    sentence = record.text("sentence")
    return Row(record.file, record.entry, key, sentence, image=left, second_image=right, label=TRUTH.index(label))


def read_assignments(
    train: Sequence[str], dev: Sequence[str], test: Sequence[str], columns: Columns, held_out_share: float
) -> Splits:
    """Pairs of one's own tables (CSV, JSONL, ALBEF's JSON and so on), of a caption in several the first.

    A training row has its own picture alone: others are drawn as it is trained, and its label counts nothing. A row of
    dev or test has two, drawn evenly among those of its split, and its label, once and for all. Raises TriviumError.
    """
    if not train:
        raise TriviumError("no table of pairs is given: name one with --data.train (CSV, TSV, JSONL, JSON or Parquet)")
    rows, held, tested = (_pairs(files, columns) for files in (train, dev, test))
    notes = []
    if not dev:
        apart = [isinstance(each, Row) and hash64("held out", each.picture_name) % 10_000 < held_out_share * 10_000
                 for each in rows]  # fmt: skip
        held = [each for each, is_held in zip(rows, apart, strict=True) if is_held]
        rows = [each for each, is_held in zip(rows, apart, strict=True) if not is_held]
        notes.append(f"no --data.dev is given: {len(held):,} of {len(held) + len(rows):,} pairs are held out")
    labelled = [
        replace(each, label=number % len(ASSIGNED)) if isinstance(each, Row) else each
        for number, each in enumerate(rows)
    ]
    splits = {"dev": held} | ({"test": tested} if test else {})
    return Splits(
        LabelledRows(labelled, "pairs"),
        {name: _all_assigned(name, found) for name, found in splits.items()},
        ASSIGNED,
        notes=notes,
    )


def _pairs(files: Sequence[str], columns: Columns) -> list[Row | BadSample]:
    """Raises TriviumError where none of them can be used."""
    found: list[Row | BadSample] = []
    for record in (each for file in files for each in records(file)):
        try:
            found.append(record if isinstance(record, BadSample) else _pair(record, columns))
        except BadSample as bad:
            found.append(bad)
    if found and not any(isinstance(each, Row) for each in found):
        raise TriviumError(
            f"{', '.join(files)}: no pair can be used; the first: {found[0]}; columns of other names are named with"
            " --data.image-column and --data.text-column"
        )
    return found


def _pair(record: Record, columns: Columns) -> Row:
    """Raises BadSample."""
    caption = record.value(*_names(columns.text, TEXT_COLUMNS))
    if isinstance(caption, list) and caption:
        caption = caption[0]
    if not isinstance(caption, str) or not caption.strip():
        raise record.bad("its caption holds no text")
    image = os.path.join(os.path.dirname(record.file), record.text(*_names(columns.image, IMAGE_COLUMNS)))
    return Row(record.file, record.entry, f"{record.file}:{record.entry}", caption.strip(), image=image)


def _names(named: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Under which a cell is looked for: as in `find_column`, "a,b" is the first that there is."""
    return usual if named is None else tuple(dict.fromkeys((named.lower(), *named.lower().split(","))))


def _all_assigned(split: str, rows: Sequence[Row | BadSample]) -> LabelledRows:
    """Raises TriviumError where they have too few pictures."""
    pictures = sorted({each.image for each in rows if isinstance(each, Row) and each.image})
    if len(pictures) < 3:
        raise TriviumError(
            f"{len(pictures)} held-out pictures ({split}) are too few to assign a text among: give three at least"
        )
    place_of = {picture: place for place, picture in enumerate(pictures)}
    assigned = [_assigned(each, pictures, place_of) if isinstance(each, Row) else each for each in rows]
    return LabelledRows(assigned, "pairs")


def _assigned(row: Row, pictures: Sequence[str], place_of: Mapping[str, int]) -> Row:
    """With a label and pictures that are functions of its text and its own picture."""
    label, to_one, to_other = (
        hash64("assignment", row.picture_name, row.text or "", name) for name in ("class", "one", "other")
    )
    label %= len(ASSIGNED)
    own, one, other = place_of[row.image or ""], 1 + to_one % (len(place_of) - 1), 1 + to_other % (len(place_of) - 2)
    other += other >= one
    places = ((own, own + one), (own + one, own), (own + one, own + other))[label]
    left, right = (pictures[place % len(pictures)] for place in places)
    return replace(row, image=left, second_image=right, label=label)
