"""Scenes: embedded drawings composed on backgrounds, with exact boxes and masks, a pure function of (seed, index).

Real drawings stand in for the photographs that detection, questions and referring expressions are trained on. What is
said of a scene is in scene_language.py, the official file formats in scene_files.py.

Easy to get wrong: boxes and masks are those of what is still visible under later objects; the pixels that anti-aliasing
mixes at an edge belong to the object that has half of them or more.

Legend: H height, W width, C channels. Boxes are (left, top, width, height) in whole pixels, as COCO has them.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from trivium.data.drawings import CLIPART_STYLE, SPLITS, Category, Classes, Drawing, Split, categories, cut, pool
from trivium.data.order import Draws
from trivium.errors import TriviumError
from trivium.train.protocol import Sample, hash64

SIDE = 128  # pixels of a scene
SIZES = {"small": (20, 28), "medium": (32, 42), "large": (46, 56)}  # pixels of an object's longer side, both included
MAX_OBJECTS = 6
MAX_HIDDEN = 0.2  # share of any object that others cover, at the greatest difficulty
REPEATED = 0.45  # how often an object is of a class that the scene has already, so that counting is worth asking
TRIES = 30  # for a free place, before an object is made as small as can be
MIN_CONCEPTS = 3  # of a category; one with fewer is left out of the split
CLIPART_SHARE = 0.2  # of the objects, where the split and the class have any


@dataclass(frozen=True)
class SceneObject:
    name: str  # of the drawing, "red apple"
    category: int  # number in the scene's categories
    hue: str | None  # of drawings.HUES; None where none is dominant
    size: str  # of SIZES
    box: tuple[int, int, int, int]  # (left, top, width, height) of what is visible
    area: int  # pixels that are visible
    hidden: float  # share of its pixels that others cover
    concept: str
    style: str

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of its box."""
        left, top, width, height = self.box
        return left + width / 2, top + height / 2


@dataclass(frozen=True)
class Scene:
    index: int
    pixels_HWC: np.ndarray  # uint8
    owner_HW: np.ndarray  # int8: number of the object that a pixel belongs to; -1 for the background
    objects: tuple[SceneObject, ...]  # from the lowest to the topmost
    categories: tuple[Category, ...]

    def mask(self, number: int) -> np.ndarray:
        """bool [H, W]: what is visible of an object."""
        return self.owner_HW == number

    def category(self, number: int) -> Category:
        """Of an object."""
        return self.categories[self.objects[number].category]


@dataclass(frozen=True)
class Scenes:
    """Scenes of a split, made when they are read; pickles as its settings. Implements `protocol.Source`.

    Args:
        split: whose drawings; see `drawings.pool`. "new-scenes" has those of "train", in other scenes.
        difficulty: 0 to 1: more objects (2 to 3, then 2 to 6), smaller ones (from 40 pixels down to 20), more of them
            hidden (none, then up to 20 %), backgrounds of more contrast.
        classes: "group" has 9 classes, "subgroup" has 24, and only drawings of these.
    """

    split: Split
    count: int
    seed: int = 0
    difficulty: float = 0.5
    classes: Classes = "group"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise TriviumError(f"there are no scenes of the split {self.split!r}: choose one of {', '.join(SPLITS)}")
        if self.classes not in ("group", "subgroup"):
            raise TriviumError(f"there are no classes {self.classes!r}: choose group or subgroup")
        if not 0 <= self.difficulty <= 1:
            raise TriviumError(f"a difficulty of {self.difficulty:g}: it lies between 0 and 1")
        if self.count < 1:
            raise TriviumError(f"{self.count} scenes: ask for at least 1")

    @property
    def categories(self) -> tuple[Category, ...]:
        return categories(self.classes)

    def scene(self, index: int) -> Scene:
        """A pure function of (seed, index) and the settings; `count` only says where to stop."""
        draws = self.draws(index)
        drawings = _choose(draws.generator("drawings"), self)
        return _compose(index, drawings, draws, self)

    def draws(self, index: int) -> Draws:
        return Draws(self.seed, f"scenes {self.split} {self.classes}", index)

    def __len__(self) -> int:
        return self.count

    def blocks(self) -> Sequence[range]:
        return [range(self.count)]

    def read(self, image_row: int, text_row: int) -> Sample:
        """A scene with the captions of another (the same, save in a false pair)."""
        from trivium.data.scene_language import captions

        scene = self.scene(image_row)
        texts = scene if text_row == image_row else self.scene(text_row)
        return {
            "image": bmp(scene.pixels_HWC),
            "texts": captions(texts, self.draws(text_row)),
            "same_image": self._number(image_row),
            "same_text": self._number(text_row),
            "name": f"scene {image_row} of {self.split}, seed {self.seed}",
        }

    def lengths(self) -> Sequence[int] | None:
        return None

    def _number(self, index: int) -> int:
        return hash64("scenes", self.split, self.classes, self.seed, index) % 2**63


