"""What of the held-out rows of a task stands in training too: reported, and nothing is left out for it.

Texts are equal where their letters and digits are, whatever case, blanks and marks; near where two hashes of their runs
of four characters ("SimHash", Charikar 2002, 64 bits) differ in at most TEXT_DISTANCE bits: a share d of other runs
changes about 64 acos(1 - d) / pi bits, so 8 are a word of a long sentence, and unrelated texts are 32 apart.
Pictures are equal by their pixels, or near, as `duplicates` has it.

N rows, P pictures, C numbers of their colours, R runs of W characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trivium.data import duplicates
from trivium.data.decode import DecodeError, decode
from trivium.data.labelled import LabelledRows, Row
from trivium.errors import BadSample
from trivium.train.protocol import mix64

TEXT_DISTANCE = 8  # bits
RUN = 4  # characters
PICTURES = 20_000  # distinct ones, beyond which files alone are compared: to open each takes longer than it is worth


def of_texts(train: LabelledRows, held_out: LabelledRows, name: str) -> list[str]:
    """Sentences on the rows of one held-out split that training has too. The texts of a row, both of a pair, count as
    one."""
    seen, asked = (list(rows.good()) for rows in (train, held_out))
    seen_texts, asked_texts = ([_letters(row) for row in rows] for rows in (seen, asked))
    first = dict(zip(reversed(seen_texts), reversed(seen), strict=True))
    first.pop("", None)  # marks alone
    equal = {place: first[text] for place, text in enumerate(asked_texts) if text in first}
    pairs = duplicates.close_across(simhashes(seen_texts), simhashes(asked_texts), TEXT_DISTANCE)
    near = {other: seen[one] for one, other in pairs.tolist() if other not in equal}
    how = f"at most {TEXT_DISTANCE} of {duplicates.BITS} bits of the hash"
    return _told(name, asked, (equal, "stand, in the same letters,"), (near, f"have a near copy ({how})"))


def of_pictures(train: LabelledRows, held_out: LabelledRows, name: str) -> list[str]:
    """Likewise on those that show a picture which training shows, with whatever text beside it."""
    asked = list(held_out.good())
    seen_files, asked_files = _files(train), _files(held_out)

    def of_training(file_of: Mapping[str, str]) -> dict[int, Row]:
        """The row of training that each held-out one meets, by the file there of its own file."""
        files = [(place, file_of.get(row.image or "")) for place, row in enumerate(asked)]
        return {place: train.row(seen_files[file]) for place, file in files if file is not None}

    if len(seen_files) + len(asked_files) > PICTURES:
        few = f"which is all that was looked for among more than {PICTURES:,} pictures,"
        return _told(name, asked, (of_training({file: file for file in seen_files}), f"show a file, {few}"))
    seen, others = _Prints.of(train, seen_files), _Prints.of(held_out, asked_files)
    first = dict(zip(reversed(seen.pixels), reversed(seen.files), strict=True))
    equal = {file: first[pixels] for file, pixels in zip(others.files, others.pixels, strict=True) if pixels in first}
    pairs = duplicates.near_across(seen.hashes_P, seen.colours_PC, others.hashes_P, others.colours_PC)
    near = {others.files[other]: seen.files[one] for one, other in pairs.tolist() if others.files[other] not in equal}
    bits = f"at most {duplicates.DISTANCE} of {duplicates.BITS} bits of the hash"
    how = f"{bits} and {duplicates.COLOURS:g} of 255 in colour"
    return _told(
        name, asked, (of_training(equal), "show a picture that stands, equal to the pixel,"),
        (of_training(near), f"show a near copy ({how})"),
    )  # fmt: skip


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


def _files(rows: LabelledRows) -> dict[str, int]:
    """Each picture file, and the first row that shows it."""
    found: dict[str, int] = {}
    for number, row in enumerate(rows.rows):
        if isinstance(row, Row) and row.image is not None:
            found.setdefault(row.image, number)
    return found


@dataclass(frozen=True)
class _Prints:
    """Fingerprints of the files that can be read."""

    files: list[str]
    pixels: list[bytes]
    hashes_P: np.ndarray
    colours_PC: np.ndarray

    @classmethod
    def of(cls, rows: LabelledRows, files: dict[str, int]) -> _Prints:
        kept, prints = [], []
        for file, number in files.items():
            try:
                prints.append(duplicates.fingerprint(decode(rows.picture(number))))
            except (BadSample, DecodeError):
                continue  # counted where the rows are read
            kept.append(file)
        return cls(kept, [each.pixels for each in prints], *duplicates.arrays(prints))


def _told(name: str, asked: Sequence[Row], *found: tuple[dict[int, Row], str]) -> list[str]:
    return [
        f"leakage: {len(rows):,} of {len(asked):,} rows of {name} {what} in training; they are counted all the same;"
        f" the first: {_named(asked[first])} and {_named(rows[first])}"
        for rows, what in found
        for first in list(rows)[:1]
    ]


def _named(row: Row) -> str:
    return f"{row.file} ({row.where})"
