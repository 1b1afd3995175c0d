"""Copies of data sets in layouts that serve them all: WebDataset shards, and Parquet files as Hugging Face has them.

wds_<name>/{train,test}/*.tar        samples key.jpg|png|webp + key.cls, classnames.txt and
                                     zeroshot_classification_templates.txt beside the splits
<name>/[data/]{train,validation,test}*.parquet     a picture in `image` or `img`, a number in `label` or `fine_label`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trivium.data.shards import TarShards
from trivium.errors import TriviumError
from trivium.evaluate.datasets.pictures import DataSet, ShardPictures, Split, lines_of, parquet_split

CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("fine_label", "label")
VALIDATION = ("validation", "valid", "val")


def webdataset(folder: Path) -> DataSet:
    """A copy in tar shards. Raises TriviumError."""
    splits = {
        name: _shards(folder / name) for name in ("train", *VALIDATION, "test") if any((folder / name).glob("*.tar"))
    }
    if not {"train", "test"} <= splits.keys():
        raise TriviumError(f"{folder} must hold tar shards in the folders train and test: fetch both")
    prompts, templates, tables = own_prompts(folder)
    classes = _named(prompts, 1 + max(int(split.labels_N.max()) for split in splits.values()))
    notes = [note for split in splits.values() for note in _notes(split)]
    validation = next((splits[name] for name in VALIDATION if name in splits), None)
    return DataSet(
        classes, splits["train"], splits["test"], validation, tables=tables, prompts=prompts, templates=templates,
        splits="the splits of the copy in tar shards", notes=tuple(notes),
    )  # fmt: skip


def _shards(folder: Path) -> Split:
    tars = sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
    shards = TarShards(tars, "images")
    labels = [shards.label(row) for row in range(len(shards))]
    if None in labels:
        file, key = shards.where(labels.index(None))
        raise TriviumError(f"{file} ({key}) has no number in a .cls beside its picture: fetch the copy again")
    return Split(ShardPictures(shards), np.array(labels, dtype=np.int64))


def _notes(split: Split) -> list[str]:
    assert isinstance(split.pictures, ShardPictures)
    return split.pictures.shards.notes


def parquet(folder: Path) -> DataSet:
    """A copy in Parquet files. Where nobody publishes the labels of the test split, as of ImageNet, or it is not there,
    the validation split stands for it. Raises TriviumError."""
    inside = folder / "data" if any((folder / "data").glob("*.parquet")) else folder
    found: dict[str, list[Path]] = {}
    for path in sorted(inside.glob("*.parquet")):
        found.setdefault(path.stem.split("-")[0], []).append(path)
    checked = next((name for name in VALIDATION if name in found), None)
    if "train" not in found or not {"test", checked} & found.keys():
        raise TriviumError(f"{inside} must hold train*.parquet and test*.parquet or validation*.parquet: fetch both")
    schema = _schema(found["train"][0])
    image, label = (_column(schema, names, found["train"][0]) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
    prompts, templates, tables = own_prompts(folder)
    named = _feature_names(schema, label)
    used = [name for name in ("train", checked, "test") if name in found]  # what else is there is not opened
    for path in (path for name in used for path in found[name]):
        if (other := _feature_names(_schema(path), label)) != named:
            number = next((n for n, (a, b) in enumerate(zip_longest(named, other)) if a != b), 0)
            raise TriviumError(
                f"{path} and {found['train'][0].name} number their classes differently: {number} is"
                f" {_nth(other, number)} in the one and {_nth(named, number)} in the other; fetch both again"
            )
    splits = {name: parquet_split(found[name], image, label) for name in used}
    count = 1 + max(int(split.labels_N.max()) for split in splits.values())
    validation, test, which = splits.get(checked or ""), splits.get("test"), "the splits of the copy in Parquet files"
    if validation is not None and (test is None or bool((test.labels_N < 0).all())):
        why = "is not there" if test is None else "has no labels"
        test, validation, which = validation, None, f"{which}; measured on its validation split, since test {why}"
    assert test is not None
    return DataSet(
        named or _named(prompts, count), splits["train"], test, validation, tables=tables,
        prompts=prompts or named, templates=templates, splits=which,
    )  # fmt: skip


def _named(prompts: tuple[str, ...], count: int) -> tuple[str, ...]:
    """So many classes by the user's names for them; where those are too few by their numbers, and `find` refuses."""
    return prompts if len(prompts) >= count else tuple(map(str, range(count)))


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise TriviumError(f"{path} is no readable Parquet file ({error}): fetch it again") from None


def _column(schema: pa.Schema, names: Sequence[str], file: Path) -> str:
    name = next((name for name in names if name in schema.names), None)
    if name is None:
        raise TriviumError(f"{file} has none of the columns {', '.join(names)}: it has {', '.join(schema.names)}")
    return name


def _feature_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """The classes that Hugging Face writes into the file's metadata; none where it did not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()


def _nth(names: Sequence[str], number: int) -> str:
    return repr(names[number]) if number < len(names) else "without a name"


def own_prompts(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Path, ...]]:
    """The user's classnames.txt and zeroshot_classification_templates.txt, and the files that were found."""
    files = [folder / name for name in (CLASS_NAMES, TEMPLATES)]
    names, templates = (tuple(line.strip() for line in lines_of(file)) if file.exists() else () for file in files)
    if bad := next((line for line in templates if "{}" not in line and "{c}" not in line), None):
        raise TriviumError(f"{files[1]}: the template {bad!r} has no {{c}} where the class is to stand")
    return names, templates, tuple(file for file in files if file.exists())
