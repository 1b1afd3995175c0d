"""What of the held-out rows of a task stands in training too: reported, and nothing is left out for it.

Texts are equal where their letters and digits are, whatever case, blanks and marks; near where two hashes of their runs
of four characters ("SimHash", Charikar 2002, 64 bits) differ in at most TEXT_DISTANCE bits: a share d of other runs
changes about 64 acos(1 - d) / pi bits, so 8 are a word of a long sentence, and unrelated texts are 32 apart.
Pictures are equal by their pixels, or near, as `duplicates` has it. Of more than PICTURES it is too long to open each:
then their files are compared, byte for byte, which opens only those of a size that both sides have. A picture that is
no file of its own, in a table, a shard, an archive or in memory, is then compared with its like alone, by the checksum
or the name that it is known by there, and the sentence says how many of these there are.

N rows, P pictures, C numbers of their colours, R runs of W characters.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trivium.data import duplicates
from trivium.data.decode import DecodeError, decode
from trivium.data.files import RowSource
from trivium.data.labelled import LabelledRows, Row
from trivium.data.sources import Concat
from trivium.errors import BadSample
from trivium.train.protocol import Source, mix64

TEXT_DISTANCE = 8  # bits
RUN = 4  # characters
PICTURES = 20_000  # distinct ones, beyond which files alone are compared: to open each takes longer than it is worth
END = 4096  # bytes of a file that are read before all of it is


def of_texts(train: LabelledRows, held_out: Mapping[str, LabelledRows]) -> list[str]:
    """Sentences on the rows of each held-out split, by its name, that training has too. The texts of a row, both of a
    pair, count as one. For tasks of texts alone: beside another picture a question may well be asked again. Training
    is gone through once for all splits."""
    written = _Written.by_rows(train)
    return [
        sentence for name, rows in held_out.items() for sentence in _of_written(written, _Written.by_rows(rows), name)
    ]


def of_pictures(train: LabelledRows, held_out: Mapping[str, LabelledRows]) -> list[str]:
    """Likewise on those that show a picture which training shows, with whatever text beside it: of each held-out split
    by its name. Training is gone through once for all of them."""
    shown = _Shown.by_rows(train)
    return [sentence for name, rows in held_out.items() for sentence in _of_shown(shown, _Shown.by_rows(rows), name)]


def of_pairs(train: Source, held_out: Mapping[str, Source]) -> list[str]:
    """Likewise of captioned pictures in files, tables or shards: of each held-out split by its name. Training is gone
    through once for all of them."""
    shown = _Shown.by_source(train)
    return [sentence for name, rows in held_out.items() for sentence in _of_shown(shown, _Shown.by_source(rows), name)]


def _of_written(train: _Written, held_out: _Written, name: str) -> list[str]:
    first = dict(zip(reversed(train.texts), reversed(train.names), strict=True))
    first.pop("", None)
    equal = {place: first[text] for place, text in enumerate(held_out.texts) if text in first}
    pairs = duplicates.close_across(train.hashes, held_out.hashes, TEXT_DISTANCE)
    near = {other: train.names[one] for one, other in pairs.tolist() if other not in equal and held_out.texts[other]}
    how = f"at most {TEXT_DISTANCE} of {duplicates.BITS} bits of the hash"
    return _told(name, held_out.names, (equal, "stand, in the same letters,"), (near, f"have a near copy ({how})"))


def _of_shown(train: _Shown, held_out: _Shown, name: str) -> list[str]:
    first = dict(zip(reversed(train.pictures), reversed(train.names), strict=True))
    first.pop("", None)

    def of_training(picture_of: Mapping[str, str]) -> dict[int, str]:
        """The row of training that each held-out one meets, by the picture there of its own picture."""
        met = [(place, picture_of.get(picture)) for place, picture in enumerate(held_out.pictures)]
        return {place: first[picture] for place, picture in met if picture is not None}

    if len(first) + len(set(held_out.pictures)) > PICTURES:
        few = f"which is all that was looked for among more than {PICTURES:,} pictures"
        if inside := len({*first, *filter(None, held_out.pictures)} - train.files.keys() - held_out.files.keys()):
            few += f" ({inside:,} of them no files of their own, and known by a checksum or a name alone)"
        both = first.keys() & set(held_out.pictures)
        same = {picture: picture for picture in both if picture not in train.files or _size(train.files[picture])}
        met = of_training(same | _equal_files(train, held_out))
        told = _told(name, held_out.names, (met, f"show a picture that stands, equal to the byte, {few},"))
        return told or [f"leakage: no row of {name} shows a picture that stands, equal to the byte, in training, {few}"]
    seen, others = train.prints, held_out.prints
    by_pixels = dict(zip(reversed(seen.pixels), reversed(seen.pictures), strict=True))
    equal = {
        picture: by_pixels[pixels]
        for picture, pixels in zip(others.pictures, others.pixels, strict=True)
        if pixels in by_pixels
    }
    pairs = duplicates.near_across(seen.hashes_P, seen.colours_PC, others.hashes_P, others.colours_PC)
    near = {
        others.pictures[other]: seen.pictures[one]
        for one, other in pairs.tolist()
        if others.pictures[other] not in equal
    }
    bits = f"at most {duplicates.DISTANCE} of {duplicates.BITS} bits of the hash"
    how = f"{bits} and {duplicates.COLOURS:g} of 255 in colour"
    return _told(
        name, held_out.names, (of_training(equal), "show a picture that stands, equal to the pixel,"),
        (of_training(near), f"show a near copy ({how})"),
    )  # fmt: skip


def _equal_files(train: _Shown, held_out: _Shown) -> dict[str, str]:
    """Of pictures of `held_out` that are files, one of `train` whose file has the same bytes. Files are read where they
    agree in size, and to their beginning where they agree at their end too, which of other photographs none does."""
    ours, theirs = dict(train.files), dict(held_out.files)
    for fact in (_size, _end, _digest):
        fact_of = {path: fact(path) for path in {*ours.values(), *theirs.values()}}
        both = {fact_of[path] for path in ours.values()} & {fact_of[path] for path in theirs.values()} - {None}
        ours, theirs = (
            {picture: path for picture, path in files.items() if fact_of[path] in both} for files in (ours, theirs)
        )
    first = {fact_of[path]: picture for picture, path in reversed(ours.items())}
    return {picture: first[fact_of[path]] for picture, path in theirs.items()}


def _size(path: str) -> int | None:
    with suppress(OSError, ValueError):
        return os.stat(path).st_size or None
    return None  # so it, and what is empty, is in no one's way: whoever reads the rows says that it cannot be read


def _end(path: str) -> bytes | None:
    with suppress(OSError), open(path, "rb") as file:
        file.seek(-min(END, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return hashlib.sha256(file.read()).digest()
    return None


def _digest(path: str) -> bytes | None:
    with suppress(OSError), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
    return None


def simhashes(texts: Sequence[str]) -> np.ndarray:
    """A 64-bit hash of each text that differs in few bits where few of its runs of characters do: uint64 [N]."""
    return np.array([_simhash(text) for text in texts], dtype=np.uint64)


def _simhash(text: str) -> int:
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    codes = np.pad(codes, (0, max(0, RUN - len(codes))))
    runs_RW = np.lib.stride_tricks.sliding_window_view(codes, RUN)
    keys_R = np.unique(mix64((runs_RW << np.arange(0, 16 * RUN, 16, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)))
    votes = np.unpackbits(keys_R.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=0, dtype=np.int64)
    return int.from_bytes(np.packbits(2 * votes > len(keys_R)).tobytes(), "big")


def _letters(row: Row) -> str:
    """Of a row's texts, in lower case; a line break between the two."""
    texts = (unicodedata.normalize("NFKC", text or "").lower() for text in (row.text, row.second_text))
    return "\n".join(re.sub(r"[\W_]+", "", text) for text in texts).strip()


