"""Captioned pictures for retrieval: Flickr30K and COCO, test part of Karpathy's splits (Karpathy and Fei-Fei 2015).

Five captions to a picture. A few pictures of COCO have six or seven: the first five are kept, as in the published
scores (25,000 captions of 5,000 pictures, where the file has 25,010).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from trivium.data.records import Record, json_elements
from trivium.data.shards import TarShards
from trivium.errors import BadSample, TriviumError
from trivium.evaluate.datasets.pictures import PictureFiles, Pictures, ShardPictures, Some, json_of, lines_of

CAPTIONS = 5  # of a picture


@dataclass(frozen=True)
class Captioned:
    """Pictures with their captions, row by row."""

    pictures: Pictures
    captions: tuple[tuple[str, ...], ...]
    tables: tuple[Path, ...] = ()
    splits: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, rows: int) -> Captioned:
        """At most so many rows, evenly spread."""
        if rows >= len(self):
            return self
        kept = np.arange(rows) * len(self) // rows
        captions = tuple(self.captions[row] for row in kept.tolist())
        return replace(self, pictures=Some(self.pictures, kept), captions=captions)


@dataclass(frozen=True)
class CaptionLayout:
    name: str
    pictures: int  # of the test split
    folders: tuple[str, ...]  # where pictures and lists may lie, below the root of all data
    karpathy: str
    albef: str
    flat: str
    inside: tuple[str, ...]  # where the pictures may lie below that folder
    expected: str
    owners: str
    copies: tuple[str, ...]


RETRIEVAL = (
    CaptionLayout(
        "Flickr30K retrieval", 1000, ("flickr30k", "Flickr30k", "."), "dataset_flickr30k.json", "flickr30k_test.json",
        "flickr30k_test_karpathy.txt", ("flickr30k-images", "flickr30k_images", "images", "."),
        "flickr30k/{dataset_flickr30k.json (Karpathy) or flickr30k_test.json (ALBEF) or flickr30k_test_karpathy.txt,"
        " flickr30k-images/*.jpg}",
        "https://shannon.cs.illinois.edu/DenotationGraph/ (pictures),"
        " https://cs.stanford.edu/people/karpathy/deepimagesent/ (splits)",
        ("flickr30k",),
    ),
    CaptionLayout(
        "COCO retrieval", 5000, ("coco", "COCO", "."), "dataset_coco.json", "coco_test.json",
        "coco_test_karpathy.json", (".", "images"),
        "coco/{dataset_coco.json (Karpathy) or coco_test.json (ALBEF) or coco_test_karpathy.json, val2014/*.jpg}",
        "https://cocodataset.org/#download (pictures), https://cs.stanford.edu/people/karpathy/deepimagesent/ (splits)",
        ("mscoco_captions",),
    ),
)  # fmt: skip
BY_NAME = {layout.name: layout for layout in RETRIEVAL}


def find_captions(layout: CaptionLayout, root: Path) -> Captioned | None:
    """The test split, from whichever of its lists is there; None where none is. Raises TriviumError."""
    readers: tuple[tuple[str, Callable[[Path], list[Entry]]], ...] = (
        (layout.karpathy, partial(_karpathy, ("test",))), (layout.albef, _albef), (layout.flat, _flat),
    )  # fmt: skip
    for name in layout.folders:
        folder = root / name
        for table, read in readers:
            if (folder / table).is_file():
                return _noted(layout, _with_files(folder, folder / table, layout, _entries(folder / table, read)))
    for copy in layout.copies:
        for prefix in ("wds_", ""):
            tars = sorted(
                (root / f"{prefix}{copy}" / "test").glob("*.tar"), key=lambda path: (len(path.name), path.name)
            )
            if tars:
                return _noted(layout, _shards(tars))
    return None


Entry = tuple[str, list[str]]  # a picture's path as the list has it, its captions or some of them


def by_karpathy(layout: CaptionLayout, folder: Path, table: Path, splits: Sequence[str]) -> Captioned:
    """Some of his splits, with all their captions, whose pictures lie below a folder. Raises TriviumError."""
    return _with_files(folder, table, layout, _entries(table, partial(_karpathy, splits)), " and ".join(splits))


def _karpathy(splits: Sequence[str], table: Path) -> list[Entry]:
    """{"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}"""
    found = []
    for number, fields in enumerate(json_of(table)["images"]):
        image = Record(str(table), f"image {number}", fields)
        if image.value("split") in splits:
            path = "/".join(filter(None, (image.optional("filepath"), image.text("filename"))))
            captions = [Record(str(table), f"image {number}", each).text("raw") for each in image.items("sentences")]
            found.append((path, captions))
    return found


def _albef(table: Path) -> list[Entry]:
    """[{"image": path, "caption": [...]}]; a single caption may stand without a list, a picture in several entries."""
    found = []
    for entry in json_elements(str(table)):
        caption = entry.value("caption")
        captions = [caption] if isinstance(caption, str) else caption
        if not isinstance(captions, list) or not all(isinstance(each, str) for each in captions):
            raise entry.bad('its "caption" is neither a text nor a list of texts')
        if not captions:
            raise entry.bad('its "caption" is an empty list')
        blank = next((number for number, each in enumerate(captions, start=1) if not each.strip()), None)
        if blank is not None:
            raise entry.bad(f'its "caption" is blank (text {blank} of {len(captions)})')
        found.append((entry.text("image"), captions))
    return found


def _flat(table: Path) -> list[Entry]:
    """A header and lines "picture.jpg,caption"; or, as .json, COCO's own form."""
    found = []
    if table.suffix == ".json":
        content = json_of(table)
        name = {image["id"]: f"val2014/{image['file_name']}" for image in content["images"]}
        for number, entry in enumerate(content["annotations"]):
            if isinstance(entry["caption"], str) and not entry["caption"].strip():
                raise BadSample(str(table), f"annotation {number}", 'its "caption" is blank')
            found.append((name[entry["image_id"]], [entry["caption"]]))
        return found
    for number, line in enumerate(lines_of(table)[1:], start=2):
        picture, comma, caption = line.partition(",")  # captions hold commas of their own
        if not comma:
            raise TriviumError(f"{table} (line {number}) is no picture with its caption after a comma")
        caption = caption.strip().strip('"')
        if not caption.strip():
            raise BadSample(str(table), f"line {number}", "the caption after its comma is blank")
        found.append((picture, [caption]))
    return found


def _entries(table: Path, read: Callable[[Path], list[Entry]]) -> list[Entry]:
    """What a list holds, checked: each picture once, where it first stands, with all its captions."""
    found: dict[str, list[str]] = {}
    try:
        for picture, captions in read(table):
            if not isinstance(picture, str) or not all(isinstance(caption, str) for caption in captions):
                raise TypeError(f"{picture} with {captions}")
            found.setdefault(picture, []).extend(captions)
    except BadSample as bad:
        raise TriviumError(f"{bad}: mend it, or fetch the list again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise TriviumError(f"{table} is no list of captions ({error!r}): fetch it again") from None
    return list(found.items())


def _with_files(
    folder: Path, table: Path, layout: CaptionLayout, entries: list[Entry], split: str = "test"
) -> Captioned:
    """Lists of different owners begin the paths of the pictures differently: the first form that is there is taken."""
    if not entries:
        raise TriviumError(f"{table} holds no picture of the {split} split: fetch it again")
    first = entries[0][0]
    forms = {
        (inside, parts): folder / inside / "/".join(first.split("/")[-parts:])
        for inside in layout.inside
        for parts in range(first.count("/") + 1, 0, -1)
    }
    form = next((form for form, path in forms.items() if path.is_file()), None)
    if form is None:
        raise TriviumError(f"{table} names {first}, which is not below {folder}: unpack the pictures there")
    inside, parts = form
    names = ["/".join(picture.split("/")[-parts:]) for picture, _ in entries]
    return Captioned(
        PictureFiles(folder / inside, names), tuple(tuple(captions) for _, captions in entries), (table,),
        f"the {split} split of {table.name}",
    )  # fmt: skip


def _shards(tars: list[Path]) -> Captioned:
    """A text file of each picture, one caption a line."""
    shards = TarShards(tars, "pairs")
    rows, captions = [], []
    for row in range(len(shards)):
        try:
            [text] = shards.captions(row)
        except (BadSample, ValueError) as error:
            raise TriviumError(f"{shards.where(row)[0]} ({shards.where(row)[1]}) has no captions: {error}") from None
        captions.append(tuple(line.strip() for line in text.splitlines() if line.strip()))
        rows.append(row)
    return Captioned(ShardPictures(shards), tuple(captions), (), "the test split of the copy in tar shards")


def _noted(layout: CaptionLayout, found: Captioned) -> Captioned:
    """Five captions to a picture; what differs from the published split is noted."""
    notes = list(found.notes)
    for row, captions in enumerate(found.captions):
        if not captions:
            raise TriviumError(f"{found.pictures.name(row)} has no caption in {found.splits}: fetch it again")
    more = sum(len(captions) > CAPTIONS for captions in found.captions)
    fewer = sum(len(captions) < CAPTIONS for captions in found.captions)
    if more:
        notes.append(f"{more:,} pictures have more than {CAPTIONS} captions, of which the first {CAPTIONS} are kept")
    if fewer:
        notes.append(f"{fewer:,} pictures have fewer than {CAPTIONS} captions")
    if len(found) != layout.pictures:
        notes.append(f"{len(found):,} pictures where the published scores rest on {layout.pictures:,}")
    kept = tuple(captions[:CAPTIONS] for captions in found.captions)
    return Captioned(found.pictures, kept, found.tables, found.splits, tuple(notes))
