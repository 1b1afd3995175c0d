"""The default data that ships inside the package: emoji in four drawing styles, clip art, glosses, a vocabulary.

Who sees what. Pairs: Twemoji and Fluent (flat and 3D) with their names and keywords. Images: Open Clip Art. Text:
WordNet glosses, and the names, keywords and titles of the rows of the same split. Never trained on: the rows of the
splits "val" and "test", with their names, keywords and titles, any picture that equals one of theirs byte for byte,
and every Noto drawing. The names of Noto emoji do stay in the streams, since the other styles share them.

The split of an emoji goes by its code points, so a concept never crosses it; that of a clip-art drawing by its
caption, that of a gloss by its synset. Fluent flat and Fluent 3D are near copies: neither is a test of the other.

NOTICE names the authors and licences; builders/embedded.py remakes the files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from trivium.errors import TriviumError
from trivium.train.protocol import Sample, hash64

FILES = Path(__file__).with_name("embedded_files")
SPLITS = ("train", "val", "test")
STYLES = ("fluent-3d", "fluent-emoji-flat", "noto", "twemoji")
HELD_OUT_STYLE = "noto"
CAPTION_KEYWORDS = 3  # keywords in a caption that has any


# ------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Emoji:
    """One drawing of one emoji."""

    image: bytes  # WebP, 64 x 64, RGB on white
    style: str  # one of STYLES
    name: str  # CLDR short name, "grinning face"
    keywords: tuple[str, ...]
    group: str  # "smileys & emotion"; empty for the 26 regional indicators
    subgroup: str  # "face smiling"; empty where the group is
    codepoints: str  # lower-case hexadecimal joined by "-", without fe0f: the concept
    split: str
    row: int  # in the file; the file is sorted by style, then by code points
    picture: int  # byte-equal pictures share this number: right answers for each other


@dataclass(frozen=True)
class ClipArt:
    """One drawing of Open Clip Art."""

    image: bytes  # WebP, 64 x 64, RGB on white
    caption: str  # its title, or what its file name says; several drawings may share one
    keywords: tuple[str, ...]  # may be empty
    category: str  # folder, "animals/birds"
    split: str
    row: int  # in the file; the file is sorted by the path of the drawing
    picture: int  # byte-equal pictures share this number


def emoji(style: str | None = None, split: str | None = None) -> list[Emoji]:
    """The emoji of one style and one split; None means all of them. In the order of the file."""
    _check("style", style, STYLES)
    _check("split", split, SPLITS)
    return [record for record in _emoji() if style in (None, record.style) and split in (None, record.split)]


def clipart(split: str | None = None) -> list[ClipArt]:
    """The clip art of one split; None means all of it. In the order of the file."""
    _check("split", split, SPLITS)
    return [record for record in _clipart() if split in (None, record.split)]


# ------------------------------------------------------------------------------------------------- streams


@dataclass(frozen=True)
class EmbeddedSource:
    """A stream of the default data, held in memory; pickles as its two names. Implements `protocol.Source`."""

    stream: str  # "pairs", "images" or "text"
    split: str

    def __len__(self) -> int:
        return len(self._samples)

    def blocks(self) -> Sequence[range]:
        return [range(len(self))]  # in memory every row is as cheap as any other

    def read(self, image_row: int, text_row: int) -> Sample:
        picture, text = self._samples[image_row], self._samples[text_row]
        sample: Sample = {"name": f"{self.stream} {self.split} row {image_row} of the embedded data"}
        if "image" in picture:
            sample["image"], sample["same_image"] = picture["image"], picture["same_image"]
        if "texts" in text:
            sample["texts"], sample["same_text"] = list(text["texts"]), text["same_text"]
        elif "text" in text:
            sample["text"], sample["same_text"] = text["text"], text["same_text"]
        return sample

    def lengths(self) -> Sequence[int] | None:
        """In characters; None for images, which have no text, and for pairs, whose caption depends on the place."""
        return [len(sample["text"]) for sample in self._samples] if self.stream == "text" else None

    @property
    def _samples(self) -> list[Sample]:
        return _samples(self.stream, self.split)


def pairs(split: str = "train") -> EmbeddedSource:
    """Twemoji, Fluent flat and Fluent 3D with caption candidates: half the name alone, half with three keywords.

    All drawings of a concept, and of concepts that share a picture, have the same `same_image` and `same_text`. In
    train, no keyword equals a held-out name or title.
    """
    return _source("pairs", split)


def images(split: str = "train") -> EmbeddedSource:
    """Open Clip Art, pictures alone."""
    return _source("images", split)


def text(split: str = "train") -> EmbeddedSource:
    """Glosses ("dog, domestic dog: a member of ..."), and a line "name, keyword, keyword" for each emoji and each
    caption of the clip art. In train, no entry of such a line and no word that is defined equals a held-out name or
    title; within a definition it may occur."""
    return _source("text", split)


def corpus() -> Iterator[str]:
    """What a vocabulary is learned from: the text stream and the captions of the pairs, train only."""
    for sample in _samples("text", "train"):
        yield sample["text"]
    for sample in _samples("pairs", "train"):
        yield from sample["texts"]


def bert_vocabulary() -> list[str]:
    """The 30,522 word pieces of uncased BERT, in the order of their ids."""
    return _file("bert_uncased_vocabulary.txt").read_text(encoding="utf8").removesuffix("\n").split("\n")


# ------------------------------------------------------------------------------------------------ captions


def captions(name: str, keywords: Sequence[str]) -> list[str]:
    """Caption candidates: the name alone as often as the name with three keywords, which together use every keyword.

    A name with no keyword but itself gives the name alone; with fewer than three, the name and all of them.
    """
    others = [keyword for keyword in dict.fromkeys(keywords) if keyword.lower() != name.lower()]
    if not others:
        return [name]
    # Keywords stand in alphabetical order; a hash mixes them, so that triples are not runs of the alphabet.
    others.sort(key=lambda keyword: hash64("caption", name, keyword))
    starts = range(0, len(others), CAPTION_KEYWORDS)
    around = others + others[: CAPTION_KEYWORDS - 1]  # the last triple is filled up from the first
    longer = [", ".join([name, *dict.fromkeys(around[start : start + CAPTION_KEYWORDS])]) for start in starts]
    return [name] * len(longer) + longer


def concept_numbers(records: Sequence[Emoji]) -> dict[str, int]:
    """codepoints -> a number shared by all concepts that are linked by byte-equal pictures. Fits int64.

    The number is a hash of the smallest code points of the linked concepts: stable, and unlike that of other data.
    """
    parent: dict[str, str] = {}

    def root(concept: str) -> str:
        while parent.setdefault(concept, concept) != concept:
            concept = parent[concept]
        return concept

    by_picture: defaultdict[int, list[str]] = defaultdict(list)
    for record in records:
        by_picture[record.picture].append(record.codepoints)
    for concepts in by_picture.values():
        roots = sorted({root(concept) for concept in concepts})
        for other in roots[1:]:
            parent[other] = roots[0]
    return {concept: _number("emoji", root(concept)) for concept in list(parent)}


# ----------------------------------------------------------------------------------------- reading the files


def _source(stream: str, split: str) -> EmbeddedSource:
    _check("split", split, SPLITS)
    return EmbeddedSource(stream, split)


def _check(what: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise TriviumError(f"the embedded data has no {what} {value!r}: choose one of {', '.join(known)}")


def _file(name: str) -> Path:
    path = FILES / name
    if not path.is_file():
        raise TriviumError(f"{path} is missing, so this installation is incomplete: install trivium again")
    return path


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(_file(name)).to_pylist()
    return rows


def _picture_numbers(rows: list[dict[str, Any]]) -> list[int]:
    first: dict[bytes, int] = {}
    return [first.setdefault(row["image"], number) for number, row in enumerate(rows)]


def _number(*parts: str) -> int:
    return hash64("embedded", *parts) % 2**63  # same_B is int64


@cache
def _emoji() -> tuple[Emoji, ...]:
    rows = _rows("emoji.parquet")
    numbers = _picture_numbers(rows)
    return tuple(
        Emoji(**row | {"keywords": tuple(row["keywords"])}, row=index, picture=numbers[index])
        for index, row in enumerate(rows)
    )


@cache
def _clipart() -> tuple[ClipArt, ...]:
    rows = _rows("clipart.parquet")
    numbers = _picture_numbers(rows)
    return tuple(
        ClipArt(**row | {"keywords": tuple(row["keywords"])}, row=index, picture=numbers[index])
        for index, row in enumerate(rows)
    )


@cache
def _samples(stream: str, split: str) -> list[Sample]:
    return {"pairs": _pair_samples, "images": _image_samples, "text": _text_samples}[stream](split)


def _pair_samples(split: str) -> list[Sample]:
    concepts = concept_numbers(_emoji())
    held_out = {record.picture for record in _emoji() if record.split != "train"} if split == "train" else set()
    names = _held_out_names(split)
    return [
        {
            "image": record.image,
            "texts": captions(record.name, [word for word in record.keywords if word.lower() not in names]),
            "same_image": concepts[record.codepoints],
            "same_text": concepts[record.codepoints],
        }
        for record in emoji(split=split)
        if record.style != HELD_OUT_STYLE and record.picture not in held_out
    ]


def _image_samples(split: str) -> list[Sample]:
    held_out = {record.picture for record in _clipart() if record.split != "train"} if split == "train" else set()
    return [
        {"image": record.image, "same_image": _number("clipart", str(record.picture))}
        for record in clipart(split)
        if record.picture not in held_out
    ]


def _text_samples(split: str) -> list[Sample]:
    held_out = _held_out_names(split)
    entries = [(record.name, *record.keywords) for record in emoji(split=split)]
    entries += [(record.caption, *record.keywords) for record in clipart(split)]
    lines = [", ".join(dict.fromkeys(word for word in line if word.lower() not in held_out)) for line in entries]
    glosses = [row["text"] for row in _rows("glosses.parquet") if row["split"] == split]
    lines += [text for text in glosses if held_out.isdisjoint(lemmas(text.lower()))]
    return [{"text": line, "same_text": _number("text", line)} for line in dict.fromkeys(lines) if line]


def lemmas(gloss: str) -> list[str]:
    """The words that a gloss defines: what stands before its colon."""
    return gloss.partition(": ")[0].split(", ")


def _held_out_names(split: str) -> set[str]:
    """Names and titles, in lower case, that no entry of a training stream may equal; none for other splits."""
    if split != "train":
        return set()
    names = {record.name.lower() for record in _emoji() if record.split != "train"}
    return names | {record.caption.lower() for record in _clipart() if record.split != "train"}
