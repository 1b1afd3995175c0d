"""Miniatures of the vision data sets in their owners' own formats: a few pictures of two to eight classes.

A picture is flat and its red tells its label (`RED`), so that a reader that mixes them up is found out; where only grey
fits, so does the grey. Its corner at the top right is white, which tells rows from columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

PER_CLASS = {"train": 4, "validation": 2, "test": 3}


def red(label: int) -> int:
    return 20 + 25 * label


def pixels(label: int, side: int = 32, channels: int = 3) -> np.ndarray:
    picture = np.full((side, side, channels), 90, dtype=np.uint8)
    picture[..., 0] = red(label)
    if channels == 1:
        picture[:] = red(label)
    picture[: side // 4, -side // 4 :] = 255
    return picture


def save(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label)).save(path, **({"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {}))


def encoded(label: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(label)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def labels_of(split: str, classes: int) -> list[int]:
    """Interleaved, so that no order of folders gives it by chance."""
    return [label for _ in range(PER_CLASS[split]) for label in range(classes)]


def folder_of_classes(folder: Path, classes: Sequence[str], split: str, suffix: str) -> None:
    for number, label in enumerate(labels_of(split, len(classes))):
        save(folder / classes[label] / f"{split}_{number:03d}{suffix}", label)


# -------------------------------------------------------------------------------------------- one for each


def imagenet(root: Path, flat: bool = False) -> None:
    wnids = ["n01440764", "n01443537", "n01484850"]
    folder_of_classes(root / "imagenet" / "train", wnids, "train", ".JPEG")
    if not flat:
        folder_of_classes(root / "imagenet" / "val", wnids, "test", ".JPEG")
        return
    devkit = root / "imagenet" / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    # The devkit numbers its classes in an order of its own; higher synsets follow.
    entries = [(1, "n01484850", "great white shark, white shark", "a", 0), (2, "n01440764", "tench", "b", 0),
               (3, "n01443537", "goldfish, Carassius", "c", 0), (1001, "n01429349", "bird", "d", 2)]  # fmt: skip
    savemat(devkit / "meta.mat", {"synsets": np.array(entries, dtype=kinds).reshape(-1, 1)})
    number = {0: 2, 1: 3, 2: 1}
    for place, label in enumerate(labels_of("test", 3), start=1):
        save(root / "imagenet" / "val" / f"ILSVRC2012_val_{place:08d}.JPEG", label)
    lines = "".join(f"{number[label]}\n" for label in labels_of("test", 3))
    write(devkit / "ILSVRC2012_validation_ground_truth.txt", lines)


def food101(root: Path) -> None:
    classes = ["apple_pie", "baby_back_ribs", "waffles"]
    for split in ("train", "test"):
        of_class: dict[str, list[str]] = {name: [] for name in reversed(classes)}
        for number, label in enumerate(labels_of(split, 3)):
            name = f"{classes[label]}/{split}{number}"
            of_class[classes[label]].append(name)
            save(root / "food-101" / "images" / f"{name}.jpg", label)
        write(root / "food-101" / "meta" / f"{split}.json", json.dumps(of_class))


def _cifar_pixels(labels: Sequence[int]) -> np.ndarray:
    return np.stack([pixels(label).transpose(2, 0, 1).ravel() for label in labels])


def cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["airplane", "automobile", "bird"]
    batches = np.array_split(np.array(labels_of("train", 3)), 5)
    for name, labels in [*((f"data_batch_{i}", part) for i, part in enumerate(batches, start=1)),
                         ("test_batch", np.array(labels_of("test", 3)))]:  # fmt: skip
        batch = {b"batch_label": b"a batch", b"labels": labels.tolist(), b"data": _cifar_pixels(labels.tolist()),
                 b"filenames": [b"a.png"] * len(labels)}  # fmt: skip
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"label_names": [name.encode() for name in names], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        labels = labels_of(split, 3)
        batch = {b"fine_labels": labels, b"coarse_labels": [0] * len(labels), b"data": _cifar_pixels(labels)}
        (folder / split).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"fine_label_names": [b"apple", b"aquarium_fish", b"baby"], b"coarse_label_names": [b"fruit"]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))


def cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo 2012"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names.reshape(1, -1)})
    kinds = [(f"bbox_{side}", "f8") for side in ("x1", "y1", "x2", "y2")] + [("class", "f8"), ("fname", "O")]
    for split, inside, table in (("train", "cars_train", folder / "devkit" / "cars_train_annos.mat"),
                                 ("test", "cars_test", folder / "cars_test_annos_withlabels.mat")):  # fmt: skip
        entries = []
        for number, label in enumerate(labels_of(split, 3), start=1):
            save(folder / inside / f"{number:05d}.jpg", label)
            entries.append((1, 2, 3, 4, label + 1, f"{number:05d}.jpg"))
        savemat(table, {"annotations": np.array(entries, dtype=kinds).reshape(1, -1)})


def aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    names = ["707-320", "Boeing 717", "Yak-42"]
    write(folder / "variants.txt", "".join(f"{name}\n" for name in names))
    number = 1_000_000
    for split, of in (("train", "train"), ("val", "validation"), ("test", "test")):
        lines = []
        for label in labels_of(of, 3):
            number += 1
            save(folder / "images" / f"{number}.jpg", label)
            lines.append(f"{number} {names[label]}\n")
        write(folder / f"images_variant_{split}.txt", "".join(lines))


def dtd(root: Path) -> None:
    for split, of in (("train", "train"), ("val", "validation"), ("test", "test")):
        lines = []
        for number, label in enumerate(labels_of(of, 3)):
            name = ["banded", "blotchy", "zigzagged"][label]
            save(root / "dtd" / "images" / name / f"{name}_{split}_{number:04d}.jpg", label)
            lines.append(f"{name}/{name}_{split}_{number:04d}.jpg\n")
        write(root / "dtd" / "labels" / f"{split}1.txt", "".join(lines))


def pets(root: Path) -> None:
    folder, number = root / "oxford-iiit-pet", 0
    for split, of in (("trainval", "train"), ("test", "test")):
        lines = []
        for label in labels_of(of, 3):
            number += 1
            name = f"{['Abyssinian', 'american_bulldog', 'Yorkshire_terrier'][label]}_{number}"
            save(folder / "images" / f"{name}.jpg", label)
            lines.append(f"{name} {label + 1} 1 1\n")
        write(folder / "annotations" / f"{split}.txt", "".join(lines))


def caltech101(root: Path) -> None:
    for label, name in enumerate(["BACKGROUND_Google", "accordion", "yin_yang"]):
        for number in range(32 + label):
            save(root / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", label)


def flowers102(root: Path) -> None:
    folder = root / "flowers-102"
    folder.mkdir()
    labels = [label for split in PER_CLASS for label in labels_of(split, 3)]
    for number, label in enumerate(labels, start=1):
        save(folder / "jpg" / f"image_{number:05d}.jpg", label)
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels, dtype=np.uint8).reshape(1, -1) + 1})
    ends = np.cumsum([0, *(3 * count for count in PER_CLASS.values())]) + 1
    ids = {key: np.arange(ends[i], ends[i + 1]).reshape(1, -1) for i, key in enumerate(("trnid", "valid", "tstid"))}
    savemat(folder / "setid.mat", ids)


def mnist(root: Path, packed: bool = False) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, split in (("train", "train"), ("t10k", "test")):
        labels = labels_of(split, 3)
        pictures = np.stack([pixels(label, 28, 1)[..., 0] for label in labels])
        for part, values in (("images-idx3", pictures), ("labels-idx1", np.array(labels, dtype=np.uint8))):
            data = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()
            suffix = ".gz" if packed else ""
            (folder / f"{name}-{part}-ubyte{suffix}").write_bytes(gzip.compress(data) if packed else data)


def stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    write(folder / "class_names.txt", "airplane\nbird\ncar\n")
    for split in ("train", "test"):
        labels = labels_of(split, 3)
        columns = np.stack([pixels(label, 96).transpose(2, 1, 0) for label in labels])  # column by column
        (folder / f"{split}_X.bin").write_bytes(columns.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in labels))


def eurosat(root: Path) -> None:
    for label, name in enumerate(["AnnualCrop", "Forest", "SeaLake"]):
        for number in range(1, 16):
            save(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", label)


def gtsrb(root: Path) -> None:
    folder = root / "gtsrb"
    for number, label in enumerate(labels_of("train", 3)):
        save(folder / "GTSRB" / "Training" / f"{label * 4:05d}" / f"00000_{number:05d}.ppm", label)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, label in enumerate(labels_of("test", 3)):
        save(folder / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm", label)
        rows.append(f"{number:05d}.ppm;32;32;5;5;27;27;{label * 4}")
    write(folder / "GT-final_test.csv", "\n".join(rows) + "\n")


def kitti(root: Path) -> None:
    training = root / "Kitti" / "raw" / "training"
    depths = {0: [30.0, 8.0], 1: [9.5], 2: [35.2, 21.0], 3: []}
    for number, label in enumerate(label for _ in range(10) for label in range(4)):
        save(training / "image_2" / f"{number:06d}.png", label)
        lines = ["Pedestrian 0.00 0 -0.20 712.40 143.00 810.73 307.92 1.89 0.48 1.20 1.84 1.47 2.00 0.01"]
        lines += [f"Car 0.00 0 -1.57 599.41 156.40 629.75 189.25 2.85 2.63 12.34 0.47 1.49 {depth} -1.56"
                  for depth in depths[label]]  # fmt: skip
        lines.append("DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10")
        write(training / "label_2" / f"{number:06d}.txt", "\n".join(lines) + "\n")


def pcam(root: Path) -> None:
    import h5py

    (root / "pcam").mkdir()
    for name, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        labels = labels_of(split, 2)
        values = {"x": np.stack([pixels(label, 96) for label in labels]), "y": np.array(labels, np.uint8)}
        for part, array in values.items():
            with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{name}_{part}.h5", "w") as file:
                file[part] = array.reshape(-1, 1, 1, 1) if part == "y" else array


def ucf101(root: Path) -> None:
    classes = ["ApplyEyeMakeup", "ApplyLipstick", "YoYo"]
    lists = root / "ucfTrainTestlist"
    write(lists / "classInd.txt", "".join(f"{number} {name}\r\n" for number, name in enumerate(classes, start=1)))
    for split in ("train", "test"):
        lines = []
        for number, label in enumerate(labels_of(split, 3)):
            video = f"{classes[label]}/v_{classes[label]}_g{number:02d}_{split}"
            save(root / "UCF-101" / f"{video}.jpg", label)
            lines.append(f"{video}.avi {label + 1}\n" if split == "train" else f"{video}.avi\n")
        write(lists / f"{split}list01.txt", "".join(lines))


def clevr(root: Path) -> None:
    folder = root / "clevr" / "CLEVR_v1.0"
    for name, split in (("train", "train"), ("val", "test")):
        scenes = []
        for number, label in enumerate(labels_of(split, 8)):
            save(folder / "images" / name / f"CLEVR_{name}_{number:06d}.png", label)
            objects = [{"shape": "cube"}] * (label + 3)
            scenes.append({"image_filename": f"CLEVR_{name}_{number:06d}.png", "objects": objects, "split": name})
        write(folder / "scenes" / f"CLEVR_{name}_scenes.json", json.dumps({"info": {}, "scenes": scenes}))


def fer2013(root: Path, form: str = "fer2013.csv") -> None:
    if form == "folders":
        for split in ("train", "test"):
            folder_of_classes(root / "fer2013" / split, ["angry", "happy", "sad"], split, ".jpg")
        return
    (root / "fer2013").mkdir()
    parts = [("Training", label) for label in labels_of("train", 7)]
    parts += [(usage, label) for usage in ("PrivateTest", "PublicTest") for label in labels_of("test", 7)]
    with (root / "fer2013" / form).open("w", newline="") as file:
        writer = csv.writer(file)
        named = ["emotion", "pixels", "Usage"] if form == "fer2013.csv" else ["emotion", " Usage", " pixels"]
        writer.writerow(named)
        for usage, label in parts:
            cells = {"emotion": label, "Usage": usage, "pixels": " ".join(map(str, pixels(label, 48, 1).ravel()))}
            writer.writerow([cells[name.strip()] for name in named])


SUN = ["/a/abbey", "/a/apartment_building/outdoor", "/z/zoo"]


def sun397(root: Path, lists: bool = True) -> None:
    folder = root / "SUN397"
    write(folder / "ClassName.txt", "".join(f"{name}\n" for name in SUN))
    for split, table in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        lines = []
        for number, label in enumerate(labels_of(split, 3) * (1 if lists else 5)):
            name = f"{SUN[label]}/sun_{split}{number:03d}.jpg"
            save(folder / name[1:], label)
            lines.append(f"{name}\n")
        if lists:
            write(folder / table, "".join(lines))


def rendered_sst2(root: Path) -> None:
    for name, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        folder_of_classes(root / "rendered-sst2" / name, ["negative", "positive"], split, ".png")


def country211(root: Path) -> None:
    for name, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        folder_of_classes(root / "country211" / name, ["AD", "AE", "ZW"], split, ".jpg")


BUILDERS: dict[str, Callable[..., None]] = {
    "ImageNet": imagenet, "Food101": food101, "CIFAR10": cifar10, "CIFAR100": cifar100, "Cars": cars,
    "Aircraft": aircraft, "DTD": dtd, "Pets": pets, "Caltech101": caltech101, "Flowers102": flowers102, "MNIST": mnist,
    "STL10": stl10, "EuroSAT": eurosat, "GTSRB": gtsrb, "KITTI": kitti, "PCAM": pcam, "UCF101": ucf101, "CLEVR": clevr,
    "FER2013": fer2013, "SUN397": sun397, "RenderedSST2": rendered_sst2, "Country211": country211,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- copies


def webdataset(folder: Path, names: Sequence[str] | None = ("a red thing", "a green thing", "a blue thing")) -> None:
    """As its makers write it: two shards a split, classnames.txt, templates with {c}."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        parts = np.array_split(np.array(labels_of(split, 3)), 2)
        for number, labels in enumerate(parts):
            with tarfile.open(folder / split / f"{number}.tar", "w") as archive:
                for row, label in enumerate(labels.tolist()):
                    for suffix, data in (("cls", str(label).encode()), ("webp", encoded(label))):
                        member = tarfile.TarInfo(f"s{number:04d}{row:05d}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        write(folder / split / "nshards.txt", "2\n")
    if names is not None:
        write(folder / "classnames.txt", "".join(f"{name}\n" for name in names))
        write(folder / "zeroshot_classification_templates.txt", "a photo of {c}.\n")


def parquet(
    folder: Path, names: Sequence[str] = ("red", "green", "blue"), splits: Sequence[str] = ("train", "test")
) -> None:
    """As Hugging Face writes it."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split in splits:
        labels = labels_of(split, 3)
        table: Any = pa.table(
            {
                "img": [{"bytes": encoded(label), "path": None} for label in labels],
                "label": pa.array(labels, pa.int64()),
            }
        )
        features = {"img": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
