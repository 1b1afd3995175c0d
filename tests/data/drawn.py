"""A small source of drawn pictures with captions, some of them unreadable on purpose."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from trivium.data.tokenizer import Tokenizer
from trivium.errors import BadSample
from trivium.train.protocol import Sample

COLOURS = ("red", "green", "blue", "yellow", "brown", "white")
THINGS = ("mug", "lighthouse", "dog", "teapot", "bicycle", "tree", "boat")


def drawn_picture(row: int, height: int = 20, width: int = 24) -> bytes:
    """A PNG of noise, another one for each row."""
    pixels = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def caption(row: int) -> str:
    thing = " and a ".join(THINGS[(row + more) % len(THINGS)] for more in range(1 + row % 3))
    return f"a {COLOURS[row % len(COLOURS)]} {thing}, number {row}"


def tokenizer() -> Tokenizer:
    return Tokenizer.train((caption(row) for row in range(300)), 300)


@dataclass
class DrawnSource:
    """bad_text: rows that raise BadSample. bad_image: rows with half a picture. kills: rows that end a worker."""

    num_rows: int
    rows_per_block: int = 10
    bad_text: frozenset[int] = frozenset()
    bad_image: frozenset[int] = frozenset()
    kills: frozenset[int] = frozenset()
    concepts: int | None = None  # rows of equal number modulo this are one concept
    height: int = 20
    width: int = 24

    def __len__(self) -> int:
        return self.num_rows

    def blocks(self) -> Sequence[range]:
        starts = range(0, self.num_rows, self.rows_per_block)
        return [range(start, min(start + self.rows_per_block, self.num_rows)) for start in starts]

    def read(self, image_row: int, text_row: int) -> Sample:
        if text_row in self.bad_text:
            raise BadSample("drawn.csv", f"line {text_row}", "the text is empty")
        if image_row in self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        data = drawn_picture(image_row, self.height, self.width)
        sample = Sample(
            image=data[: len(data) // 2] if image_row in self.bad_image else data,
            texts=[caption(text_row), caption(text_row) + " again"],
            name=f"drawn.csv (line {image_row})",
        )
        if self.concepts is not None:
            sample["same_image"], sample["same_text"] = image_row % self.concepts, text_row % self.concepts
        return sample

    def lengths(self) -> Sequence[int] | None:
        return [len(caption(row)) for row in range(self.num_rows)]


def photograph(number: int, height: int = 144, width: int = 192) -> Image.Image:
    """Soft random shapes with some grain: like a photograph, it looks the same at half the size."""
    rng = np.random.default_rng(number)
    shapes = rng.integers(30, 226, (6, 8, 1)) + rng.integers(-30, 31, (6, 8, 3))
    picture = Image.fromarray(shapes.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grain_HWC = rng.normal(0, 3, (height, width, 1))
    return Image.fromarray((np.asarray(picture) + grain_HWC).clip(0, 255).astype(np.uint8))
