"""The embedded drawings cut out of their white paper: what scenes are composed of (see scenes.py).

Easy to get wrong: white inside a drawing (an eye, a page) is part of it, so only white that is reached from outside is
paper; a pixel at the edge is mixed with the paper and would draw a pale line around everything that is put on another
colour, so its own colour and its share are worked out; a flag whose white reaches its edge has no edge: it is left out.

Legend: H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image
from scipy import ndimage

from trivium.data import embedded
from trivium.data.decode import decode
from trivium.errors import TriviumError

Split = Literal["train", "new-scenes", "held-out-concepts", "held-out-style", "held-out-both"]
Classes = Literal["group", "subgroup"]
SPLITS: tuple[Split, ...] = get_args(Split)
HUES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
CLIPART_STYLE = "clip-art"

WHITE = 244  # from here on, in all channels, a pixel may be paper: the files are lossy
MIN_PART, PALE = 16, 190  # smaller parts, in pixels, that are as pale as this are left by the compression
MIN_AREA, MIN_SIDE = 250, 24  # pixels of the 64 x 64; less cannot be told apart once it is scaled
THIN_SIDE, THIN_AREA = 20, 30  # pixels that must be left of it at the smallest size; of thin lines nothing is
DOMINANT = 0.4  # share of a drawing's pixels that its hue has at least
TIMES_NEXT = 1.5  # and by how much more than the next hue


# ---------------------------------------------------------------------------------------------- categories


@dataclass(frozen=True)
class Category:
    """A class of drawings, and what sentences call one and several of them."""

    name: str  # "food & drink"
    noun: str
    plural: str
    group: str


# What the nine groups of Unicode hold is wider than any word; these are what every sentence says.
GROUPS = (
    Category("smileys & emotion", "smiley", "smileys", "smileys & emotion"),
    Category("people & body", "person", "people", "people & body"),
    Category("animals & nature", "living thing", "living things", "animals & nature"),
    Category("food & drink", "food item", "food items", "food & drink"),
    Category("travel & places", "travel item", "travel items", "travel & places"),
    Category("activities", "leisure item", "leisure items", "activities"),
    Category("objects", "household item", "household items", "objects"),
    Category("symbols", "symbol", "symbols", "symbols"),
    Category("flags", "flag", "flags", "flags"),
)

# The subgroups with the most drawings whose members one word names.
SUBGROUPS = tuple(
    Category(name, noun, plural, group)
    for name, noun, plural, group in (
        ("country flags", "country flag", "country flags", "flags"),
        ("roles & careers", "worker", "workers", "people & body"),
        ("mammals", "mammal", "mammals", "animals & nature"),
        ("clothing", "piece of clothing", "pieces of clothing", "objects"),
        ("weather", "weather sign", "weather signs", "travel & places"),
        ("ground transportation", "vehicle", "vehicles", "travel & places"),
        ("athletics", "athlete", "athletes", "people & body"),
        ("shapes & colors", "plain shape", "plain shapes", "symbols"),
        ("alphanumeric symbols", "lettered sign", "lettered signs", "symbols"),
        ("cooked / prepared", "dish", "dishes", "food & drink"),
        ("time", "timepiece", "timepieces", "travel & places"),
        ("fantasy", "fantasy figure", "fantasy figures", "people & body"),
        ("games & hobbies", "game", "games", "activities"),
        ("buildings", "building", "buildings", "travel & places"),
        ("sports", "piece of sports gear", "pieces of sports gear", "activities"),
        ("hearts", "heart", "hearts", "smileys & emotion"),
        ("tools", "tool", "tools", "objects"),
        ("concerned", "worried face", "worried faces", "smileys & emotion"),
        ("household items", "household item", "household items", "objects"),
        ("office supplies", "office item", "office items", "objects"),
        ("drink", "drink", "drinks", "food & drink"),
        ("vegetables", "vegetable", "vegetables", "food & drink"),
        ("fruit", "fruit", "fruits", "food & drink"),
        ("birds", "bird", "birds", "animals & nature"),
    )
)

# Folders of clip art whose drawings clearly belong to a group; the others (icons, patterns, maps) stay out.
CLIPART_GROUPS = {
    "animals": "animals & nature",
    "plants": "animals & nature",
    "food": "food & drink",
    "transportation/vehicles": "travel & places",
    "transportation/boating": "travel & places",
    "buildings/homes": "travel & places",
    "tools": "objects",
    "people/clothing": "objects",
    "recreation/music": "objects",
    "recreation/sports": "activities",
    "recreation/toys": "activities",
    "recreation/holiday": "activities",
    "people/stickmen": "people & body",
    "signs_and_symbols/flags": "flags",
}


def categories(classes: Classes) -> tuple[Category, ...]:
    """What can stand in a scene; a category's number is its place here."""
    return GROUPS if classes == "group" else SUBGROUPS


# --------------------------------------------------------------------------------------------- which drawings


