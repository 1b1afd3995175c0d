"""Data sets whose owners publish pixels in a few uncompressed files: CIFAR, MNIST, STL-10, FER2013, PatchCamelyon.

Easy to get wrong: CIFAR stores a picture channel by channel, STL-10 by channel and then by column; STL-10's labels
start at 1; FER2013's test set is the public and the private one together, as the published scores have it.

N pictures, H height, W width, C channels.
"""

from __future__ import annotations

import csv
import gzip
import struct
from pathlib import Path

import numpy as np

from trivium.data.unpickling import read_pickle
from trivium.errors import TriviumError
from trivium.evaluate.datasets.pictures import (
    DataSet,
    PictureArray,
    PictureFiles,
    Split,
    in_classes,
    in_words,
    lines_of,
    same_classes,
)

EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # FER2013's, by number
FER_SIDE, STL_SIDE, CIFAR_SIDE = 48, 96, 32


def cifar10(folder: Path) -> DataSet:
    """cifar-10-batches-py/"""
    train = [_cifar_batch(folder / f"data_batch_{number}", b"labels") for number in range(1, 6)]
    test = _cifar_batch(folder / "test_batch", b"labels")
    return _cifar(folder / "batches.meta", b"label_names", train, test)


def cifar100(folder: Path) -> DataSet:
    """cifar-100-python/, by its 100 fine classes."""
    train, test = (_cifar_batch(folder / name, b"fine_labels") for name in ("train", "test"))
    return _cifar(folder / "meta", b"fine_label_names", [train], test)


def _cifar(meta: Path, key: bytes, train: list[Split], test: Split) -> DataSet:
    names = read_pickle(meta)
    try:
        classes = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names[key])
    except (KeyError, TypeError, UnicodeDecodeError):
        raise TriviumError(f"{meta} holds no list {key.decode()}: fetch the data set again") from None
    whole = train[0]
    for batch in train[1:]:
        whole += batch
    return DataSet(classes, whole, test, tables=(meta,), prompts=in_words(classes))


def _cifar_batch(path: Path, key: bytes) -> Split:
    batch = read_pickle(path)
    try:
        data, labels = batch[b"data"], np.array(batch[key], dtype=np.int64)
        pixels_NHWC = data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
        if pixels_NHWC.dtype != np.uint8 or len(pixels_NHWC) != len(labels):
            raise ValueError(f"{len(pixels_NHWC)} pictures of {pixels_NHWC.dtype} with {len(labels)} labels")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TriviumError(f"{path} is no batch of CIFAR ({error!r}): fetch the data set again") from None
    return Split(PictureArray([path], pixels_NHWC), labels)


def mnist(folder: Path) -> DataSet:
    """MNIST/raw/: IDX files, packed with gzip or not."""

    def split(name: str) -> Split:
        pictures, labels = _idx(folder, f"{name}-images-idx3-ubyte", 3), _idx(folder, f"{name}-labels-idx1-ubyte", 1)
        if len(pictures[1]) != len(labels[1]):
            raise TriviumError(
                f"{pictures[0]} holds {len(pictures[1])} pictures and {labels[0]} {len(labels[1])} labels"
            )
        return Split(PictureArray([pictures[0], labels[0]], pictures[1][..., None]), labels[1].astype(np.int64))

    return DataSet(tuple("0123456789"), split("train"), split("t10k"), prompts=tuple("0123456789"))


def _idx(folder: Path, name: str, dimensions: int) -> tuple[Path, np.ndarray]:
    """An IDX file of unsigned bytes: two zero bytes, 8, the number of dimensions, each as 32 bits, then the values."""
    path = next((file for file in (folder / name, folder / f"{name}.gz") if file.exists()), folder / name)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", data)
        values = np.frombuffer(data, np.uint8, offset=4 * (1 + dimensions))
        if magic != 0x800 + dimensions:
            raise ValueError(f"it begins with {magic:#x}")
        return path, values.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise TriviumError(f"{path} is no IDX file of {dimensions} dimensions ({error}): fetch it again") from None


