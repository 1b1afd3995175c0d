"""Readers of the papers' evaluation data: `find` opens a vision data set below a root, whatever layout it lies in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trivium.errors import TriviumError
from trivium.evaluate.datasets import copies
from trivium.evaluate.datasets.layouts import Layout
from trivium.evaluate.datasets.pictures import DataSet


@dataclass(frozen=True)
class Missing:
    """Data that is not below the root: what would be read, and where its owners publish it."""

    expected: str
    owners: str


def find(layout: Layout, root: Path) -> DataSet | Missing:
    """The data set, from the official layout or a copy of it, and checked.

    Raises:
        TriviumError: it is there and cannot be read, or is not what it should be.
    """
    for place in layout.places:
        folder = root / place
        if any(next(folder.glob(marker), None) for marker in layout.markers):
            return _checked(layout, _with_own_prompts(layout.read(folder), folder), folder)
    for name in (layout.name, *(f"{prefix}{copy}" for copy in layout.copies for prefix in ("wds_", ""))):
        for folder in dict.fromkeys((root / name, root / name.lower())):
            if any(folder.glob("t*/*.tar")):
                return _checked(layout, copies.webdataset(folder), folder)
            if any(folder.glob("train*.parquet")) or any(folder.glob("data/train*.parquet")):
                return _checked(layout, copies.parquet(folder), folder)
    wds = f"; or wds_{layout.copies[0]}/{{train,test}}/*.tar" if layout.copies else ""
    return Missing(f"{layout.expected}{wds}; or {layout.name.lower()}/{{train,test}}*.parquet", layout.owners)


def _with_own_prompts(data: DataSet, folder: Path) -> DataSet:
    """A user's own class names and templates, in the folder of the data, come before those of the files."""
    prompts, templates, tables = copies.own_prompts(folder)
    return replace(
        data, prompts=prompts or data.prompts, templates=templates or data.templates, tables=(*data.tables, *tables)
    )


def _checked(layout: Layout, data: DataSet, folder: Path) -> DataSet:
    """What figures would rest on: labels that are classes, as many prompts as classes; sizes are noted."""
    notes = list(data.notes)
    if data.prompts and len(data.prompts) != len(data.classes):
        raise TriviumError(
            f"{folder / copies.CLASS_NAMES} has {len(data.prompts)} lines for {len(data.classes)} classes: one line a"
            " class, in the order of the labels"
        )
    for name, split in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        if split is None:
            continue
        if not len(split):
            raise TriviumError(f"{folder}: its {name} split holds no picture: unpack the data set again")
        low, high = int(split.labels_N.min()), int(split.labels_N.max())
        if low < 0 or high >= len(data.classes):
            raise TriviumError(
                f"{folder}: the {name} split has labels from {low} to {high}, but there are {len(data.classes)}"
                " classes, which are numbered from 0: labels and classes are not of the same copy"
            )
    trained = np.unique(data.train.labels_N)
    absent = [name for label, name in enumerate(data.classes) if label not in trained]
    if absent:
        notes.append(never_answered(absent))
    if len(data.classes) != layout.num_classes:
        notes.append(f"{len(data.classes)} classes where the data set has {layout.num_classes}")
    train_size = len(data.train) + (0 if data.validation is None else len(data.validation))
    for what, found, official in (
        ("training", train_size, layout.train_size),
        ("test", len(data.test), layout.test_size),
    ):
        if found != official:
            notes.append(f"{found:,} {what} pictures where the whole data set has {official:,}")
    return replace(data, notes=tuple(notes))


def never_answered(classes: list[str], that: str = "") -> str:
    """A sentence on classes of which there is no training picture, or none of which is true what stands in `that`."""
    return f"no training picture of {_named(classes)}{that}, so it is never answered"


def _named(names: list[str], shown: int = 5) -> str:
    rest = f" and {len(names) - shown} more classes" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
