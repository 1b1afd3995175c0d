"""The labelled pictures of an evaluation data set, whatever they are stored as.

N pictures, H height, W width, C channels.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.io import loadmat

from trivium.data.decode import DecodeError, decode
from trivium.data.files import PICTURE_LIMIT, PICTURE_SUFFIXES
from trivium.data.parquet import ParquetFiles
from trivium.data.shards import TarShards
from trivium.errors import BadSample, TriviumError, UnreadableNow
from trivium.train.protocol import uniform64

SUFFIXES = (*PICTURE_SUFFIXES, ".ppm")


class Pictures(Protocol):
    """Read by row; a row is cheap to read in any order, and by several threads at once."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """The same in every copy of the data set that has the same layout; what outcomes are kept under."""
        ...

    def read(self, row: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises BadSample."""
        ...

    def files(self) -> Iterable[Path]:
        """Every file that is read: their sizes and times tell whether a cached figure still holds."""
        ...


class PictureFiles:
    """Pictures that are a file each, below one folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return self.names[row]

    def read(self, row: int) -> np.ndarray:
        path = self.folder / self.names[row]
        try:
            if path.stat().st_size > PICTURE_LIMIT:
                raise BadSample(str(path), "", f"it has more than {PICTURE_LIMIT:,} bytes")
            return decode(path.read_bytes())
        except FileNotFoundError:
            raise BadSample(str(path), "", "it does not exist") from None
        except OSError as error:
            raise UnreadableNow(str(path), "", f"it cannot be read ({error.strerror})") from None
        except DecodeError as error:
            raise BadSample(str(path), "", str(error)) from None

    def files(self) -> Iterable[Path]:
        return (self.folder / name for name in self.names)


class PictureArray:
    """Pixels that one or several files hold uncompressed: uint8 [N, H, W, C], one channel for grey or three."""

    def __init__(self, of: Sequence[Path], pixels_NHWC: Any) -> None:
        self.of, self.pixels_NHWC = list(of), pixels_NHWC

    def __len__(self) -> int:
        return len(self.pixels_NHWC)

    def name(self, row: int) -> str:
        return f"{self.of[0].name} {row}"

    def read(self, row: int) -> np.ndarray:
        try:
            pixels_HWC = np.asarray(self.pixels_NHWC[row])
        except OSError as error:  # HDF5 reads a picture when its turn comes
            raise UnreadableNow(str(self.of[0]), f"row {row}", f"it cannot be read ({error})") from None
        return np.ascontiguousarray(np.broadcast_to(pixels_HWC, (*pixels_HWC.shape[:2], 3)))

    def files(self) -> Iterable[Path]:
        return self.of


class EncodedPictures:
    """Encoded pictures in a column of Parquet files: bytes, or a struct with `bytes` in it. The row groups that were
    read last are in memory, so rows in order, or nearly, are cheap, and others cost a row group each."""

    def __init__(self, source: ParquetFiles, column: str) -> None:
        self.source, self.column = source, column
        self._one_at_a_time = threading.Lock()  # so threads that want the same row group read it once

    def __reduce__(self) -> tuple[type[EncodedPictures], tuple[ParquetFiles, str]]:
        return EncodedPictures, (self.source, self.column)  # a lock does not go to another process

    def __len__(self) -> int:
        return len(self.source)

    def name(self, row: int) -> str:
        return f"{Path(self.source.paths[0]).name} {row}"

    def read(self, row: int) -> np.ndarray:
        with self._one_at_a_time:
            cell = self.source.cell(row, self.column)
        data = cell["bytes"] if isinstance(cell, dict) else cell
        try:
            return decode(data or b"")
        except DecodeError as error:
            raise BadSample(*self.source.where(row), str(error)) from None

    def files(self) -> Iterable[Path]:
        return map(Path, self.source.paths)


class ShardPictures:
    """Pictures in tar shards."""

    def __init__(self, shards: TarShards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, row: int) -> str:
        file, key = self.shards.where(row)  # every split numbers its shards from 0: its folder is part of the name
        return f"{Path(file).parent.name}/{Path(file).name} {key}"

    def read(self, row: int) -> np.ndarray:
        try:
            return decode(self.shards.picture(row))
        except DecodeError as error:
            raise BadSample(*self.shards.where(row), str(error)) from None

    def files(self) -> Iterable[Path]:
        return map(Path, self.shards.paths)


@dataclass(frozen=True)
class Some:
    """Some rows of other pictures."""

    pictures: Pictures
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        return self.pictures.name(int(self.rows[row]))

    def read(self, row: int) -> np.ndarray:
        return self.pictures.read(int(self.rows[row]))

    def files(self) -> Iterable[Path]:
        return self.pictures.files()


@dataclass(frozen=True)
class Joined:
    """Pictures one after another."""

    parts: tuple[Pictures, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _find(self, row: int) -> tuple[Pictures, int]:
        for part in self.parts:
            if row < len(part):
                return part, row
            row -= len(part)
        raise IndexError(row)

    def name(self, row: int) -> str:
        part, row = self._find(row)
        return part.name(row)

    def read(self, row: int) -> np.ndarray:
        part, row = self._find(row)
        return part.read(row)

    def files(self) -> Iterable[Path]:
        return (file for part in self.parts for file in part.files())


# ----------------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Split:
    """Pictures with the number of their class, int64 [N]."""

    pictures: Pictures
    labels_N: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.pictures) == len(self.labels_N), "every picture has a label"

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, rows: np.ndarray) -> Split:
        return Split(Some(self.pictures, rows), self.labels_N[rows])

    def __add__(self, other: Split) -> Split:
        return Split(Joined((self.pictures, other.pictures)), np.concatenate([self.labels_N, other.labels_N]))


@dataclass(frozen=True)
class DataSet:
    """A classification data set as it lies on the disk.

    Without an official validation split `validation` is None; `held_out` then takes a part of the training split.
    """

    classes: tuple[str, ...]  # as the files name them, by label
    train: Split
    test: Split
    validation: Split | None = None
    tables: tuple[Path, ...] = ()  # lists, annotations: what was read beside the pictures
    splits: str = "the official splits"  # which ones these are
    prompts: tuple[str, ...] = ()  # classes in words, for zero-shot, by label; none: the files have no words for them
    templates: tuple[str, ...] = ()  # for zero-shot, with {} or {c} for the class; none: short ones of our own
    notes: tuple[str, ...] = ()  # what is odd about this copy, a sentence each

    @property
    def every(self) -> tuple[Split, ...]:
        return tuple(split for split in (self.train, self.validation, self.test) if split is not None)


def held_out(labels_N: np.ndarray, share: float = 0.2, seed: int = 0) -> np.ndarray:
    """A share of each class to choose C by, drawn with a fixed seed: bool [N]. Each class keeps one for training."""
    draws_N = uniform64(seed, np.arange(len(labels_N)))
    taken_N = np.zeros(len(labels_N), dtype=bool)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        taken_N[rows[np.argsort(draws_N[rows], kind="stable")[: int(share * len(rows))]]] = True
    return taken_N


def capped(split: Split, most: int | None, seed: int = 0) -> Split:
    """At most so many pictures of a split, drawn with a fixed seed; as it is where it has no more."""
    if most is None or len(split) <= most:
        return split
    draws_N = uniform64(seed + 1, np.arange(len(split)))
    return split[np.sort(np.argsort(draws_N, kind="stable")[:most])]


def with_rows(data: DataSet, most: int | None) -> DataSet:
    """Every split with at most so many pictures."""
    validation = None if data.validation is None else capped(data.validation, most)
    return replace(data, train=capped(data.train, most), validation=validation, test=capped(data.test, most))


# ---------------------------------------------------------------------------------- what the readers share


def in_classes(folder: Path) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Pictures in a folder for each class: the classes in order, the pictures' paths from `folder`, their labels [N].

    Raises TriviumError where there is none.
    """
    names: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    for inside in sorted(path for path in inside_of(folder) if path.is_dir() and not path.name.startswith(".")):
        found = sorted(path for path in inside.rglob("*") if path.suffix.lower() in SUFFIXES)
        if found:
            names += [path.relative_to(folder).as_posix() for path in found]
            labels += [len(classes)] * len(found)
            classes.append(inside.name)
    if not names:
        raise TriviumError(f"{folder} holds no pictures in folders named as their classes: unpack it again")
    return tuple(classes), names, np.array(labels, dtype=np.int64)


