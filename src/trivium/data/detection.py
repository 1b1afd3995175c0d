"""Pictures with boxes: COCO (Lin et al. 2014) as its owners publish it, and Visual Genome in the form that UniT reads.

    COCO  annotations/instances_{train,val}2017.json, train2017/, val2017/
    VG    annotations/instances_{train,val}_split_by_coco_2017.json (or beside the pictures' folder), images/

Easy to get wrong: classes keep the published numbers, holes included (COCO's 80 are numbered 1 to 90), so a model has
the largest number + 1 of them; a box is (left, top, width, height); a crowd is no target, and in evaluation what falls
on it counts neither way; a box of VG has room for 16 attributes, padded with -1.

M boxes of all pictures, A places for attributes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trivium.data.files import RowSource
from trivium.data.records import Record, is_number, json_object
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import Sample

MAX_ATTRIBUTES = 16  # of one box, in VG's file
ATTRIBUTES = "attribute_ids_max16"
NUMBERS = 100_000  # that classes may have, and attributes
LEAST_SIDE = 1e-6  # pixels that a box keeps inside its picture; with less it has no area


Names = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its annotations and pictures below its folder; {half} is train or val."""

    title: str
    figure: str  # how tables of papers call it
    validation: str  # and its validation half
    annotations: tuple[str, ...]  # the first that is there counts
    pictures: tuple[str, ...]
    has_attributes: bool
    owners: str
    places: tuple[str, ...]  # its own folder below one of all data, the first that is there
    num_validation: int | None  # pictures of the validation half; None: not known

    def file(self, root: str, half: str) -> str | None:
        paths = (os.path.join(root, name.format(half=half)) for name in self.annotations)
        return next((path for path in paths if os.path.isfile(path)), None)


LAYOUTS = {
    "coco": Layout(
        "COCO",
        "COCO detection",
        "val2017",
        ("annotations/instances_{half}2017.json", "instances_{half}2017.json"),
        ("{half}2017",),
        False,
        "https://cocodataset.org/#download",
        ("coco", "COCO", "."),
        5000,
    ),
    "vg": Layout(
        "Visual Genome",
        "VG detection",
        "val",
        ("annotations/instances_{half}_split_by_coco_2017.json", "instances_{half}_split_by_coco_2017.json"),
        ("images", "VG_100K", "VG_100K_2"),
        True,
        "UniT's authors, as annotations_split_by_coco_2017.tar.gz",
        ("visual_genome", "vg", "VG", "."),
        None,
    ),
}


@dataclass(frozen=True)
class Picture:
    """An entry of "images"."""

    number: int
    file_name: str
    width: int
    height: int