def bmp(pixels_HWC: np.ndarray) -> bytes:
    """The encoding that costs no time, for pictures that stay in memory."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "BMP")
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------- what is in it


def random_drawing(rng: np.random.Generator, split: Split, classes: Classes, category: int) -> Drawing:
    """One of a category that can be cut out: its concept first, then its style, so that none counts for more."""
    concepts = pool(split, classes)[category]
    num_emoji = _num_emoji(split, classes)[category]
    while True:
        from_clipart = num_emoji < len(concepts) and rng.random() < CLIPART_SHARE
        first, end = (num_emoji, len(concepts)) if from_clipart else (0, num_emoji)
        styles = concepts[int(rng.integers(first, end))]
        drawing = styles[int(rng.integers(len(styles)))]
        if cut(drawing) is not None:
            return drawing


def random_category(rng: np.random.Generator, split: Split, classes: Classes) -> int:
    """One that the split has drawings of: Noto, for one, draws no flags of countries."""
    present = _present(split, classes)
    return present[int(rng.integers(len(present)))]


@cache
def _present(split: Split, classes: Classes) -> tuple[int, ...]:
    """Categories with a few emoji, at least, that can be cut out."""
    num_emoji = _num_emoji(split, classes)
    usable = [
        sum(any(cut(drawing) is not None for drawing in styles) for styles in concepts[:number][: 2 * MIN_CONCEPTS])
        for concepts, number in zip(pool(split, classes), num_emoji, strict=True)
    ]
    return tuple(category for category, number in enumerate(usable) if number >= MIN_CONCEPTS)


@cache
def _num_emoji(split: Split, classes: Classes) -> tuple[int, ...]:
    """By category; in the pool, clip art follows after them."""
    concepts = pool(split, classes)
    return tuple(sum(styles[0].style != CLIPART_STYLE for styles in of_one) for of_one in concepts)


def _choose(rng: np.random.Generator, scenes: Scenes) -> list[Drawing]:
    """From 2 drawings on, no name twice."""
    most = 3 + round((MAX_OBJECTS - 3) * scenes.difficulty)
    num_objects = int(rng.integers(2, most + 1))
    chosen: list[Drawing] = []
    while len(chosen) < num_objects:
        if chosen and rng.random() < REPEATED:
            category = chosen[int(rng.integers(len(chosen)))].category
        else:
            category = random_category(rng, scenes.split, scenes.classes)
        drawing = random_drawing(rng, scenes.split, scenes.classes, category)
        if all(drawing.name != each.name for each in chosen):
            chosen.append(drawing)
    return chosen


# ------------------------------------------------------------------------------------------------ composition


def usual_sizes(difficulty: float) -> list[str]:
    """Those that objects are given; where a scene is full, a small one may come of any."""
    return [size for size, (_, longest) in SIZES.items() if longest >= _smallest(difficulty)]


def _smallest(difficulty: float) -> int:
    """Pixels of an object's longer side."""
    return round(40 - 20 * difficulty)


@dataclass
class _Placed:
    drawing: Drawing
    hue: str | None
    size: str
    area: int  # pixels, before anything covers it
    visible: int  # pixels, so far