def inside_of(folder: Path) -> list[Path]:
    """What a folder holds. Raises TriviumError where it is not there."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise TriviumError(f"{folder} cannot be read ({error.strerror}): unpack the data set again") from None


def same_classes(one: Sequence[str], other: Sequence[str], where: Path) -> None:
    """Two splits number their classes by name. Raises TriviumError where the names differ."""
    if differ := sorted(set(one) ^ set(other)):
        raise TriviumError(
            f"{where}: the class {differ[0]} stands in one split and not in the other, so their labels would not agree:"
            " unpack the data set again"
        )


def lines_of(path: Path) -> list[str]:
    """The lines of a list, without those that are blank. Raises TriviumError."""
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise TriviumError(f"{path} cannot be read ({error.strerror}): unpack the data set again") from None
    except UnicodeDecodeError as error:
        raise TriviumError(f"{path} is no UTF-8 text ({error}): unpack the data set again") from None


def json_of(path: Path) -> Any:
    """What a JSON file holds. Raises TriviumError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TriviumError(f"{path} cannot be read ({error.strerror}): unpack the data set again") from None
    except ValueError as error:
        raise TriviumError(f"{path} is no JSON ({error}): fetch it again") from None


def mat_variable(path: Path, key: str) -> Any:
    """A variable of a .mat file, without dimensions of one. Raises TriviumError."""
    try:
        return loadmat(path, squeeze_me=True)[key]
    except OSError as error:
        raise TriviumError(f"{path} cannot be read ({error}): unpack the data set again") from None
    except KeyError:
        raise TriviumError(f"{path} holds no {key}: fetch it again from its owners") from None
    except Exception as error:  # scipy's reader raises nearly every type there is over damaged files
        raise TriviumError(f"{path} is no .mat file ({error!r}): fetch it again") from None


def parquet_split(files: Sequence[Path], image: str, label: str) -> Split:
    """A split of Parquet files: labels, which are numbers, at once; a picture, bytes or a struct with `bytes` in it,
    when its turn comes.

    Raises TriviumError.
    """
    labels: list[int] = []
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                kind = opened.schema_arrow.field(image).type
                if pa.types.is_struct(kind):
                    kind = kind.field("bytes").type
                if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                    raise TypeError(f"{image} holds {kind}")
                labels += map(int, opened.read(columns=[label])[label].to_pylist())
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise TriviumError(
                f"{file} does not hold pictures in {image} with numbers in {label} ({error}): fetch it again"
            ) from None
    pictures = EncodedPictures(ParquetFiles(files, "images", image), image)
    return Split(pictures, np.array(labels, dtype=np.int64))


def in_words(names: Iterable[str]) -> tuple[str, ...]:
    """Names of folders as words: "AnnualCrop" and "apple_pie" become "annual crop" and "apple pie"."""
    parted = (re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) for name in names)
    return tuple(" ".join(re.split(r"[_/\s]+", name)).strip().lower() for name in parted)
