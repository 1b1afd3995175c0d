"""Two small sets of questions about pictures, each question with one answer, which is right when it is the same.

easy-VQA (Zhou 2019): drawn shapes; the package of that name is a zip file and is read as one, or the folder `data` in
it. DAQUAR (Malinowski and Fritz 2014): photographs of rooms, qa.jsonl ({"file", "question", "answer": [...]}) beside
train.parquet (file, image). Of DAQUAR the questions with several answers are left out, as its owners' own reduced sets
do, and counted.

Held-out rows are those of whole pictures, chosen by a hash of their name: a question is never asked of a picture that
training has seen.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trivium.data.labelled import LabelledRows, Row, Splits
from trivium.data.records import Record, json_lines
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import hash64

OTHER = "(an answer that no training question has)"


class PicturesInMemory(LabelledRows):
    """Rows whose pictures are few and small: kept encoded, by the name that a row has for its own."""

    def __init__(self, rows: Sequence[Row | BadSample], pictures: Mapping[str, bytes]) -> None:
        super().__init__(rows, "pairs")
        self.pictures = pictures

    def picture(self, row: int) -> bytes:
        name = self.row(row).image
        assert name is not None
        if name not in self.pictures:
            raise self.bad(row, f"its picture {name} does not exist")
        return self.pictures[name]

    def picture_path(self, row: int) -> None:
        return None

    def with_rows(self, rows: Sequence[Row | BadSample]) -> PicturesInMemory:
        return PicturesInMemory(rows, self.pictures)


def read_easy_vqa(root: str, held_out: float = 0.1) -> Splits:
    """Train; a share of its pictures as "dev"; "test". Raises TriviumError."""
    files = _EasyFiles(root)
    train = _easy_rows(files, "train")
    names = sorted({answer for _, answer in train})
    number_of = {name: number for number, name in enumerate(names)}
    splits: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for split, asked in (("train", train), ("test", _easy_rows(files, "test"))):
        for row, answer in asked:
            if answer not in number_of:
                raise TriviumError(f'{row.file} ({row.where}): its answer "{answer}" is that of no training question')
            apart = split == "train" and _is_held_out("easy-vqa", str(row.image), held_out)
            splits["dev" if apart else split].append(_labelled(row, number_of[answer], answer))
    pictures = {row.image: files.read(row.image) for rows in splits.values() for row in rows if row.image}
    read = {name: PicturesInMemory(rows, pictures) for name, rows in splits.items()}
    return Splits(read.pop("train"), dict(read), tuple(names))


def read_daquar(root: str, held_out: float = 0.2) -> Splits:
    """Train, and a share of the pictures as "dev". Raises TriviumError."""
    questions, table = os.path.join(root, "qa.jsonl"), os.path.join(root, "train.parquet")
    for path in (questions, table):
        if not os.path.isfile(path):
            raise TriviumError(f"{root} holds no {os.path.basename(path)}: give the folder with DAQUAR's questions and"
                               " pictures")  # fmt: skip
    try:
        columns = pq.read_table(table, columns=["file", "image"]).to_pydict()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise TriviumError(f"{table} is no table of files and pictures ({error}): get it again") from None
    pictures = dict(zip(columns["file"], columns["image"], strict=True))
    asked: list[tuple[Row, str] | BadSample] = []
    several = 0
    for record in json_lines(questions):
        if isinstance(record, BadSample):
            asked.append(record)
            continue
        try:
            answers = record.items("answer")
            if len(answers) > 1:
                several += 1
                continue
            asked.append(_daquar(record, answers))
        except BadSample as bad:
            asked.append(bad)
    splits: dict[str, list[tuple[Row, str] | BadSample]] = {"train": [], "dev": []}
    for each in asked:
        apart = isinstance(each, tuple) and _is_held_out("daquar", str(each[0].image), held_out)
        splits["dev" if apart else "train"].append(each)
    names = sorted({each[1] for each in splits["train"] if isinstance(each, tuple)})
    number_of = {name: number for number, name in enumerate(names)}
    read = {
        name: PicturesInMemory(
            [e if isinstance(e, BadSample) else _labelled(e[0], number_of.get(e[1], len(names)), e[1]) for e in found],
            pictures,
        )
        for name, found in splits.items()
    }
    notes = [f"{several:,} questions with several answers are left out"] if several else []
    return Splits(read.pop("train"), dict(read), (*names, OTHER), notes=notes)


def as_answers(splits: Splits) -> Splits:
    """The same questions for a model that writes: what is right is one of a list of answers, where it was a class."""
    names = tuple(name for name in splits.labels if name != OTHER)

    def written(rows: LabelledRows) -> LabelledRows:
        return rows.with_rows([_written(row, len(names)) for row in rows.rows])

    held_out = {name: written(rows) for name, rows in splits.held_out.items()}
    return replace(splits, train=written(splits.train), held_out=held_out, labels=names)


def _written(row: Row | BadSample, count: int) -> Row | BadSample:
    if isinstance(row, BadSample) or row.label is None:
        return row
    return replace(row, label=None, answers={row.label: 1.0} if row.label < count else {})


def _labelled(row: Row, label: int, answer: str) -> Row:
    return Row(row.file, row.where, row.key, row.text, image=row.image, label=label, truths=(answer,))


def _is_held_out(data: str, picture: str, share: float) -> bool:
    return hash64(data, "held out", picture) % 10_000 < share * 10_000


def _daquar(record: Record, answers: list[Any]) -> tuple[Row, str]:
    """Raises BadSample."""
    if not answers or not isinstance(answers[0], str) or not answers[0].strip():
        raise record.bad('its "answer" holds no text')
    row = Row(record.file, record.entry, record.entry, record.text("question"), image=record.text("file"))
    return row, answers[0].strip()


class _EasyFiles:
    """The files of easy-VQA, in the package or unpacked."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.archive: zipfile.ZipFile | None = None
        try:
            if os.path.isfile(root):
                self.archive = zipfile.ZipFile(root)
        except (OSError, zipfile.BadZipFile) as error:
            raise TriviumError(f"{root} is no package of easy-VQA ({error}): pip download --no-deps easy-vqa") from None
        self.folder = next((name for name in ("easy_vqa/data", "data", "") if self._has(f"{name}/train")), None)
        if self.folder is None:
            raise TriviumError(
                f"{root} holds no train/questions.json: give the package of easy-VQA (pip download --no-deps easy-vqa)"
                " or its folder data"
            )

    def _has(self, folder: str) -> bool:
        name = f"{folder}/questions.json".lstrip("/")
        return name in self.archive.namelist() if self.archive else os.path.isfile(os.path.join(self.root, name))

    def read(self, name: str) -> bytes:
        path = f"{self.folder}/{name}".lstrip("/")
        try:
            return self.archive.read(path) if self.archive else Path(self.root, path).read_bytes()
        except (OSError, KeyError) as error:
            raise TriviumError(f"{self.root} lacks {path} ({error}): get it again") from None


def _easy_rows(files: _EasyFiles, split: str) -> list[tuple[Row, str]]:
    name = f"{split}/questions.json"
    where = f"{files.root}, {name}"
    try:
        entries = json.loads(files.read(name))
        return [
            (Row(where, f"entry {n}", f"{split} {n}", question, image=f"{split}/images/{picture}.png"), answer)
            for n, (question, answer, picture) in enumerate(entries)
        ]
    except (ValueError, TypeError) as error:
        raise TriviumError(f"{where} is no list of questions, answers and pictures ({error}): get it again") from None