@dataclass(frozen=True)
class Drawing:
    """One drawing that scenes of a split may hold."""

    image: bytes
    name: str  # "red apple"; the title of clip art
    concept: str  # equal for the drawings of one emoji in different styles
    style: str  # one of embedded.STYLES, or CLIPART_STYLE
    category: int  # number in categories(classes)
    is_flag: bool  # of a country, a region or a signal: a whole sheet, on no pole


Pool = tuple[tuple[tuple[Drawing, ...], ...], ...]  # by category, then by concept: its drawings in several styles


@cache
def pool(split: Split, classes: Classes) -> Pool:
    """The drawings of a split.

    "train" and "new-scenes": the training concepts in every style but Noto, and clip art. "held-out-concepts": the
    others, in the same styles. "held-out-style": the training concepts as Noto draws them. "held-out-both": the other
    concepts as Noto draws them. A training drawing equals no other split's, by its bytes or by its title.
    """
    if split not in SPLITS:
        raise TriviumError(f"there are no scenes of the split {split!r}: choose one of {', '.join(SPLITS)}")
    held_out = split in ("held-out-concepts", "held-out-both")
    noto = split in ("held-out-style", "held-out-both")
    number = {category.name: place for place, category in enumerate(categories(classes))}
    found = [
        Drawing(each.image, each.name, each.codepoints, each.style, number[kind], each.name.startswith("flag: "))
        for each in embedded.emoji()
        if (kind := each.group if classes == "group" else each.subgroup) in number
        if (each.split != "train") == held_out and (each.style == embedded.HELD_OUT_STYLE) == noto
    ]
    if classes == "group" and not noto:
        found += [
            Drawing(
                each.image, each.caption, f"clip art {each.caption}", CLIPART_STYLE, number[group], group == "flags"
            )
            for each in embedded.clipart()
            if (each.split != "train") == held_out and (group := _clipart_group(each.category)) is not None
        ]
    if not held_out:
        pictures, titles = _held_out()
        found = [each for each in found if each.image not in pictures and each.name.lower() not in titles]
    if not noto:
        noto_pictures = {each.image for each in embedded.emoji(embedded.HELD_OUT_STYLE)}
        found = [each for each in found if each.image not in noto_pictures]
    by_concept: list[dict[str, list[Drawing]]] = [{} for _ in number]
    for each in found:
        by_concept[each.category].setdefault(each.concept, []).append(each)
    return tuple(tuple(tuple(drawings) for drawings in concepts.values()) for concepts in by_concept)


def _clipart_group(category: str) -> str | None:
    return CLIPART_GROUPS.get(category) or next(
        (group for folder, group in CLIPART_GROUPS.items() if category.startswith(f"{folder}/")), None
    )


@cache
def _held_out() -> tuple[frozenset[bytes], frozenset[str]]:
    """Pictures and, in lower case, names of what training never shows."""
    records: Iterable[embedded.Emoji | embedded.ClipArt] = [*embedded.emoji(), *embedded.clipart()]
    held_out = [each for each in records if each.split != "train"]
    names = {(each.name if isinstance(each, embedded.Emoji) else each.caption).lower() for each in held_out}
    return frozenset(each.image for each in held_out), frozenset(names)


# ------------------------------------------------------------------------------------------------ cutting out


