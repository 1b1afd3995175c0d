"""Data sets with tables of their own: Food-101, Cars, Aircraft, Pets, Flowers, GTSRB, KITTI, CLEVR.

Easy to get wrong: labels of Cars, Pets and Flowers start at 1; the classes of KITTI stand in no file but follow from
the nearest vehicle; CLEVR's test set has no labels, so its validation set is the test.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from trivium.errors import TriviumError
from trivium.evaluate.datasets.folders import listed
from trivium.evaluate.datasets.pictures import (
    DataSet,
    PictureFiles,
    Split,
    in_classes,
    in_words,
    json_of,
    lines_of,
    mat_variable,
)
from trivium.train.protocol import uniform64

VEHICLES = ("Car", "Van", "Truck")
DISTANCES = (8.0, 20.0, 999.0)  # metres, of the nearest vehicle (VTAB, Zhai et al. 2019)
KITTI_CLASSES = ("below 8 m", "8 to 20 m", "above 20 m", "no vehicle")
KITTI_PROMPTS = (
    "a car right next to me", "a car nearby", "a car in the distance", "a road without any car",
)  # fmt: skip
KITTI_TEST = 0.2
CLEVR_COUNTS = range(3, 11)
SIGNS = (
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
    "end of speed limit 80", "speed limit 100", "speed limit 120", "no overtaking", "no overtaking for trucks",
    "priority at the next crossing", "priority road", "give way", "stop", "no vehicles", "no trucks", "no entry",
    "danger", "bend to the left", "bend to the right", "double bend", "bumpy road", "slippery road",
    "road narrows on the right", "road works", "traffic lights", "pedestrians", "children crossing",
    "bicycles crossing", "ice or snow", "wild animals", "end of all limits", "turn right ahead", "turn left ahead",
    "straight ahead only", "straight ahead or right", "straight ahead or left", "keep right", "keep left",
    "roundabout", "end of no overtaking", "end of no overtaking for trucks",
)  # fmt: skip


def food101(folder: Path) -> DataSet:
    """food-101/images/<class>/, meta/{train,test}.json."""
    tables = [folder / "meta" / f"{name}.json" for name in ("train", "test")]
    content = [json_of(table) for table in tables]
    classes = tuple(sorted(content[0]))
    place = {name: label for label, name in enumerate(classes)}
    splits = []
    for table, of_class in zip(tables, content, strict=True):
        lines = [f"{name}.jpg" for names in of_class.values() for name in names]
        splits.append(listed(folder / "images", lines, place, table))
    train, test = splits
    return DataSet(classes, train, test, tables=tuple(tables), prompts=in_words(classes))


def cars(folder: Path) -> DataSet:
    """stanford_cars/: pictures, devkit/, and cars_test_annos_withlabels.mat."""
    meta = folder / "devkit" / "cars_meta.mat"
    classes = tuple(str(name) for name in mat_variable(meta, "class_names"))
    tables = [folder / "devkit" / "cars_train_annos.mat", folder / "cars_test_annos_withlabels.mat"]
    splits = []
    for table, inside in zip(tables, ("cars_train", "cars_test"), strict=True):
        entries = np.atleast_1d(mat_variable(table, "annotations"))
        if "class" not in (entries.dtype.names or ()):
            raise TriviumError(f"{table} holds no classes: fetch cars_test_annos_withlabels.mat, which does")
        labels = np.array([int(entry["class"]) - 1 for entry in entries], dtype=np.int64)
        splits.append(Split(PictureFiles(folder / inside, [str(entry["fname"]) for entry in entries]), labels))
    train, test = splits
    return DataSet(classes, train, test, tables=(meta, *tables), prompts=classes)


def aircraft(folder: Path) -> DataSet:
    """fgvc-aircraft-2013b/data/, by variant."""
    classes = tuple(name.strip() for name in lines_of(folder / "variants.txt"))
    place = {name: label for label, name in enumerate(classes)}
    tables = [folder / f"images_variant_{name}.txt" for name in ("train", "val", "test")]

    def split(table: Path) -> Split:
        pairs = [line.split(" ", 1) for line in lines_of(table)]
        for number, pair in enumerate(pairs, start=1):
            if len(pair) < 2 or pair[1].strip() not in place:
                raise TriviumError(f"{table} (line {number}): {' '.join(pair)} names no variant of variants.txt")
        labels = np.array([place[name.strip()] for _, name in pairs], dtype=np.int64)
        return Split(PictureFiles(folder / "images", [f"{number}.jpg" for number, _ in pairs]), labels)

    train, validation, test = map(split, tables)
    return DataSet(classes, train, test, validation, tables=(folder / "variants.txt", *tables), prompts=classes)


def pets(folder: Path) -> DataSet:
    """oxford-iiit-pet/images/, annotations/{trainval,test}.txt: picture, class from 1, species, breed."""
    tables = [folder / "annotations" / f"{name}.txt" for name in ("trainval", "test")]
    named: dict[int, str] = {}  # the name of a class stands in those of its pictures: Great_Pyrenees_12
    splits = []
    for table in tables:
        names, labels = [], []
        for number, line in enumerate(lines_of(table), start=1):
            if line.startswith("#"):
                continue
            try:
                picture, given, *_ = line.split()
                breed, label = picture.rpartition("_")[0], int(given) - 1
            except ValueError:
                raise TriviumError(
                    f"{table} (line {number}) is no picture with the number of its class; fetch it again"
                ) from None
            if named.setdefault(label, breed) != breed:
                raise TriviumError(
                    f"{table} (line {number}): class {given} is {named[label]} and {breed}; fetch it again"
                )
            names.append(f"{picture}.jpg")
            labels.append(label)
        splits.append(Split(PictureFiles(folder / "images", names), np.array(labels, dtype=np.int64)))
    if sorted(named) != list(range(len(named))):
        raise TriviumError(
            f"{tables[0]} and {tables[1].name} leave out a class below {max(named) + 1}: fetch them again"
        )
    classes = tuple(named[label] for label in range(len(named)))
    train, test = splits
    return DataSet(classes, train, test, tables=tuple(tables), prompts=in_words(classes))


def flowers102(folder: Path) -> DataSet:
    """flowers-102/: jpg/, imagelabels.mat, setid.mat. Its files have no names for the classes."""
    tables = (folder / "imagelabels.mat", folder / "setid.mat")
    labels = np.atleast_1d(mat_variable(tables[0], "labels")).astype(np.int64) - 1

    def split(key: str) -> Split:
        numbers = np.atleast_1d(mat_variable(tables[1], key)).astype(np.int64)
        return Split(PictureFiles(folder / "jpg", [f"image_{n:05d}.jpg" for n in numbers]), labels[numbers - 1])

    classes = tuple(str(number) for number in range(1, int(labels.max()) + 2))
    return DataSet(classes, split("trnid"), split("tstid"), split("valid"), tables=tables)


def gtsrb(folder: Path) -> DataSet:
    """gtsrb/: GTSRB/Training/<5 digits>/*.ppm, GTSRB/Final_Test/Images/*.ppm, GT-final_test.csv."""
    inside = next((path for path in (folder / "GTSRB", folder) if (path / "Final_Test").is_dir()), folder / "GTSRB")
    training = next(
        (path for path in (inside / "Training", inside / "Final_Training" / "Images") if path.is_dir()),
        inside / "Training",
    )
    classes, names, labels = in_classes(training)
    train = Split(PictureFiles(training, names), np.array([int(classes[label]) for label in labels], dtype=np.int64))
    table = next((path / "GT-final_test.csv" for path in (folder, inside / "Final_Test" / "Images", inside)
                  if (path / "GT-final_test.csv").exists()), folder / "GT-final_test.csv")  # fmt: skip
    lines_of(table)
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    try:
        numbers = np.array([int(row["ClassId"]) for row in rows], dtype=np.int64)
        test = Split(PictureFiles(inside / "Final_Test" / "Images", [row["Filename"] for row in rows]), numbers)
    except (KeyError, ValueError, TypeError) as error:
        raise TriviumError(f"{table} has no column Filename or ClassId ({error!r}): fetch it again") from None
    which = "the full training set" if training.name == "Images" else "the training set of the competition"
    return DataSet(
        tuple(f"{number:05d}" for number in range(len(SIGNS))), train, test, tables=(table,),
        prompts=tuple(f"a traffic sign: {sign}" for sign in SIGNS),
        splits=f"{which} ({len(train):,} pictures) against the final test set",
    )  # fmt: skip


def kitti(folder: Path) -> DataSet:
    """Kitti/raw/training/: image_2/*.png, label_2/*.txt. The class is the distance to the nearest car, van or truck."""
    training = folder / "training" if (folder / "training").is_dir() else folder
    tables = sorted((training / "label_2").glob("*.txt"))
    if not tables:
        raise TriviumError(f"{training / 'label_2'} holds no labels: unpack data_object_label_2.zip there")
    labels = np.array([_distance_class(table) for table in tables], dtype=np.int64)
    whole = Split(PictureFiles(training / "image_2", [f"{table.stem}.png" for table in tables]), labels)
    drawn = np.argsort(np.argsort(uniform64(0, np.arange(len(whole))), kind="stable"), kind="stable")
    test = drawn < round(KITTI_TEST * len(whole))
    return DataSet(
        KITTI_CLASSES, whole[np.flatnonzero(~test)], whole[np.flatnonzero(test)], tables=tuple(tables),
        prompts=KITTI_PROMPTS,
        splits="a fifth of the labelled pictures for the test, drawn with seed 0: the published score rests on a draw"
        " of the same size without a seed, which cannot be made again",
    )  # fmt: skip


def _distance_class(table: Path) -> int:
    """0 to 3, by the depth (the 14th field) of the nearest vehicle."""
    nearest = 1000.0
    for number, line in enumerate(lines_of(table), start=1):
        fields = line.split()
        try:
            if fields and fields[0] in VEHICLES:
                nearest = min(nearest, float(fields[13]))
        except (IndexError, ValueError):
            raise TriviumError(f"{table} (line {number}) is no object of KITTI: fetch the labels again") from None
    return int(np.searchsorted(DISTANCES, nearest, side="left"))


def clevr(folder: Path) -> DataSet:
    """clevr/CLEVR_v1.0/: images/{train,val}/, scenes/CLEVR_{train,val}_scenes.json. The class counts the objects."""
    tables, splits = [], []
    for name in ("train", "val"):
        table = folder / "scenes" / f"CLEVR_{name}_scenes.json"
        try:
            scenes = [(scene["image_filename"], len(scene["objects"])) for scene in json_of(table)["scenes"]]
        except (KeyError, TypeError) as error:
            raise TriviumError(f"{table} is no list of CLEVR's scenes ({error!r}): fetch it again") from None
        if odd := next((scene for scene in scenes if scene[1] not in CLEVR_COUNTS), None):
            raise TriviumError(f"{table}: {odd[0]} has {odd[1]} objects, where CLEVR has 3 to 10; fetch it again")
        labels = np.array([count - CLEVR_COUNTS[0] for _, count in scenes], dtype=np.int64)
        splits.append(Split(PictureFiles(folder / "images" / name, [scene for scene, _ in scenes]), labels))
        tables.append(table)
    train, test = splits
    return DataSet(
        tuple(map(str, CLEVR_COUNTS)), train, test, tables=tuple(tables),
        prompts=tuple(f"{count} objects" for count in CLEVR_COUNTS),
        splits="train against val, since the test set has no labels",
    )  # fmt: skip
