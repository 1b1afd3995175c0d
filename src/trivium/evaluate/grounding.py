"""Referring expressions: does the model look at what is meant? No box is ever trained on (ALBEF, section 4.4).

    accuracy          of the boxes that a detector proposes, the one with the most heat overlaps what is meant by half:
                      heat inside, over the square root of the area; overlap = intersection over union (Table 5)
    among_annotated   the same choice among all annotated boxes of the picture: which of them is meant?
    pointing          the hottest pixel lies inside the box of what is meant ("pointing game", Zhang et al. 2016)

Beside them what they are without a model: a box at random, a point at random, the middle of the picture. Easy to get
wrong: the published overlap counts pixels, so that a box from 3 to 5 is 3 pixels wide and two boxes that share a row
or column of one pixel do not meet; a picture for which nothing is proposed is a wrong answer. Other than there, a
proposed box that reaches over its picture's edge is cut at it first.

n patches along a side, H height, W width of a picture, K boxes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.bundle import Bundle
from trivium.data.referring import SPLITS, Box, Expression, Referring
from trivium.errors import BadSample, TriviumError, UnreadableNow
from trivium.evaluate.results import Results, mean_of
from trivium.manifest import write_whole

HIT = 0.5  # overlap from which on a box is right
POWER = 0.5  # of the area, that the heat inside a box is divided by
PICTURES_AT_ONCE = 16
By = Literal["match", "cosine"]


@dataclass
class Grounded:
    """What was measured."""

    results: Results = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_final: bool = True  # False: a picture could not be read that may be another time


def overlap(box: Box | np.ndarray, boxes_K4: np.ndarray) -> np.ndarray:
    """Intersection over union of a box with each of several, [K], as the public code counts it."""
    left, top, width, height = box
    lefts, tops, widths, heights = boxes_K4.T
    first_x, first_y = np.maximum(left, lefts), np.maximum(top, tops)
    last_x = np.minimum(left + width - 1, lefts + widths - 1)
    last_y = np.minimum(top + height - 1, tops + heights - 1)
    meets = (first_x < last_x) & (first_y < last_y)
    shared = np.where(meets, (last_x - first_x + 1) * (last_y - first_y + 1), 0.0)
    return shared / (width * height + widths * heights - shared)


def enlarged(heat_nn: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Heat at each pixel of a picture, float64 [H, W]: bicubic, as published."""
    return F.interpolate(heat_nn.double()[None, None], size, mode="bicubic", align_corners=False)[0, 0].numpy()


