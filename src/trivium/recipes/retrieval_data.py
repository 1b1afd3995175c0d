"""The captioned pictures of a fine-tuning on retrieval: one's own, or Flickr30K and COCO by ALBEF's lists or by
Karpathy's, which hold the same pictures and captions.

ALBEF's lists have an entry for each caption to learn, and one for each picture to measure; so are Karpathy's read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from trivium.data.read_rows import ReadRows
from trivium.data.sources import open_source
from trivium.errors import TriviumError
from trivium.evaluate.datasets.captions import BY_NAME, by_karpathy
from trivium.recipes.data import absolute
from trivium.train.protocol import Source

SPLITS = ("train", "val", "test")  # of the official files; val chooses the checkpoint
KARPATHY = {"train": ("train", "restval"), "dev": ("val",), "test": ("test",)}  # what he calls them; restval is COCO's
OFFICIAL = {  # how the official files of a folder begin -> how papers call the data set
    "flickr30k": "Flickr30K retrieval", "coco": "COCO retrieval",
}  # fmt: skip


@dataclass(frozen=True)
class RetrievalData:
    """Captioned pictures, and what is done to each."""

    root: str | None = None  # folder with flickr30k_{train,val,test}.json or coco_..., or dataset_..., and pictures
    train: tuple[str, ...] = ()  # one's own: CSV, TSV, JSONL, JSON, Parquet, tar shards, a folder
    dev: tuple[str, ...] = ()  # to choose the checkpoint by
    test: tuple[str, ...] = ()  # measured at the end
    image_root: str | None = None  # what paths of pictures are relative to; None: the folder of their table
    image_column: str | None = None  # None: found by its usual names
    text_column: str | None = None
    rows: int = 5000  # pictures of dev and of test, at most: the first ones
    batch: int = 256  # pairs of one step, over all processes
    max_length: int = 30  # tokens of a caption; longer ones are cut
    image_size: int | None = 384  # side of the pictures in pixels; None: the model's own
    crop_scale: tuple[float, float] = (0.5, 1.0)  # share of the area that a random crop shows
    flip: float = 0.5  # probability of a mirrored picture
    random_changes: int = 2  # of shape and light, drawn for each picture (data/random_augment.py); 0: none
    sort_by_length: bool = False  # captions inside a batch, so that micro-batches are padded less
    cache_megabytes: int = 256  # of decoded pictures, in each worker

    def with_absolute_paths(self) -> RetrievalData:
        root, image_root = (None if path is None else absolute(path) for path in (self.root, self.image_root))
        train, dev, test = (tuple(map(absolute, paths)) for paths in (self.train, self.dev, self.test))
        return replace(self, root=root, image_root=image_root, train=train, dev=dev, test=test)


def open_splits(data: RetrievalData, task: str) -> tuple[str, dict[str, Source]]:
    """What papers call the data set, and its splits: "train", "dev" and, where there is one, "test".

    Of two data sets in one folder the one that the task is named after, of two layouts ALBEF's. Raises TriviumError
    where one is missing.
    """
    if data.root is None:
        if not data.train:
            raise TriviumError(
                "no captioned pictures are given: name a table or a folder with --data.train, or with --data.root the"
                " folder of Flickr30K or COCO in ALBEF's layout or Karpathy's"
            )
        if not data.dev:
            raise TriviumError(
                "no checkpoint can be chosen without pictures that are not trained on: name some with --data.dev"
            )
        named = {"train": data.train, "dev": data.dev, "test": data.test}
        return "retrieval", {split: _source(data, paths) for split, paths in named.items() if paths}
    lists = {begins: Path(data.root, f"{begins}_train.json") for begins in OFFICIAL}
    whole = {begins: Path(data.root, BY_NAME[title].karpathy) for begins, title in OFFICIAL.items()}
    found = [begins for begins in OFFICIAL if lists[begins].is_file() or whole[begins].is_file()]
    asked = [begins for begins in OFFICIAL if task in ("retrieval", f"retrieval_{begins}")]
    if len(there := [begins for begins in found if begins in asked]) > 1:
        raise TriviumError(f"{data.root} holds two data sets: fine-tune on retrieval_{' or on retrieval_'.join(there)}")
    if not there:
        other = f", but there are files for retrieval_{found[0]}" if found else ""
        wanted = " and no ".join(f"{begins}_train.json" for begins in asked)
        raise TriviumError(
            f"{data.root} holds no {wanted}{other}: give the folder with ALBEF's annotation files, or with Karpathy's"
            f" {' or '.join(whole[begins].name for begins in asked)}, and the pictures below it or below"
            " --data.image-root; tables of your own go to --data.train"
        )
    if not lists[there[0]].is_file():
        return OFFICIAL[there[0]], _by_karpathy(data, whole[there[0]], OFFICIAL[there[0]])
    files = {split: os.path.join(data.root, f"{there[0]}_{split}.json") for split in SPLITS}
    if not os.path.isfile(files["val"]):
        raise TriviumError(f"{data.root} holds no {os.path.basename(files['val'])}, by which a checkpoint is chosen")
    splits = {("dev" if s == "val" else s): file for s, file in files.items() if os.path.isfile(file)}
    return OFFICIAL[there[0]], {split: _source(data, (file,)) for split, file in splits.items()}


def _source(data: RetrievalData, paths: tuple[str, ...]) -> Source:
    return open_source(
        "pairs", paths, image_column=data.image_column, text_column=data.text_column, root=data.image_root
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row: a picture's path and captions."""

    file: str
    where: str
    image: str
    captions: list[str]


class _Entries(ReadRows[_Entry]):
    """Them as a Source: rows of one picture share its number."""

    def picture(self, row: int) -> bytes:
        return self.picture_file(row, self.row(row).image)

    def picture_path(self, row: int) -> str:
        return self.row(row).image

    def captions(self, row: int) -> list[str]:
        return self.row(row).captions

    def identity(self, row: int) -> str:
        return self.row(row).image


def _by_karpathy(data: RetrievalData, table: Path, title: str) -> dict[str, Source]:
    """Raises TriviumError."""
    folder = Path(data.image_root or table.parent)
    opened: dict[str, Source] = {}
    for split, names in KARPATHY.items():
        found = by_karpathy(BY_NAME[title], folder, table, names)
        entries = []
        for row, path in enumerate(found.pictures.files()):
            texts = list(found.captions[row])
            where, image = found.pictures.name(row), os.path.abspath(path)
            for captions in [[text] for text in texts] if split == "train" else [texts]:
                entries.append(_Entry(str(table), where, image, captions))
        opened[split] = _Entries(entries, "pairs")
    return opened
