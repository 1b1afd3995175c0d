"""Referring expressions, each with the box of what it means: RefCOCO, RefCOCO+ and RefCOCOg (Yu et al. 2016) as their
owners (github.com/lichengunc/refer) lay them out, as ALBEF's annotation files name them, and as scenes are written.

    refcoco+/refs(unc).p            expressions: a pickle, read as plain data; or refs(unc).json with the same list
    refcoco+/instances.json         sizes of pictures and boxes of objects, as COCO has them
    refcoco+/dets.json              boxes that a detector proposes, by picture: {"581857": [[x, y, w, h, ...], ...]}
    refcoco+_{train,val,test}.json  ALBEF's lists of {"image", "text", "ref_id"}; where one is, its texts count
    images/mscoco/images/train2014/COCO_train2014_000000581857.jpg, or train2014/...

all below one folder. Scenes have such a folder for each half, train/ and val/; the one above them is as good. Boxes are
(left, top, width, height) in pixels of the picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trivium.data.read_rows import ReadRows
from trivium.data.records import Record, is_number, json_elements, json_object
from trivium.data.unpickling import read_pickle
from trivium.errors import BadSample, TriviumError

NAMES = ("refcoco+", "refcoco", "refcocog")
PICTURES = ("images/mscoco/images/train2014", "train2014", "images/train2014")  # where they may lie below a root
SPLITS = ("val", "testA", "testB", "test")  # that are measured
SLACK = 1.0  # pixels that a box of COCO may reach over the edge by rounding

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Expression:
    """One text, and what it means."""

    file: str
    where: str  # its entry there: how messages name it
    key: str  # "reference/sentence"
    text: str
    image: str  # path
    image_id: int
    size: tuple[int, int]  # of the picture in pixels: height and width
    box: Box
    number: int  # of that box among the annotated ones of the picture


@dataclass
class Referring:
    """One data set."""

    name: str  # of NAMES
    splits: dict[str, list[Expression | BadSample]]
    annotated: dict[int, np.ndarray]  # every annotated box of a picture, float64 [K, 4]
    proposed: dict[int, np.ndarray] | None  # of a detector, likewise; None: there are none
    tables: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def good(self, split: str) -> list[Expression]:
        return [each for each in self.splits[split] if isinstance(each, Expression)]

    def bad(self, split: str) -> list[BadSample]:
        return [each for each in self.splits[split] if isinstance(each, BadSample)]


class ExpressionRows(ReadRows[Expression]):
    """Expressions with their pictures as a Source: rows of one picture share its number."""

    def __init__(self, rows: Sequence[Expression | BadSample]) -> None:
        super().__init__(rows, "pairs")

    def picture(self, row: int) -> bytes:
        return self.picture_file(row, self.row(row).image)

    def picture_path(self, row: int) -> str:
        return self.row(row).image

    def captions(self, row: int) -> list[str]:
        return [self.row(row).text]

    def identity(self, row: int) -> str:
        return os.path.abspath(self.row(row).image)


def find_referring(root: str | Path, names: Sequence[str] = NAMES) -> Referring | None:
    """The first of these that lies below a folder, all its splits. None where there is none. Raises TriviumError."""
    halves = [base for base in (Path(root), Path(root) / "train", Path(root) / "val") if base.is_dir()]
    for name in names:
        folders = [_Folder(base, name) for base in halves]
        folders = [folder for folder in folders if folder.references is not None]
        if folders:
            return _joined(name, folders)
    return None


def read_referring(root: str | Path) -> Referring:
    """`find_referring`. Raises TriviumError where there is none."""
    found = find_referring(root)
    if found is None:
        raise TriviumError(
            f"{root} holds no referring expressions: give the folder in which refcoco+/refs(unc).p and"
            " refcoco+/instances.json lie, as github.com/lichengunc/refer publishes them, or one that"
            " `trivium data scenes` wrote as refcoco"
        )
    return found


def _joined(name: str, folders: Sequence[_Folder]) -> Referring:
    found = Referring(name, {}, {}, None)
    for folder in folders:
        for split, expressions in folder.splits().items():
            found.splits.setdefault(split, []).extend(expressions)
        found.annotated |= {picture: boxes for picture, (_, boxes, _) in folder.instances.items()}
        if folder.proposals.is_file():
            found.proposed = (found.proposed or {}) | folder.proposed()
        found.tables += folder.tables
        found.notes += folder.notes
    return found


class _Folder:
    """One data set below one root."""

    def __init__(self, base: Path, name: str) -> None:
        self.base, self.name, self.folder = base, name, base / name
        kinds = [self.folder / f"refs({by}).{suffix}" for by in ("unc", "umd", "google") for suffix in ("p", "json")]
        self.references = next((path for path in kinds if path.is_file()), None)
        self.proposals = self.folder / "dets.json"
        self.notes: list[str] = []

    @property
    def tables(self) -> list[Path]:
        lists = [self.base / f"{self.name}_{split}.json" for split in ("train", "val", "test")]
        every = [self.references, self.folder / "instances.json", self.proposals, *lists]
        return [path for path in every if path is not None and path.is_file()]

    @cached_property
    def pictures(self) -> Path:
        """The folder of pictures."""
        found = next((self.base / each for each in PICTURES if (self.base / each).is_dir()), None)
        if found is None:
            raise TriviumError(f"{self.base} holds no pictures: put COCO's folder train2014 there")
        return found

    @cached_property
    def instances(self) -> dict[int, tuple[Mapping[str, Any], np.ndarray, dict[int, int]]]:
        """By picture: its entry, the boxes in it, and which box an annotation has. A box that is none is left out."""
        file = str(self.folder / "instances.json")
        whole = json_object(file)
        images: dict[int, Mapping[str, Any]] = {}
        boxes: dict[int, list[Box]] = {}
        numbers: dict[int, dict[int, int]] = {}
        for number, fields in enumerate(whole.items("images")):
            record = Record(file, f"picture entry {number}", fields)
            try:
                if record.integer("width") < 1 or record.integer("height") < 1:
                    raise record.bad("its width or height is below 1")
                record.text("file_name")
                images[record.integer("id")] = record.fields
            except BadSample as bad:
                raise TriviumError(str(bad)) from None  # whatever else the file says rests on it
        self.broken: dict[int, BadSample] = {}  # annotations
        for number, fields in enumerate(whole.items("annotations")):
            record = Record(file, f"annotation entry {number}", fields)
            try:
                picture, annotation = record.integer("image_id"), record.integer("id")
            except BadSample as bad:
                raise TriviumError(str(bad)) from None
            try:
                if picture not in images:
                    raise record.bad(f"it is of a picture {picture} that the file does not list")
                box = _box(record, fields.get("bbox"), images[picture])
            except BadSample as bad:
                self.broken[annotation] = bad
                continue
            mine = boxes.setdefault(picture, [])
            numbers.setdefault(picture, {})[annotation] = len(mine)
            mine.append(box)
        if self.broken:
            first = next(iter(self.broken.values()))
            self.notes.append(f"{len(self.broken):,} annotated boxes cannot be used; the first: {first}")
        return {
            picture: (
                entry,
                np.array(boxes.get(picture, []), dtype=np.float64).reshape(-1, 4),
                numbers.get(picture, {}),
            )
            for picture, entry in images.items()
        }

    def splits(self) -> dict[str, list[Expression | BadSample]]:
        """All expressions; those of ALBEF's lists in place of the references' own, where there are any."""
        found: dict[str, list[Expression | BadSample]] = {}
        means: dict[int, tuple[str, Expression]] = {}  # split of a reference, and one of its expressions
        for record in self._records():
            try:
                split, expressions = self._reference(record)
            except BadSample as bad:
                said = record.fields.get("split") if isinstance(record.fields, dict) else None
                found.setdefault(said if isinstance(said, str) else "train", []).append(bad)
                continue
            found.setdefault(split, []).extend(expressions)
            for expression in expressions:
                if isinstance(expression, Expression):
                    means[record.integer("ref_id")] = split, expression
                    break
        for part in ("train", "val", "test"):
            path = self.base / f"{self.name}_{part}.json"
            if path.is_file():
                listed: dict[str, list[Expression | BadSample]] = {}
                for record in json_elements(str(path)):
                    for split, each in self._listed(record, part, means):
                        listed.setdefault(split, []).append(each)
                found |= listed
        return found

    def _records(self) -> Iterator[Record]:
        assert self.references is not None
        file = str(self.references)
        if file.endswith(".json"):
            yield from json_elements(file)
            return
        references = _as_text(read_pickle(self.references))
        if not isinstance(references, list):
            raise TriviumError(f"{file} holds no list of references: is it the file you mean?")
        for number, fields in enumerate(references):
            yield Record(file, f"entry {number}", fields)

    def _reference(self, record: Record) -> tuple[str, list[Expression | BadSample]]:
        """Raises BadSample."""
        picture, annotation, split = record.integer("image_id"), record.integer("ann_id"), record.text("split")
        if picture not in self.instances:
            raise record.bad(f"it is of a picture {picture} that instances.json does not list")
        if annotation in self.broken:
            raise record.bad(f"what it means cannot be used: {self.broken[annotation]}")
        entry, boxes, numbers = self.instances[picture]
        if annotation not in numbers:
            raise record.bad(f"it means an object {annotation} that instances.json does not list")
        number = numbers[annotation]
        left, top, width, height = boxes[number].tolist()
        found: list[Expression | BadSample] = []
        for place, sentence in enumerate(record.items("sentences")):
            inner = Record(record.file, f"{record.entry}, sentence {place}", sentence)
            try:
                expression = Expression(
                    record.file, inner.entry, f"{record.integer('ref_id')}/{place}", inner.text("sent", "raw"),
                    str(self.pictures / entry["file_name"]), picture, (entry["height"], entry["width"]),
                    (left, top, width, height), number,
                )  # fmt: skip
            except BadSample as bad:
                found.append(bad)
                continue
            found.append(expression)
        return split, found

    def _listed(
        self, record: Record, part: str, means: Mapping[int, tuple[str, Any]]
    ) -> Iterator[tuple[str, Expression | BadSample]]:
        """An entry of ALBEF's list and its split: of "test" that of its reference, testA or testB. Training needs no
        reference."""
        try:
            text = record.text("text")
            image = str(self.base / record.text("image"))
            if part == "train" and record.optional("ref_id") is None:
                box = (0.0, 0.0, 1.0, 1.0)  # nobody asks for it
                yield part, Expression(record.file, record.entry, record.entry, text, image, -1, (1, 1), box, 0)
                return
            reference = record.integer("ref_id")
            if reference not in means:
                raise record.bad(f"its reference {reference} is not in {self.references}")
            split, same = means[reference]
            key = f"{reference}/{record.entry}"
            yield (
                split,
                Expression(
                    record.file, record.entry, key, text, image, same.image_id, same.size, same.box, same.number
                ),
            )
        except BadSample as bad:
            yield ("train" if part == "train" else "val" if part == "val" else "testA"), bad

    def proposed(self) -> dict[int, np.ndarray]:
        """Boxes of dets.json, cut at the edges of their picture. Raises TriviumError."""
        file = str(self.proposals)
        found = {}
        for picture, boxes in json_object(file).fields.items():
            name = f"{file} (picture {picture})"
            if not picture.isdecimal() or not isinstance(boxes, list):
                raise TriviumError(f'{name}: it must hold {{"number of a picture": [[left, top, width, height], ...]}}')
            if int(picture) not in self.instances:
                continue  # of the other splits of COCO, say
            entry = self.instances[int(picture)][0]
            kept = []
            for number, box in enumerate(boxes):
                try:
                    kept.append(_box(Record(file, f"picture {picture}, box {number}", {}), box, entry, cut=True))
                except BadSample as bad:
                    raise TriviumError(f"{bad}: mend the file, or leave the box out") from None
            found[int(picture)] = np.array(kept, dtype=np.float64).reshape(-1, 4)
        return found


def _box(record: Record, box: Any, picture: Mapping[str, Any], cut: bool = False) -> Box:
    """Four numbers inside a picture. cut: what reaches over its edges is cut off. Raises BadSample."""
    numbers = box[:4] if isinstance(box, list) else []
    if len(numbers) < 4 or not all(map(is_number, numbers)):
        raise record.bad(f"its box {json.dumps(box)[:60]} is not [left, top, width, height]")
    left, top, width, height = (float(each) for each in numbers)
    across, down = picture["width"], picture["height"]
    is_outside = left < -SLACK or top < -SLACK or left + width > across + SLACK or top + height > down + SLACK
    if cut:
        right, bottom = min(left + width, across), min(top + height, down)
        left, top = max(left, 0.0), max(top, 0.0)
        width, height = right - left, bottom - top
        is_outside = width <= 0 or height <= 0
    if is_outside:
        raise record.bad(f"its box {numbers} lies outside its picture of {across} x {down} pixels")
    if width <= 0 or height <= 0:
        raise record.bad(f"its box {numbers} has no area")
    return left, top, width, height


def _as_text(data: Any) -> Any:
    """What Python 2 wrote as str comes as bytes."""
    if isinstance(data, bytes):
        return data.decode("utf-8", "replace")
    if isinstance(data, list | tuple):
        return [_as_text(each) for each in data]
    if isinstance(data, dict):
        return {_as_text(name): _as_text(value) for name, value in data.items()}
    return data