def scores(heat_HW: np.ndarray, boxes_K4: np.ndarray) -> np.ndarray:
    """Heat inside each box over the square root of its area, [K]. A box covers whole pixels, from its first one to the
    one before its end, both rounded down."""
    sums_HW = np.pad(heat_HW.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = heat_HW.shape
    lefts, tops, widths, heights = boxes_K4.T
    left, right = (each.clip(0, width).astype(int) for each in (lefts, lefts + widths))
    top, bottom = (each.clip(0, height).astype(int) for each in (tops, tops + heights))
    inside = sums_HW[bottom, right] - sums_HW[top, right] - sums_HW[bottom, left] + sums_HW[top, left]
    return inside / (widths * heights) ** POWER


def hottest(heat_HW: np.ndarray) -> tuple[float, float]:
    """The middle of the hottest pixel, x and y."""
    row, column = np.unravel_index(int(heat_HW.argmax()), heat_HW.shape)
    return float(column) + 0.5, float(row) + 0.5


def points_at(heat_HW: np.ndarray, box: Box) -> bool:
    """Whether the hottest pixel's middle lies inside the box."""
    return _inside(*hottest(heat_HW), box)


def _inside(x: float, y: float, box: Box) -> bool:
    left, top, width, height = box
    return left <= x < left + width and top <= y < top + height


def run(
    bundle: Bundle,
    data: Referring,
    *,
    splits: Sequence[str] = SPLITS,
    block: int | None = None,
    by: By = "match",
    rows: int | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Grounded:
    """Every split that is there, under its name.

    Args:
        splits: which ones are measured.
        block: whose attention is looked at; None: the family's own choice.
        by: "match", heat of words for the matching head; "cosine", of the picture's tower for the cosine.
        rows: at most so many expressions of each split, evenly spread.
        folder: where SPLIT.jsonl is written, what is found for each expression; None: nowhere.

    Raises:
        TriviumError: the model cannot ground, or sees only a part of each picture; a split without a usable row.
    """
    refuse_cropped(bundle)
    found = Grounded(notes=list(data.notes))
    there = [split for split in splits if split in data.splits]
    if not there:
        raise TriviumError(f"{data.name} holds no split to measure on: there is none of {', '.join(splits)}")
    if data.proposed is None:
        found.notes.append(
            f"no boxes are proposed ({data.name}/dets.json is not there), so there is no accuracy as published"
        )
    for split in there:
        expressions, bad = data.good(split), data.bad(split)
        if rows is not None and rows < len(expressions):
            expressions = [expressions[n] for n in np.arange(rows) * len(expressions) // rows]
        say(f"{data.name}, {split}: {len(expressions):,} expressions")
        told = _measure(bundle, data, split, expressions, bad, block, by, found)
        if folder is not None:
            try:
                write_whole(folder / f"{split}.jsonl", "".join(f"{line}\n" for line in told))
            except TriviumError as error:  # the figures are not lost for it
                found.notes.append(f"{split}: what is found for each expression is not written: {error}")
    return found


def refuse_cropped(bundle: Bundle) -> None:
    """Raises TriviumError where the model does not see the whole of each picture."""
    if bundle.transform.crop != "squash" or bundle.transform.cuts:
        raise TriviumError("this model sees only the middle of a picture, so a box at its edge cannot be found: "
                           "grounding takes one that sees all of it")  # fmt: skip


def _measure(
    bundle: Bundle,
    data: Referring,
    split: str,
    expressions: Sequence[Expression],
    bad: list[BadSample],
    block: int | None,
    by: By,
    found: Grounded,
) -> list[str]:
    """Returns a JSON object for each expression: what is meant, the hottest pixel, the box that is chosen of those that
    are proposed (null where none is), and what of it is right (1) or wrong (0)."""
    told: list[str] = []
    units: list[str] = []
    groups: list[str] = []
    columns: dict[str, list[float]] = {}
    unproposed = 0
    for expression, heat_nn in _heats(bundle, expressions, block, by, bad):
        heat_HW = enlarged(heat_nn, expression.size)
        height, width = expression.size
        row = {
            "pointing": float(points_at(heat_HW, expression.box)),
            "pointing.middle": float(_inside(width / 2, height / 2, expression.box)),
            "pointing.chance": expression.box[2] * expression.box[3] / (height * width),
        }
        line: dict[str, Any] = {"row": expression.key, "expression": expression.text, "picture": expression.image}
        line |= {"label": list(expression.box), "point": list(hottest(heat_HW))}
        annotated_K4 = data.annotated[expression.image_id]
        row["among_annotated"] = float(int(scores(heat_HW, annotated_K4).argmax()) == expression.number)
        row["among_annotated.chance"] = 1 / len(annotated_K4)
        if data.proposed is not None:
            proposed_K4 = data.proposed.get(expression.image_id, np.zeros((0, 4)))
            unproposed += not len(proposed_K4)
            overlaps_K = overlap(expression.box, proposed_K4)
            chosen = int(scores(heat_HW, proposed_K4).argmax()) if len(proposed_K4) else 0
            row["accuracy"] = float(len(proposed_K4) > 0 and overlaps_K[chosen] >= HIT)
            row["accuracy.chance"] = float((overlaps_K >= HIT).mean()) if len(proposed_K4) else 0.0
            row["accuracy.at_best"] = float((overlaps_K >= HIT).any())
            line["box"] = proposed_K4[chosen].tolist() if len(proposed_K4) else None
        right = {name: int(row[name]) for name in ("pointing", "among_annotated", "accuracy") if name in row}
        told.append(json.dumps(line | right, ensure_ascii=False))
        units.append(expression.key)
        groups.append(f"picture {expression.image_id}")
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    if not units:
        first = f"; the first: {bad[0]}" if bad else ""
        raise TriviumError(f"the split {split} of {data.name} has no usable expression{first}")
    for name, values in columns.items():
        if name.endswith(".chance"):
            found.chance[f"{split}.{name.removesuffix('.chance')}"] = float(np.mean(values))
        found.results[f"{split}.{name}"] = mean_of(np.array(values), units, groups)
    found.is_final &= not any(isinstance(each, UnreadableNow) for each in bad)
    if bad:
        found.notes.append(f"{split}: {len(bad):,} expressions are left out; the first: {bad[0]}")
    if unproposed:
        found.notes.append(f"{split}: for the pictures of {unproposed:,} expressions no box is proposed: wrong answers")
    return told


def _heats(
    bundle: Bundle, expressions: Sequence[Expression], block: int | None, by: By, bad: list[BadSample]
) -> Iterator[tuple[Expression, Tensor]]:
    """Each expression with its heat; each picture is encoded once. bad: gets each that is left out."""
    of_picture: dict[str, list[Expression]] = {}
    for expression in expressions:
        of_picture.setdefault(expression.image, []).append(expression)
    paths = list(of_picture)
    for first in range(0, len(paths), PICTURES_AT_ONCE):
        asked: list[Expression] = []
        pictures: list[Tensor] = []
        for path in paths[first : first + PICTURES_AT_ONCE]:
            mine = of_picture[path]
            try:
                pixels = bundle.transform(Path(path).read_bytes())
            except (OSError, ValueError) as error:
                is_there = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
                kind = UnreadableNow if is_there else BadSample
                bad += [kind(each.file, each.where, f"its picture {path} cannot be read ({error})") for each in mine]
                continue
            pictures.append(pixels)
            asked += mine
        if not asked:
            continue
        counts = [len(of_picture[path]) for path in dict.fromkeys(each.image for each in asked)]
        texts = [each.text for each in asked]
        if by == "cosine":
            shown = [one for one, n in zip(pictures, counts, strict=True) for _ in range(n)]
            maps = bundle.ground_by_cosine(torch.stack(shown), texts, block)
        else:
            shows_R = torch.arange(len(pictures)).repeat_interleave(torch.tensor(counts)).to(bundle.device)
            images = bundle.encode_image(torch.stack(pictures)).taken(shows_R)
            maps = [heat.text_nn for heat in bundle.ground(images, texts, block)]
        yield from zip(asked, maps, strict=True)