class DetectionRows(RowSource):
    """Pictures with their boxes as a Source: one row a picture. The boxes of all rows are flat, in order of the rows.

    Args:
        boxes_M4: float64, (left, top, width, height) as the file has them.
        usable_M: targets of training: no crowd, and with some area inside the picture.
        attributes_MA: int64, -1 where there is none; None: the file has no attributes.
        starts: row r has the boxes starts[r] to starts[r + 1].
    """

    kind = "images"

    def __init__(
        self,
        file: str,
        folders: tuple[str, ...],
        pictures: list[Picture],
        starts: np.ndarray,
        boxes_M4: np.ndarray,
        classes_M: np.ndarray,
        crowd_M: np.ndarray,
        areas_M: np.ndarray,
        usable_M: np.ndarray,
        attributes_MA: np.ndarray | None,
    ) -> None:
        self.file = file
        self.folders = folders
        self.pictures = pictures
        self.starts = starts
        self.boxes_M4 = boxes_M4
        self.classes_M = classes_M
        self.crowd_M = crowd_M
        self.areas_M = areas_M
        self.usable_M = usable_M
        self.attributes_MA = attributes_MA

    def __len__(self) -> int:
        return len(self.pictures)

    def of(self, row: int) -> slice:
        """Where the boxes of a row stand."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    def where(self, row: int) -> tuple[str, str]:
        return self.file, f"picture {self.pictures[row].number}"

    def path(self, row: int) -> str:
        name = self.pictures[row].file_name
        paths = [os.path.join(folder, name) for folder in self.folders]
        return next((path for path in paths if os.path.isfile(path)), paths[0])

    def picture(self, row: int) -> bytes:
        return self.picture_file(row, self.path(row))

    def captions(self, row: int) -> list[str]:
        return []

    def identity(self, row: int) -> str:
        return os.path.abspath(self.path(row))

    def lengths(self) -> Sequence[int]:
        """Width over height, in thousandths: pictures of one shape need no padding beside each other."""
        return [1000 * picture.width // picture.height for picture in self.pictures]

    def read(self, image_row: int, text_row: int) -> Sample:
        """`boxes`: float32 [n, 4], the corners (left, top, right, bottom) inside the picture, in its pixels."""
        sample = super().read(image_row, image_row)
        here, picture = self.of(image_row), self.pictures[image_row]
        kept = self.usable_M[here]
        sample["size"] = (picture.height, picture.width)
        sample["boxes"] = corners(self.boxes_M4[here][kept], picture).astype(np.float32)
        sample["classes"] = self.classes_M[here][kept]
        if self.attributes_MA is not None:
            sample["attributes"] = self.attributes_MA[here][kept]
        return sample

    def capped(self, limit: int | None) -> DetectionRows:
        """`limit` of the pictures, evenly spread over all."""
        if limit is None or limit >= len(self):
            return self
        rows = np.arange(limit) * len(self) // limit
        chosen = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows] or [np.arange(0)])
        starts = np.concatenate([[0], np.cumsum([self.starts[row + 1] - self.starts[row] for row in rows])])
        return DetectionRows(
            self.file, self.folders, [self.pictures[row] for row in rows], starts.astype(np.int64),
            self.boxes_M4[chosen], self.classes_M[chosen], self.crowd_M[chosen], self.areas_M[chosen],
            self.usable_M[chosen], None if self.attributes_MA is None else self.attributes_MA[chosen],
        )  # fmt: skip


@dataclass(frozen=True)
class Detection:
    """What a reader of boxes gives."""

    train: DetectionRows
    held_out: dict[str, DetectionRows]
    classes: tuple[str, ...]  # the name of each number; "" of those that stand for nothing, 0 among them
    attributes: tuple[str, ...] = ()  # likewise; none where boxes have none
    notes: list[str] = field(default_factory=list)  # sentences for the start of a run


def corners(boxes_M4: np.ndarray, picture: Picture) -> np.ndarray:
    """(left, top, right, bottom) of (left, top, width, height), clipped to the picture. float64 [M, 4]."""
    with np.errstate(over="ignore"):  # what is too large for a number lies beyond the picture too
        both = np.concatenate([boxes_M4[:, :2], boxes_M4[:, :2] + boxes_M4[:, 2:]], axis=1)
    return both.clip(0, [picture.width, picture.height, picture.width, picture.height])


def read_detection(name: str, root: str) -> Detection:
    """COCO ("coco") or Visual Genome ("vg") below `root`: train, and the validation half where it is there.

    Raises TriviumError with file and entry for what cannot be meant: a number that is none, a class or a picture that
    the file does not list, no box at all, none in training to learn from. What is left out of training or cut to its
    picture is said in `notes`.
    """
    layout = LAYOUTS[name]
    file = layout.file(root, "train")
    if file is None:
        raise TriviumError(
            f"{root} holds no {layout.annotations[0].format(half='train')}: give the folder with the annotations and"
            f" pictures of {layout.title} as they are published ({layout.owners})"
        )
    train, classes, attributes, notes = _read(layout, root, "train", file)
    if not train.usable_M.any():
        raise TriviumError(
            f"{file}: there is nothing to learn from its {len(train.usable_M):,} boxes, {int(train.crowd_M.sum()):,} of"
            " which are crowds, and the others have no area inside their picture: mend the file, or get it again"
        )
    held_out = {}
    if (other := layout.file(root, "val")) is not None:
        held_out[layout.validation], *names, more = _read(layout, root, "val", other)
        both = min(len(names[1]), len(attributes))  # where they have no names, one may have higher numbers
        if names[0] != classes or names[1][:both] != attributes[:both]:
            raise TriviumError(f"{other} lists other categories than {file}: take both from one release")
        attributes = max(attributes, names[1], key=len)
        notes += more
    return Detection(train, held_out, classes, attributes, notes)


def read_val(name: str, root: str) -> DetectionRows:
    """The validation half alone. Raises TriviumError, as `read_detection`."""
    layout = LAYOUTS[name]
    if (file := layout.file(root, "val")) is None:
        raise TriviumError(f"{root} holds no {layout.annotations[0].format(half='val')}: is it the folder you mean?")
    return _read(layout, root, "val", file)[0]


def find_val(name: str, root: str) -> tuple[DetectionRows, Names] | None:
    """The validation half from the data set's own folder below `root`, and the names of its classes; None where it is
    not there. Raises TriviumError, as `read_detection`."""
    layout = LAYOUTS[name]
    for place in layout.places:
        folder = os.path.normpath(os.path.join(root, place))
        if (file := layout.file(folder, "val")) is not None:
            return _read(layout, folder, "val", file)[:2]
    return None


def _read(layout: Layout, root: str, half: str, file: str) -> tuple[DetectionRows, Names, Names, list[str]]:
    """Pictures, names of classes, names of attributes, notes."""
    content = json_object(file)
    try:
        classes = _numbered(_records(content, "categories"))
        named = content.fields.get("attCategories")
        attributes = _numbered(_records(content, "attCategories")) if named else ()
        pictures = [_picture(record) for record in _records(content, "images")]
        number_of = {picture.number: row for row, picture in enumerate(pictures)}
        if len(number_of) < len(pictures):
            twice = next(p.number for row, p in enumerate(pictures) if number_of[p.number] != row)
            raise content.bad(f"picture {twice} is listed twice under images")
        read = _Boxes(layout, classes, attributes, pictures, number_of)
        for record in _records(content, "annotations"):
            read.add(record)
        if not read.boxes:
            raise content.bad("it has no annotations, so there is no box to learn or to find")
    except BadSample as bad:
        raise TriviumError(f"{bad}: mend the file, or get it again") from None
    folders = tuple(os.path.join(root, name.format(half=half)) for name in layout.pictures)
    present = tuple(folder for folder in folders if os.path.isdir(folder)) or folders[:1]
    return read.rows(file, present), classes, attributes or read.numbers_of_attributes(), read.notes(file)


def _records(content: Record, name: str) -> Iterator[Record]:
    for number, fields in enumerate(content.items(name)):
        yield Record(content.file, f"{name}, entry {number}", fields)


def _numbered(records: Iterator[Record]) -> Names:
    """Names by number. Raises BadSample."""
    found: dict[int, str] = {}
    for record in records:
        number = record.integer("id")
        if not 0 <= number < NUMBERS:
            raise record.bad(f"its id {number} is no number of a class")
        if number in found:
            raise record.bad(f"its id {number} is that of {found[number]} already")
        found[number] = record.text("name")
    return tuple(found.get(number, "") for number in range(max(found, default=-1) + 1))


def _picture(record: Record) -> Picture:
    width, height = record.integer("width"), record.integer("height")
    if width < 1 or height < 1:
        raise record.bad(f"a picture of {width} x {height} pixels cannot be")
    return Picture(record.integer("id"), record.text("file_name"), width, height)


class _Boxes:
    """The annotations of one file as they are gone through."""

    def __init__(
        self, layout: Layout, classes: Names, attributes: Names, pictures: list[Picture], number_of: dict[int, int]
    ) -> None:
        self.layout, self.classes, self.names, self.pictures = layout, classes, attributes, pictures
        self.number_of = number_of
        self.rows_of: list[int] = []
        self.boxes: list[tuple[float, ...]] = []
        self.numbers: list[tuple[int, bool, float, bool]] = []  # class, crowd, area, usable
        self.attributes: list[list[int]] = []
        self.left_out: list[str] = []  # how messages name each box without area
        self.cut: list[str] = []  # and each that reaches beyond its picture

    def add(self, record: Record) -> None:
        """Raises BadSample."""
        row = self.number_of.get(record.integer("image_id"))
        if row is None:
            raise record.bad(f"its picture {record.integer('image_id')} is not listed under images")
        number = record.integer("category_id")
        if not (0 <= number < len(self.classes) and self.classes[number]):
            raise record.bad(f"its category {number} is not listed under categories")
        box = _four(record)
        left, top, width, height = box
        picture, crowd = self.pictures[row], bool(record.optional("iscrowd") or 0)
        (clipped,) = corners(np.array([box]), picture)
        usable = bool((clipped[2:] - clipped[:2] > LEAST_SIDE).all()) and width > 0 and height > 0
        beyond = left < -1 or top < -1 or left + width > picture.width + 1 or top + height > picture.height + 1
        if not usable:
            self.left_out.append(record.entry)
        elif beyond:
            self.cut.append(record.entry)
        area = record.optional("area")
        self.rows_of.append(row)
        self.boxes.append(box)
        self.numbers.append((number, crowd, width * height if area is None else record.number("area"), usable))
        if self.layout.has_attributes:
            self.attributes.append(self._attributes(record))

    def _attributes(self, record: Record) -> list[int]:
        given = record.items(ATTRIBUTES) if ATTRIBUTES in record.fields else []
        if len(given) > MAX_ATTRIBUTES or any(type(each) is not int for each in given):
            raise record.bad(f'its "{ATTRIBUTES}" is no list of at most {MAX_ATTRIBUTES} whole numbers')
        known = [each for each in given if each != -1]
        if wrong := [each for each in known if not 0 <= each < NUMBERS]:
            raise record.bad(f"{wrong[0]} is no number of an attribute, and -1 where there is none")
        if self.names and any(each >= len(self.names) or not self.names[each] for each in known):
            raise record.bad(f"one of its attributes {known} is not listed under attCategories")
        return known + [-1] * (MAX_ATTRIBUTES - len(known))

    def rows(self, file: str, folders: tuple[str, ...]) -> DetectionRows:
        order = np.argsort(np.array(self.rows_of), kind="stable")
        counts = np.bincount(np.array(self.rows_of), minlength=len(self.pictures))
        number_M, crowd_M, area_M, usable_M = (np.array(column) for column in zip(*self.numbers, strict=True))
        attributes_MA = np.array(self.attributes, dtype=np.int64)[order] if self.attributes else None
        return DetectionRows(
            file, folders, self.pictures, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.array(self.boxes, dtype=np.float64)[order], number_M.astype(np.int64)[order], crowd_M[order],
            area_M.astype(np.float64)[order], (usable_M & ~crowd_M)[order], attributes_MA,
        )  # fmt: skip

    def numbers_of_attributes(self) -> Names:
        """Where the file names none: each by its number."""
        most = max((max(each) for each in self.attributes), default=-1)
        return tuple(str(number) for number in range(most + 1))

    def notes(self, file: str) -> list[str]:
        found = []
        if self.layout.has_attributes and not any(number != -1 for each in self.attributes for number in each):
            found.append(
                f'{file}: none of its {len(self.boxes):,} boxes has an attribute ("{ATTRIBUTES}"): none is learned from'
                " it, nor measured on it"
            )
        if self.left_out:
            found.append(
                f"{file}: {len(self.left_out):,} of {len(self.boxes):,} boxes have no area inside their picture and are"
                f" left out of training; the first: {self.left_out[0]}"
            )
        if self.cut:
            found.append(
                f"{file}: {len(self.cut):,} of {len(self.boxes):,} boxes reach beyond their picture and are cut to it;"
                f" the first: {self.cut[0]}"
            )
        return found


def _four(record: Record) -> tuple[float, ...]:
    """The box. Raises BadSample."""
    given: list[Any] = record.items("bbox")
    if len(given) != 4 or not all(map(is_number, given)):
        raise record.bad(f'its "bbox" {given} is not four numbers (left, top, width, height)')
    return tuple(map(float, given))