@dataclass(frozen=True)
class Cut:
    """A drawing without its paper, cropped to what is left."""

    picture: Image.Image  # mode "RGBa": colours multiplied by alpha, as scaling needs them
    hue: str | None  # of HUES; None where none is dominant, as in most flags and in everything grey

    def at(self, side: int) -> np.ndarray:
        """uint8 [H, W, 4], colours multiplied by alpha, the longer of H and W being `side` pixels."""
        width, height = self.picture.size
        scale = side / max(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(self.picture.resize(size, Image.Resampling.BICUBIC))


@lru_cache(maxsize=8192)  # every drawing of a split, 16 KB each; cutting costs a millisecond or two
def cut(drawing: Drawing) -> Cut | None:
    """None for a drawing that cannot be cut out: it is nearly all white, of thin lines, or a flag without an edge."""
    alpha_HW, colour_CHW = unmix(decode(drawing.image))
    solid_HW = alpha_HW >= 0.5
    rows, columns = np.flatnonzero(solid_HW.any(axis=1)), np.flatnonzero(solid_HW.any(axis=0))
    area = int(solid_HW.sum())
    if area < MIN_AREA:
        return None
    height, width = int(rows[-1]) + 1 - int(rows[0]), int(columns[-1]) + 1 - int(columns[0])
    if max(height, width) < MIN_SIDE:
        return None
    # A flag fills a box that is wider than high; where stripes are missing it does not.
    if drawing.is_flag and not (area >= 0.72 * height * width and 0.9 <= width / height <= 2.1):
        return None
    rgba_CHW = np.concatenate([colour_CHW * alpha_HW, 255 * alpha_HW[None]])
    rgba_CHW = np.rint(rgba_CHW[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).astype(np.uint8)
    # Pillow makes no RGBa from an array, so it is given the bytes.
    picture = Image.frombytes("RGBa", (width, height), rgba_CHW.transpose(1, 2, 0).tobytes())
    cutout = Cut(picture, dominant_hue(colour_CHW[:, solid_HW]))
    return cutout if (cutout.at(THIN_SIDE)[..., 3] >= 128).sum() >= THIN_AREA else None


def unmix(rgb_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A drawing on white to its share of each pixel, float [H, W] in [0, 1], and its own colour, float [3, H, W].

    Paper is the white that is connected, side by side, with the outside. A pixel beside it is taken for a mixture of
    white with the mean colour of its neighbours further in; where it has none, as in a thin line, it is whole.
    """
    rgb_CHW = rgb_HWC.transpose(2, 0, 1).astype(np.float32, order="C")
    palest_HW = rgb_CHW.min(axis=0)
    white_HW = np.ones((palest_HW.shape[0] + 2, palest_HW.shape[1] + 2), bool)
    white_HW[1:-1, 1:-1] = palest_HW >= WHITE
    whites_HW, _ = ndimage.label(white_HW)
    solid_HW = whites_HW[1:-1, 1:-1] != whites_HW[0, 0]
    parts_HW, num_parts = ndimage.label(solid_HW, np.ones((3, 3)))
    if num_parts > 1:
        areas = np.bincount(parts_HW.ravel())
        paleness = np.bincount(parts_HW.ravel(), palest_HW.ravel()) / np.maximum(areas, 1)
        solid_HW &= ((areas >= MIN_PART) | (paleness < PALE))[parts_HW]
    edge_HW = solid_HW & (_sums(~solid_HW) > 0)
    # Compression bleeds beyond a dark edge: two pixels deep, what is pale is taken for mixed, too.
    near_dark_HW = _sums(_sums(solid_HW & (palest_HW < PALE))) > 0
    frayed_HW = solid_HW & (_sums(edge_HW) > 0) & near_dark_HW & (palest_HW >= PALE)
    edge_HW |= frayed_HW
    inner_HW = solid_HW & ~edge_HW
    sums = _sums(np.concatenate([rgb_CHW * inner_HW, inner_HW[None]]))
    *behind, count_HW = np.where(frayed_HW & (sums[3] == 0), _sums(sums), sums)
    solid_HW &= ~(edge_HW & (count_HW == 0) & (palest_HW >= PALE))
    behind_CHW = np.stack(behind) / np.maximum(count_HW, 1)
    ink_CHW = 255 - behind_CHW  # what the drawing takes away from white
    strength_HW = (ink_CHW**2).sum(axis=0)
    share_HW = ((255 - rgb_CHW) * ink_CHW).sum(axis=0) / np.maximum(strength_HW, 1)
    mixed_HW = edge_HW & (count_HW > 0) & (strength_HW > 60**2) & (share_HW < 1)
    alpha_HW = np.where(mixed_HW, share_HW.clip(0, 1), solid_HW)
    return alpha_HW, np.where(mixed_HW, behind_CHW, rgb_CHW)


def _sums(values: np.ndarray) -> np.ndarray:
    """Of the 3 x 3 pixels around each, [..., H, W]; beyond the border there is nothing."""
    padded = np.zeros((*values.shape[:-2], values.shape[-2] + 2, values.shape[-1] + 2), np.float32)
    padded[..., 1:-1, 1:-1] = values
    lines = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    return lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]


def dominant_hue(rgb_CN: np.ndarray) -> str | None:
    """The hue of most pixels, 0-255 [3, N], or None where no hue has DOMINANT of them, or only just the most.

    Greys, black and white have no hue. Brown is dark orange.
    """
    highest = rgb_CN.max(axis=0)
    chroma = highest - rgb_CN.min(axis=0)
    coloured = (chroma >= 0.25 * highest) & (highest >= 50) & (chroma >= 30)
    if coloured.mean() < DOMINANT:
        return None
    red, green, blue = rgb_CN[:, coloured]
    chroma, highest = chroma[coloured], highest[coloured]
    degrees = 60 * np.select(
        [highest == red, highest == green],
        [(green - blue) / chroma % 6, (blue - red) / chroma + 2],
        (red - green) / chroma + 4,
    )
    # HUES without brown begin at these degrees; red goes on from 338 to 10.
    number = np.searchsorted([10, 38, 66, 165, 255, 290, 338], degrees, side="right") % 7
    number[(number == 1) & (highest < 200)] = HUES.index("brown")
    shares = np.bincount(number, minlength=len(HUES)) / rgb_CN.shape[1]
    next_most, most = np.sort(shares)[-2:]
    return HUES[int(shares.argmax())] if most >= DOMINANT and most >= TIMES_NEXT * next_most else None