def stl10(folder: Path) -> DataSet:
    """stl10_binary/: the labelled training set whole; its unlabelled pictures are left alone."""
    classes = tuple(lines_of(folder / "class_names.txt"))

    def split(name: str) -> Split:
        pixels, labels = folder / f"{name}_X.bin", folder / f"{name}_y.bin"
        try:
            columns = np.memmap(pixels, np.uint8, "r").reshape(-1, 3, STL_SIDE, STL_SIDE)
            numbers = np.fromfile(labels, np.uint8).astype(np.int64) - 1
            if len(columns) != len(numbers):
                raise ValueError(f"{len(columns)} pictures and {len(numbers)} labels")
        except (OSError, ValueError) as error:
            raise TriviumError(f"{pixels} and {labels.name} do not hold STL-10 ({error}): fetch them again") from None
        return Split(PictureArray([pixels, labels], columns.transpose(0, 3, 2, 1)), numbers)

    return DataSet(
        classes, split("train"), split("test"), tables=(folder / "class_names.txt",), prompts=in_words(classes),
        splits="the official splits, all 5,000 training pictures at once and not ten folds of 1,000",
    )  # fmt: skip


def fer2013(folder: Path) -> DataSet:
    """fer2013/: fer2013.csv or icml_face_data.csv with a column Usage, or train/<emotion>/ and test/<emotion>/."""
    table = next((folder / name for name in ("fer2013.csv", "icml_face_data.csv") if (folder / name).exists()), None)
    if table is not None:
        return _fer_table(table)
    splits, classes = [], []
    for name in ("train", "test"):
        if not (folder / name).is_dir():
            raise TriviumError(f"{folder} holds neither fer2013.csv nor the folders train and test: unpack it again")
        found, names, labels = in_classes(folder / name)
        splits.append(Split(PictureFiles(folder / name, names), labels))
        classes.append(found)
    same_classes(classes[0], classes[1], folder)
    train, test = splits
    return DataSet(
        classes[0], train, test, prompts=tuple(map(_face, classes[0])),
        splits="train against test, which is the public and the private test set together",
    )  # fmt: skip


def _fer_table(path: Path) -> DataSet:
    pixels: dict[str, list[np.ndarray]] = {"Training": [], "PublicTest": [], "PrivateTest": []}
    labels: dict[str, list[int]] = {name: [] for name in pixels}
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        try:
            header = [name.strip() for name in next(lines, [])]
            emotion, usage, column = (header.index(name) for name in ("emotion", "Usage", "pixels"))
            for cells in lines:
                picture = np.array(cells[column].split(), dtype=np.uint8).reshape(FER_SIDE, FER_SIDE, 1)
                pixels[cells[usage].strip()].append(picture)
                labels[cells[usage].strip()].append(int(cells[emotion]))
        except (ValueError, IndexError, KeyError, OverflowError, csv.Error) as error:
            raise TriviumError(
                f"{path} (line {lines.line_num}) is no line of FER2013 ({error!r}): fetch it again"
            ) from None

    def split(*names: str) -> Split:
        pictures = [picture for name in names for picture in pixels[name]]
        if not pictures:
            raise TriviumError(f"{path} holds no row whose Usage is {names[0]}: fetch it again")
        numbers = np.array([label for name in names for label in labels[name]], dtype=np.int64)
        return Split(PictureArray([path], np.stack(pictures)), numbers)

    return DataSet(
        EMOTIONS, split("Training"), split("PublicTest", "PrivateTest"), prompts=tuple(map(_face, EMOTIONS)),
        splits="Training against PublicTest and PrivateTest together",
    )  # fmt: skip


def _face(emotion: str) -> str:
    return f"{'an' if emotion[0] in 'aeiou' else 'a'} {emotion} face"


def pcam(folder: Path) -> DataSet:
    """pcam/: HDF5 files, of which a picture is read when its turn comes. Needs h5py."""
    try:
        import h5py
    except ImportError:
        raise TriviumError(
            f"{folder}: PatchCamelyon is stored as HDF5, which h5py reads: pip install 'trivium[vision]'"
        ) from None

    def split(name: str) -> Split:
        files = [folder / f"camelyonpatch_level_2_split_{name}_{part}.h5" for part in "xy"]
        try:
            # Handles stay open: to open the file for each picture takes longer than the picture.
            pixels_NHWC, labels = (h5py.File(file, "r")[part] for file, part in zip(files, "xy", strict=True))
            if pixels_NHWC.ndim != 4 or pixels_NHWC.dtype != np.uint8 or len(pixels_NHWC) != len(labels):
                raise ValueError(f"pixels {pixels_NHWC.shape} of {pixels_NHWC.dtype}, labels {labels.shape}")
        except (OSError, KeyError, ValueError) as error:
            raise TriviumError(f"{files[0]} and {files[1].name} are no split of PatchCamelyon ({error})") from None
        return Split(PictureArray(files, pixels_NHWC), np.asarray(labels).reshape(-1).astype(np.int64))

    classes = ("healthy lymph node tissue", "lymph node tumor tissue")
    return DataSet(("normal", "tumor"), split("train"), split("test"), split("valid"), prompts=classes)