@dataclass(frozen=True)
class _Written:
    """The rows of a split that can be used: the letters of each ("": marks alone), and its name in messages."""

    texts: list[str]
    names: list[str]

    @cached_property
    def hashes(self) -> np.ndarray:
        return simhashes(self.texts)

    @classmethod
    def by_rows(cls, rows: LabelledRows) -> _Written:
        good = list(rows.good())
        return cls([_letters(row) for row in good], [_named(row) for row in good])


@dataclass(frozen=True)
class _Shown:
    """The rows of a split that can be used: which picture each shows ("": none), its name in messages, how the picture
    of one is read (raises BadSample), and the paths of pictures that are a file each."""

    pictures: list[str]
    names: list[str]
    read: Callable[[int], bytes]
    files: dict[str, str]

    @cached_property
    def prints(self) -> _Prints:
        return _Prints.of(self)

    @classmethod
    def by_rows(cls, rows: LabelledRows) -> _Shown:
        good = [(number, row) for number, row in enumerate(rows.rows) if isinstance(row, Row)]
        numbers = [number for number, _ in good]
        return cls(
            [row.image or "" for _, row in good],
            [_named(row) for _, row in good],
            lambda place: rows.picture(numbers[place]),
            {row.image: row.image for number, row in good if row.image and rows.picture_path(number)},
        )

    @classmethod
    def by_source(cls, source: Source) -> _Shown:
        """No picture is read for it but one that stands in a table, which is known by its bytes."""
        places: list[tuple[RowSource, int]] = []
        pictures: list[str] = []
        names: list[str] = []
        files: dict[str, str] = {}
        for part in source.sources if isinstance(source, Concat) else [source]:
            assert isinstance(part, RowSource), "captioned pictures of one's own stand in files"
            for row in range(len(part)):
                try:
                    path = part.picture_path(row)
                    picture = part.identity(row) if path is None else path
                except BadSample:
                    continue  # counted where the rows are read
                if path is not None:
                    files[picture] = path
                file, where = part.where(row)
                places.append((part, row))
                pictures.append(picture)
                names.append(f"{file} ({where})" if where else file)

        def read(place: int) -> bytes:
            part, row = places[place]
            return part.picture(row)

        return cls(pictures, names, read, files)


@dataclass(frozen=True)
class _Prints:
    """Fingerprints of the pictures that can be read, each once."""

    pictures: list[str]
    pixels: list[bytes]
    hashes_P: np.ndarray
    colours_PC: np.ndarray

    @classmethod
    def of(cls, shown: _Shown) -> _Prints:
        places: dict[str, int] = {}
        for place, picture in enumerate(shown.pictures):
            if picture:
                places.setdefault(picture, place)
        kept, prints = [], []
        for picture, place in places.items():
            try:
                prints.append(duplicates.fingerprint(decode(shown.read(place))))
            except (BadSample, DecodeError):
                continue
            kept.append(picture)
        return cls(kept, [each.pixels for each in prints], *duplicates.arrays(prints))


def _told(name: str, asked: Sequence[str], *found: tuple[dict[int, str], str]) -> list[str]:
    return [
        f"leakage: {len(rows):,} of {len(asked):,} rows of {name} {what} in training; they are counted all the same;"
        f" the first: {asked[first]} and {rows[first]}"
        for rows, what in found
        for first in list(rows)[:1]
    ]


def _named(row: Row) -> str:
    return f"{row.file} ({row.where})"
