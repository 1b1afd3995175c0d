"""Detection as COCO measures it (Lin et al. 2014): average precision of boxes over IoU 0.50 to 0.95, 100 a picture.

Everything that a model finds is submitted, ranked by its score: no threshold, no suppression of overlaps (DETR, section
4). The counting is faster-coco-eval's, which agrees with pycocotools. Crowds count neither way. AP as such, at IoU 0.5
and at 0.75 have the interval of a bootstrap over pictures (average_precision.py).

Q objects found in a picture, M true ones.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image, ImageDraw

from trivium.bundle import Bundle
from trivium.data.decode import DecodeError, decode
from trivium.data.detection import DetectionRows, corners
from trivium.errors import BadSample, TriviumError
from trivium.evaluate import average_precision, charts
from trivium.evaluate.embedded import Figure
from trivium.evaluate.results import Result, Results, mean_of
from trivium.models.encoded import Objects

FIGURES = {  # name -> where COCO's summary has it
    "ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8,
}  # fmt: skip
MATCH = 0.5  # IoU from which a found box is the true one, for attributes
AT_ONCE = 8  # pictures: with 1333 pixels on a side they take a UniT of size base some 4 GB
SURE = 0.5  # score from which a box is drawn
SHOWN, SIDE, COLUMNS = 12, 224, 4  # pictures of the report
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075")


def find(
    bundle: Bundle, rows: DetectionRows, task: str | None = None, batch: int = AT_ONCE
) -> tuple[dict[int, Objects], list[BadSample]]:
    """What a model finds in each picture, by row, and the pictures that cannot be read.

    batch: pictures that go through the model at once.

    Raises TriviumError where none can.
    """
    found: dict[int, Objects] = {}
    bad: list[BadSample] = []
    for first in range(0, len(rows), batch):
        several, pictures = [], []
        for row in range(first, min(first + batch, len(rows))):
            try:
                picture = decode(rows.picture(row))
            except BadSample as error:
                bad.append(error)
                continue
            except DecodeError as error:
                bad.append(BadSample(rows.path(row), "", str(error)))
                continue
            stated = rows.pictures[row].height, rows.pictures[row].width
            if picture.shape[:2] != stated:  # its boxes are of another picture
                sizes = [f"{width} x {height}" for height, width in (picture.shape[:2], stated)]
                bad.append(BadSample(rows.path(row), "", f"it has {sizes[0]} pixels, not {sizes[1]} as stated"))
                continue
            pictures.append(picture)
            several.append(row)
        if pictures:
            found |= dict(zip(several, bundle.detect(pictures, task, batch), strict=True))
    if not found:
        raise TriviumError(f"no picture of {rows.file} can be read; the first: {bad[0] if bad else 'there is none'}")
    return found, bad


def measure(
    rows: DetectionRows, found: dict[int, Objects], classes: Sequence[str], has_intervals: bool = True
) -> Results:
    """COCO's figures over the pictures that could be read, and how often an attribute is right.

    A figure for which there is no true box (large ones, among small pictures) is left out.
    has_intervals: also how sure they are, which takes seconds for every thousand pictures, with 1,600 classes some ten.
    """
    results: Results = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on its progress
        truths = COCO(as_coco(rows, found, classes))
        entries = as_entries(rows, found)
        if entries:
            evaluation = COCOeval_faster(truths, truths.loadRes(entries), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats: Any = evaluation.stats
        else:  # there is nothing to read
            stats = np.zeros(12)
    ends = average_precision.intervals(rows, found) if has_intervals else {}
    for name, place in FIGURES.items():
        if float(stats[place]) >= 0:  # -1: there is no such object
            low, high = ends.get(name, (None, None))
            results[name] = Result(float(stats[place]), low, high, len(found))
    right, pictures = attributes_right(rows, found)
    if len(right):
        results["attributes"] = mean_of(right, groups=pictures)
        results["attributes.majority"] = Result(share_of_commonest_attribute(rows, found))
    return results


def as_coco(rows: DetectionRows, found: dict[int, Objects], classes: Sequence[str]) -> dict[str, Any]:
    """The true boxes of some rows as a COCO file, boxes and areas as their own file has them."""
    annotations = []
    for row in found:
        for place in range(rows.of(row).start, rows.of(row).stop):
            annotations.append(
                {
                    "id": place + 1,
                    "image_id": row,
                    "category_id": int(rows.classes_M[place]),
                    "bbox": rows.boxes_M4[place].tolist(),
                    "area": float(rows.areas_M[place]),
                    "iscrowd": int(rows.crowd_M[place]),
                }
            )
    return {
        "info": {},
        "images": [{"id": r, "width": rows.pictures[r].width, "height": rows.pictures[r].height} for r in found],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes) if name],
    }


def as_entries(rows: DetectionRows, found: dict[int, Objects]) -> list[dict[str, Any]]:
    """What was found as COCO's list of results."""
    entries = []
    for row, objects in found.items():
        boxes_Q4 = objects.boxes_Q4.numpy().astype(np.float64)
        sized_Q4 = np.concatenate([boxes_Q4[:, :2], boxes_Q4[:, 2:] - boxes_Q4[:, :2]], axis=1)
        for label, score, box in zip(
            objects.labels_Q.tolist(), objects.scores_Q.tolist(), sized_Q4.tolist(), strict=True
        ):
            entries.append({"image_id": row, "category_id": label, "bbox": box, "score": score})
    return entries


