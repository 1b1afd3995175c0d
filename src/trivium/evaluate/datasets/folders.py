"""Data sets with a folder a class: ImageNet, Caltech-101, EuroSAT, rendered SST-2, Country211, SUN397, UCF101, DTD.

Where the owners draw no split, a fixed one is drawn here and `splits` says which.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trivium.errors import TriviumError
from trivium.evaluate.datasets.pictures import (
    SUFFIXES,
    DataSet,
    PictureFiles,
    Split,
    in_classes,
    in_words,
    inside_of,
    lines_of,
    mat_variable,
    same_classes,
)
from trivium.train.protocol import uniform64

CALTECH_TRAIN = 30  # pictures of each class
EUROSAT_TRAIN, EUROSAT_TEST = 1000, 500  # pictures of each class


def imagenet(folder: Path) -> DataSet:
    """train/<wnid>/ and val/<wnid>/, or val/ flat beside the devkit. Validation is the test set everywhere."""
    classes, names, labels = in_classes(folder / "train")
    if stray := next((name for name in classes if not re.fullmatch(r"n\d{8}", name)), None):
        raise TriviumError(f"{folder / 'train' / stray} is no class of ImageNet: its folders are called as n01440764")
    train = Split(PictureFiles(folder / "train", names), labels)
    devkit = next(
        (path for path in (folder / "ILSVRC2012_devkit_t12/data", folder) if (path / "meta.mat").exists()), None
    )
    words: dict[str, str] = {}
    numbers: dict[int, str] = {}  # the devkit's own numbers -> wnid
    if devkit is not None:
        try:
            for synset in np.atleast_1d(mat_variable(devkit / "meta.mat", "synsets")):
                words[str(synset["WNID"])] = str(synset["words"]).split(",")[0]
                numbers[int(synset["ILSVRC2012_ID"])] = str(synset["WNID"])
        except (ValueError, IndexError, TypeError) as error:
            raise TriviumError(f"{devkit / 'meta.mat'} is no list of classes ({error!r}): fetch it again") from None
    flat = sorted(path.name for path in inside_of(folder / "val") if path.suffix.lower() in SUFFIXES)
    if flat:
        truth = None if devkit is None else devkit / "ILSVRC2012_validation_ground_truth.txt"
        if truth is None or not truth.exists():
            raise TriviumError(
                f"{folder / 'val'} is flat, so the devkit must tell the classes: unpack ILSVRC2012_devkit_t12 into"
                f" {folder}, or move the pictures into folders of their classes"
            )
        try:
            given = [numbers[int(line)] for line in lines_of(truth)]
        except (ValueError, KeyError) as error:
            raise TriviumError(f"{truth} names a class that meta.mat has not ({error}): fetch both again") from None
        if len(given) != len(flat):
            raise TriviumError(f"{truth} has {len(given)} lines for {len(flat)} pictures in {folder / 'val'}")
        place = {name: label for label, name in enumerate(classes)}
        if missing := next((wnid for wnid in given if wnid not in place), None):
            raise TriviumError(f"{truth} names the class {missing}, which has no folder in {folder / 'train'}")
        test = Split(PictureFiles(folder / "val", flat), np.array([place[wnid] for wnid in given], dtype=np.int64))
        tables: tuple[Path, ...] = (truth,)
    else:
        test_classes, names, labels = in_classes(folder / "val")
        same_classes(classes, test_classes, folder)
        test, tables = Split(PictureFiles(folder / "val", names), labels), ()
    prompts = tuple(words[name] for name in classes) if all(name in words for name in classes) else ()
    return DataSet(
        classes, train, test, tables=tables, prompts=prompts, splits="train against val, the test set everywhere"
    )


def caltech101(folder: Path) -> DataSet:
    """101_ObjectCategories/<class>/, the background class among them; 30 of each class are for training."""
    classes, names, labels = in_classes(folder)
    drawn = _places_in_class(labels, uniform64(0, np.arange(len(labels)))) < CALTECH_TRAIN
    whole = Split(PictureFiles(folder, names), labels)
    return DataSet(
        classes, whole[np.flatnonzero(drawn)], whole[np.flatnonzero(~drawn)], prompts=in_words(classes),
        splits=f"{CALTECH_TRAIN} pictures of each class for training, the rest for the test, drawn with seed 0: the"
        " owners draw none, and the published draw cannot be made again",
    )  # fmt: skip


def eurosat(folder: Path) -> DataSet:
    """2750/<Class>/: of each class, by name, the first 1,000 for training and the next 500 for the test."""
    classes, names, labels = in_classes(folder)
    place = _places_in_class(labels, np.arange(len(labels)))
    # A copy with fewer pictures keeps the proportions.
    sizes = np.bincount(labels)[labels]
    last_train = np.minimum(EUROSAT_TRAIN, sizes * EUROSAT_TRAIN // (EUROSAT_TRAIN + EUROSAT_TEST))
    test = (place >= last_train) & (place < last_train + EUROSAT_TEST)
    whole = Split(PictureFiles(folder, names), labels)
    return DataSet(
        classes, whole[np.flatnonzero(place < last_train)], whole[np.flatnonzero(test)], prompts=in_words(classes),
        splits="of each class, sorted by name, the first 1,000 for training and the next 500 for the test, as VISSL's"
        " recipe: the owners draw none, and that of CLIP cannot be made again",
    )  # fmt: skip


def _places_in_class(labels_N: np.ndarray, keys_N: np.ndarray) -> np.ndarray:
    """The place of each row among those of its class, in the order of the keys."""
    place_N = np.zeros(len(labels_N), dtype=np.int64)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        place_N[rows[np.argsort(keys_N[rows], kind="stable")]] = np.arange(len(rows))
    return place_N


def rendered_sst2(folder: Path) -> DataSet:
    """rendered-sst2/{train,valid,test}/{negative,positive}/, the official pictures."""
    return _three_folders(folder, prompts={"negative": "a negative review", "positive": "a positive review"})


def country211(folder: Path) -> DataSet:
    """country211/{train,valid,test}/<ISO2>/."""
    return _three_folders(folder, prompts={})


def _three_folders(folder: Path, prompts: dict[str, str]) -> DataSet:
    splits, classes = [], []
    for name in ("train", "valid", "test"):
        found, names, labels = in_classes(folder / name)
        classes.append(found)
        splits.append(Split(PictureFiles(folder / name, names), labels))
        same_classes(classes[0], found, folder / name)
    train, validation, test = splits
    words = tuple(prompts.get(name, "") for name in classes[0])
    return DataSet(classes[0], train, test, validation, prompts=words if all(words) else ())


# --------------------------------------------------------------- folders, and lists that say which are for what


def listed(folder: Path, lines: Sequence[str], place: dict[str, int], where: Path) -> Split:
    """The pictures that a list names by their paths below `folder`, whose class is the path without the file."""
    names, labels = [], []
    for number, line in enumerate(lines, start=1):
        path = Path(line.strip().lstrip("/"))
        label = place.get(path.parent.as_posix())
        if label is None:
            raise TriviumError(
                f"{where} (line {number}): {path.parent} is no class of the data set; fetch the list again"
            )
        names.append(path.as_posix())
        labels.append(label)
    if not names:
        raise TriviumError(f"{where} names no picture: fetch it again")
    return Split(PictureFiles(folder, names), np.array(labels, dtype=np.int64))


def dtd(folder: Path) -> DataSet:
    """dtd/: split 1 of 10."""
    classes = tuple(sorted(path.name for path in inside_of(folder / "images") if path.is_dir()))
    place = {name: label for label, name in enumerate(classes)}
    tables = [folder / "labels" / f"{name}1.txt" for name in ("train", "val", "test")]
    train, validation, test = (listed(folder / "images", lines_of(table), place, table) for table in tables)
    return DataSet(
        classes, train, test, validation, tables=tuple(tables), prompts=in_words(classes),
        splits="the official split 1 of 10",
    )  # fmt: skip


def sun397(folder: Path) -> DataSet:
    """SUN397/: the official partition 1 where its lists are there, else 70 % of each class against 20 %, drawn here."""
    names = lines_of(folder / "ClassName.txt")
    classes = tuple(name.strip().strip("/") for name in names)
    place = {name: label for label, name in enumerate(classes)}
    words = tuple(re.sub(r"^\w/", "", name) for name in classes)
    for inside in (folder, folder / "Partitions", folder.parent):
        tables = [inside / "Training_01.txt", inside / "Testing_01.txt"]
        if all(table.exists() for table in tables):
            train, test = (listed(folder, lines_of(table), place, table) for table in tables)
            return DataSet(
                classes, train, test, tables=(folder / "ClassName.txt", *tables), prompts=in_words(words),
                splits="the official partition 1 of 10",
            )  # fmt: skip
    lines = [
        path.relative_to(folder).as_posix()
        for name in classes
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    whole = listed(folder, lines, place, folder)
    drawn = _places_in_class(whole.labels_N, uniform64(0, np.arange(len(whole))))
    sizes = np.bincount(whole.labels_N, minlength=len(classes))[whole.labels_N]
    parts = (drawn < 0.7 * sizes, (drawn >= 0.7 * sizes) & (drawn < 0.8 * sizes), drawn >= 0.8 * sizes)
    train, validation, test = (whole[np.flatnonzero(part)] for part in parts)
    return DataSet(
        classes, train, test, validation, tables=(folder / "ClassName.txt",), prompts=in_words(words),
        splits="70, 10 and 20 % of each class, drawn with seed 0, since the lists of the official partitions"
        " (Training_01.txt, Testing_01.txt) are not there",
    )  # fmt: skip


def ucf101(folder: Path) -> DataSet:
    """UCF-101/<class>/<video>.jpg, the middle frame of each video, beside ucfTrainTestlist/: split 1 of 3."""
    lists = next(
        (path for path in (folder.parent / "ucfTrainTestlist", folder / "ucfTrainTestlist") if path.is_dir()), None
    )
    if lists is None:
        raise TriviumError(f"{folder.parent} holds no folder ucfTrainTestlist: unpack UCF101TrainTestSplits there")
    numbered: list[tuple[int, str]] = []
    for line in lines_of(lists / "classInd.txt"):
        stated, _, name = line.partition(" ")
        if not stated.isdecimal():
            raise TriviumError(f"{lists / 'classInd.txt'}: {line!r} is no number with its class; fetch it again")
        numbered.append((int(stated), name.strip()))
    classes = tuple(name for _, name in sorted(numbered))
    place = {name: label for label, name in enumerate(classes)}
    tables = [lists / "trainlist01.txt", lists / "testlist01.txt"]
    splits = []
    for table in tables:
        lines = [line.split() for line in lines_of(table)]
        for number, words in enumerate(lines, start=1):  # the training list states the number of the class as well
            name = words[0].split("/")[0]
            if len(words) > 1 and words[1] != f"{place.get(name, -1) + 1}":
                raise TriviumError(
                    f"{table} (line {number}): {name} has another number in classInd.txt; fetch both again"
                )
        frames = [_frame(folder, words[0]) for words in lines]
        if not any((folder / frame).exists() for frame in frames):
            raise TriviumError(
                f"{folder} holds videos alone: extract the middle frame of each beside it, as"
                " ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.jpg"
            )
        splits.append(listed(folder, frames, place, table))
    train, test = splits
    return DataSet(
        classes, train, test, tables=(lists / "classInd.txt", *tables), prompts=in_words(classes),
        splits="the official split 1 of 3, the middle frame of each video",
    )  # fmt: skip


def _frame(folder: Path, video: str) -> str:
    """The picture that stands for a video."""
    is_png = (folder / video).with_suffix(".png").exists()
    return Path(video).with_suffix(".png" if is_png else ".jpg").as_posix()