def _compose(index: int, drawings: Sequence[Drawing], draws: Draws, scenes: Scenes) -> Scene:
    rng = draws.generator("places")
    smallest, sizes = _smallest(scenes.difficulty), usual_sizes(scenes.difficulty)
    chosen = [sizes[int(rng.integers(len(sizes)))] for _ in drawings]
    sides = [int(rng.integers(max(smallest, SIZES[size][0]), SIZES[size][1] + 1)) for size in chosen]
    canvas_HWC = background(draws.generator("background"), scenes.difficulty)
    owner_HW = np.full((SIDE, SIDE), -1, np.int8)
    placed: list[_Placed] = []
    for number in sorted(range(len(drawings)), key=lambda number: -sides[number]):  # the large ones lie below
        drawing = drawings[number]
        cutout = cut(drawing)
        assert cutout is not None
        for place_as in ((chosen[number], sides[number]), ("small", SIZES["small"][0])):
            size, side = place_as
            rgba_HWC = cutout.at(side)
            solid_HW = rgba_HWC[..., 3] >= 128
            here = _place(rng, solid_HW, owner_HW, placed, MAX_HIDDEN * scenes.difficulty)
            if here is not None:
                break
        else:
            continue  # the scene is full; there is always room for two
        rest_HW1 = 255 - rgba_HWC[..., 3:].astype(np.uint16)
        mixed_HWC = rgba_HWC[..., :3] + (canvas_HWC[here] * rest_HW1 + 127) // 255
        canvas_HWC[here] = np.minimum(mixed_HWC, 255)  # scaling may overshoot
        owner_HW[here][solid_HW] = len(placed)
        area = int(solid_HW.sum())
        placed.append(_Placed(drawing, cutout.hue, size, area, area))
    objects = tuple(_object(each, owner_HW == number) for number, each in enumerate(placed))
    return Scene(index, canvas_HWC, owner_HW, objects, scenes.categories)


def _place(
    rng: np.random.Generator, solid_HW: np.ndarray, owner_HW: np.ndarray, placed: Sequence[_Placed], limit: float
) -> tuple[slice, slice] | None:
    """Where an object may lie so that no other has more than `limit` of it hidden; what is then visible is updated."""
    height, width = solid_HW.shape
    down, across = SIDE - height, SIDE - width
    corners = rng.integers((0, 0), (down + 1, across + 1), size=(TRIES, 2)).tolist()
    for top, left in [*corners, (0, 0), (0, across), (down, 0), (down, across)]:
        here = np.s_[top : top + height, left : left + width]
        covered = np.bincount(owner_HW[here][solid_HW] + 1, minlength=len(placed) + 1)[1:].tolist()
        if all(
            each.visible - lost >= (1 - limit) * each.area for each, lost in zip(placed, covered, strict=True) if lost
        ):
            for each, lost in zip(placed, covered, strict=True):
                each.visible -= lost
            return here
    return None


def _object(placed: _Placed, mask_HW: np.ndarray) -> SceneObject:
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    box = (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)
    drawing = placed.drawing
    return SceneObject(
        name=drawing.name,
        category=drawing.category,
        hue=placed.hue,
        size=placed.size,
        box=box,
        area=placed.visible,
        hidden=1 - placed.visible / placed.area,
        concept=drawing.concept,
        style=drawing.style,
    )


# ------------------------------------------------------------------------------------------------- background


def background(rng: np.random.Generator, difficulty: float) -> np.ndarray:
    """Two colours that run into each other with clouds between them: uint8 [SIDE, SIDE, 3].

    Pale and nearly plain at 0; at 1 of any brightness, with strong clouds and a grain.
    """
    first_C, second_C = (_colour(rng, difficulty) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)
    way_HW = 0.5 + (0.7 * math.cos(angle) * line)[None, :] + (0.7 * math.sin(angle) * line)[:, None]
    cells = Image.fromarray(rng.uniform(-1, 1, (5, 5)).astype(np.float32))
    clouds_HW = np.asarray(cells.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    way_HW = (way_HW + np.float32(0.1 + 0.6 * difficulty) * clouds_HW).clip(0, 1)
    canvas_CHW = first_C[:, None, None] + way_HW * (second_C - first_C)[:, None, None]
    if difficulty > 0:
        canvas_CHW += np.float32(8 * difficulty) * rng.standard_normal((SIDE, SIDE), np.float32)
    return canvas_CHW.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def _colour(rng: np.random.Generator, difficulty: float) -> np.ndarray:
    """float32 [3], 0 to 255: any hue, paler and brighter where it is easy."""
    saturation = rng.uniform(0.04, 0.18 + 0.42 * difficulty)
    value = rng.uniform(0.9 - 0.6 * difficulty, 0.98)
    return np.array([255 * channel for channel in colorsys.hsv_to_rgb(rng.random(), saturation, value)], np.float32)