def attributes_right(rows: DetectionRows, found: dict[int, Objects]) -> tuple[np.ndarray, list[str]]:
    """For each true box with attributes, whether the found box that covers it best (IoU 0.5 or more) names one of them,
    bool, and its picture; a box that was not found is wrong."""
    right: list[bool] = []
    pictures: list[str] = []
    if rows.attributes_MA is None:
        return np.array(right), pictures
    for row, objects in found.items():
        here = rows.of(row)
        if objects.attributes_Q is None:
            continue
        boxes_Q4, named_Q = objects.boxes_Q4.numpy().astype(np.float64), objects.attributes_Q.numpy()
        true_M4 = corners(rows.boxes_M4[here], rows.pictures[row])
        for box, attributes, usable in zip(true_M4, rows.attributes_MA[here], rows.usable_M[here], strict=True):
            if usable and (attributes >= 0).any():
                overlap_Q = intersection_over_union(box, boxes_Q4)
                best = int(overlap_Q.argmax()) if len(overlap_Q) else 0
                covered = len(overlap_Q) > 0 and overlap_Q[best] >= MATCH
                right.append(bool(covered and named_Q[best] in attributes[attributes >= 0]))
                pictures.append(f"row {row}")
    return np.array(right), pictures


def share_of_commonest_attribute(rows: DetectionRows, found: dict[int, Objects]) -> float:
    """Of the true boxes with attributes those that have the commonest one: what always naming it would come to."""
    assert rows.attributes_MA is not None
    has_MA = np.concatenate([rows.attributes_MA[rows.of(row)][rows.usable_M[rows.of(row)]] for row in found])
    has_MA = has_MA[(has_MA >= 0).any(axis=1)]
    counts = Counter(name for names in has_MA.tolist() for name in {*names} - {-1})
    return counts.most_common(1)[0][1] / len(has_MA)


def intersection_over_union(box: np.ndarray, boxes_Q4: np.ndarray) -> np.ndarray:
    """Of one box with each of several, all (left, top, right, bottom). float64 [Q]."""
    sides_Q2 = np.minimum(box[2:], boxes_Q4[:, 2:]) - np.maximum(box[:2], boxes_Q4[:, :2])
    both_Q = sides_Q2.clip(min=0).prod(axis=1)
    union_Q = (box[2:] - box[:2]).prod() + (boxes_Q4[:, 2:] - boxes_Q4[:, :2]).prod(axis=1) - both_Q
    return both_Q / np.maximum(union_Q, 1e-9)


# ------------------------------------------------------------------------------------------------ pictures


def drawn(
    picture: np.ndarray,
    objects: Objects,
    classes: Sequence[str],
    attributes: Sequence[str] = (),
    side: int | None = None,
) -> np.ndarray:
    """A picture (uint8 [H, W, 3]) with boxes, their names and scores. side: of its longer side, in pixels."""
    height, width, _ = picture.shape
    scale = 1.0 if side is None else side / max(height, width)
    image = Image.fromarray(picture).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for row in reversed(range(len(objects.scores_Q))):  # the surest on top
        label = int(objects.labels_Q[row])
        left, top, right, bottom = (float(x) * scale for x in objects.boxes_Q4[row])
        colour = COLOURS[label % len(COLOURS)]
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        words = [classes[label] if label < len(classes) and classes[label] else str(label)]
        if objects.attributes_Q is not None:
            number = int(objects.attributes_Q[row])
            words.insert(0, attributes[number] if number < len(attributes) else str(number))
        text = f"{' '.join(word for word in words if word)} {float(objects.scores_Q[row]):.2f}"
        ends = pen.textbbox((left, max(0.0, top - 11)), text)
        pen.rectangle(ends, fill=colour)
        pen.text(ends[:2], text, fill="white")
    return np.asarray(image)


def wall(
    rows: DetectionRows, found: dict[int, Objects], title: str, classes: Sequence[str], attributes: Sequence[str] = ()
) -> Figure:
    """Some pictures with what was found in them, for a report."""
    chosen = [list(found)[place * len(found) // SHOWN] for place in range(SHOWN)] if len(found) > SHOWN else list(found)
    num_rows = -(-len(chosen) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * (SIDE + 4), num_rows * (SIDE + 4)), "white")
    for place, row in enumerate(chosen):
        shown = drawn(decode(rows.picture(row)), found[row].above(SURE), classes, attributes, SIDE)
        canvas.paste(Image.fromarray(shown), (place % COLUMNS * (SIDE + 4), place // COLUMNS * (SIDE + 4)))
    note = f"Boxes with a score of {SURE:g} or more, on pictures that were held out; the number is the score."
    return Figure(title, note, charts.png_uri(np.asarray(canvas)), f"{len(chosen)} pictures with the boxes found")
