"""Sentences as pictures: our own rendering of SST-2, for whoever has not the official pictures of rendered SST-2.

Black letters on white, 448 x 448, in Pillow's own font, as large as the sentence allows. It is another data set than
CLIP's: another font, and GLUE's training file holds phrases where the official pictures show whole reviews. So it has a
name of its own, `rendered_sst2_own`, and no published score beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trivium.data.glue import read_glue
from trivium.data.labelled import LabelledRows
from trivium.evaluate.datasets.pictures import DataSet, Split

SIDE, MARGIN = 448, 24  # pixels
SIZES = (48, 40, 32, 26, 20, 14)  # of the letters; what is too long for the smallest is cut at the lower edge
LEADING = 1.25  # lines, in sizes


class RenderedTexts:
    """A picture of each text, drawn when it is read."""

    def __init__(self, of: Path, names: Sequence[str], texts: Sequence[str]) -> None:
        self.of, self.names, self.texts = of, list(names), list(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def name(self, row: int) -> str:
        return self.names[row]

    def read(self, row: int) -> np.ndarray:
        return rendered(self.texts[row])

    def files(self) -> Iterable[Path]:
        return [self.of]


def rendered(text: str) -> np.ndarray:
    """uint8 [448, 448, 3]."""
    for size in SIZES:
        lines = _lines(text, size)
        if len(lines) * LEADING * size <= SIDE - 2 * MARGIN:
            break
    picture = Image.new("L", (SIDE, SIDE), 255)
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + round(number * LEADING * size)), line, fill=0, font=_font(size))
    return np.repeat(np.asarray(picture)[..., None], 3, axis=2)


def _lines(text: str, size: int) -> list[str]:
    """Broken at blanks; a word that is too wide stands alone and is cut at the right edge."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(size).getlength(longer) <= SIDE - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def sst2(folder: Path) -> DataSet:
    """SST-2/{train,dev}.tsv of GLUE, drawn."""
    read = read_glue("sst2", str(folder))
    parts = {"train": read.train, "dev": read.held_out["dev"]}
    notes = [
        f"{len(rows) - len(list(rows.good())):,} of {len(rows):,} lines of {name}.tsv cannot be used and are left out"
        for name, rows in parts.items()
        if len(rows) > len(list(rows.good()))
    ]
    train, test = (_split(folder / f"{name}.tsv", rows) for name, rows in parts.items())
    return DataSet(
        read.labels, train, test, tables=(folder / "train.tsv", folder / "dev.tsv"),
        prompts=tuple(f"a {label} review" for label in read.labels), notes=tuple(notes),
        splits="our own rendering of GLUE's sentences, train.tsv against dev.tsv; not the official pictures, so no"
        " published score stands beside it",
    )  # fmt: skip


def _split(file: Path, rows: LabelledRows) -> Split:
    good = list(rows.good())
    pictures = RenderedTexts(file, [f"{file.name} {row.where}" for row in good], [row.text or "" for row in good])
    return Split(pictures, np.array([row.label for row in good], dtype=np.int64))
