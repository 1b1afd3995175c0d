"""Pictures on a disk, found by name or by web address, and pairs whose pictures lie there.

A picture lies in a folder, as a member of a tar shard or as a cell of a Parquet file; the last two, and folders with
photo.json beside photo.jpg, are what img2dataset writes. Where something states the web address that a picture came
from (img2dataset does), the picture is found by that address; else by its file name, or key, without folder and suffix.
"""

from __future__ import annotations

import io
import json
import math
import os
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from trivium.data.decode import DecodeError, decode
from trivium.data.files import INDEX_SUFFIX, PICTURE_SUFFIXES, readable, walk
from trivium.data.parquet import ParquetFiles
from trivium.data.shards import open_index
from trivium.errors import TriviumError
from trivium.train.protocol import hash64

PICTURE_COLUMNS = ("jpg", "png", "webp")  # of img2dataset's Parquet files
CROP_QUALITY = 95  # of the JPEG of a part of a picture
WHOLE_FILE = -1


class Place(NamedTuple):
    """Where the bytes of a picture are."""

    file: str
    offset: int  # in a tar shard; the row of a Parquet file
    length: int  # WHOLE_FILE: the file is the picture, or the row holds it


class Pictures:
    """The pictures below some paths: folders, tar shards and Parquet files. 40 bytes of memory for each.

    Raises TriviumError for a path that does not exist or holds no picture, and for two pictures of one name.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.notes: list[str] = []  # one sentence for each thing that a tar shard's index leaves out
        self._files: list[str] = []
        self._keys, self._places = array("Q"), array("q")  # a place: number of the file, offset, length, named or not
        for path in paths:
            before = len(self._keys)
            self._add_path(path)
            if len(self._keys) == before:
                raise TriviumError(f"{path} holds no picture, neither in files nor in tar shards or Parquet files")
        keys, places = np.array(self._keys, np.uint64), np.array(self._places, np.int64).reshape(-1, 4)
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        first = np.concatenate(([True], keys[1:] != keys[:-1]))
        twice = np.flatnonzero(~first & (places[:, 3] == 1))
        if len(twice):
            one, other = (self._files[int(places[row, 0])] for row in (twice[0] - 1, twice[0]))
            raise TriviumError(
                f"two pictures have the same name, in {one} and {other}: give the folder of one, or pictures whose "
                "web address stands beside them"
            )
        self._sorted, self._found = keys[first], places[first]

    def find(self, url: str | None, names: Sequence[str]) -> Place | None:
        """The picture that came from an address, or has one of some names."""
        for key in ([] if url is None else [hash64("url", url)]) + [hash64("name", name) for name in names]:
            row = int(np.searchsorted(self._sorted, np.uint64(key)))
            if row < len(self._sorted) and int(self._sorted[row]) == key:
                file, offset, length, _ = map(int, self._found[row])
                return Place(self._files[file], offset, length)
        return None

    def _add_path(self, path: str) -> None:
        if os.path.isdir(path):
            inside = sorted(walk(path))
            stated = {file for file in inside if file.endswith(".json")}
            for file in inside:
                self._add_file(f"{path}/{file}", os.path.splitext(file)[0] + ".json" in stated)
        elif os.path.exists(path):
            self._add_file(path, False)
        else:
            raise TriviumError(f"{path} does not exist: check the path (seen from {os.getcwd()})")

    def _add_file(self, file: str, stated: bool) -> None:
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in PICTURE_SUFFIXES:
            url = None
            if stated:
                with open(f"{stem}.json", "rb") as facts:
                    url = _stated_url(facts.read())
            self._add(file, url, readable(os.path.basename(stem)), 0, WHOLE_FILE)
        elif suffix == ".tar":
            self._add_tar(file)
        elif suffix == ".parquet" and not file.endswith(INDEX_SUFFIX):
            self._add_parquet(file)

    def _add_tar(self, file: str) -> None:
        index = open_index(file)
        self.notes += json.loads(index.schema.metadata[b"notes"])
        columns = [index[name].to_pylist() for name in ("key", "image_offset", "image_length")]
        records = [index[name].to_pylist() for name in ("json_offset", "json_length")]
        with open(file, "rb") as shard:
            for key, offset, length, begin, size in zip(*columns, *records, strict=True):
                if offset is not None:
                    url = None
                    if begin is not None:
                        shard.seek(begin)
                        url = _stated_url(shard.read(size))
                    self._add(file, url, key.rsplit("/", 1)[-1], offset, length)

    def _add_parquet(self, file: str) -> None:
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise TriviumError(f"{file} is no readable Parquet file: {error}") from None
        column = picture_column(table.schema_arrow.names)
        if column is None or not {"url", "key"} & set(table.schema_arrow.names):
            return  # it lists what a shard beside it holds
        wanted = [name for name in ("url", "key", column) if name in table.schema_arrow.names]
        row = 0
        for batch in table.iter_batches(1000, columns=wanted):
            there = batch[column].is_valid().to_pylist()
            names = {name: batch[name].to_pylist() for name in wanted if name != column}
            for number, has_picture in enumerate(there):
                if has_picture:
                    url, key = (names[name][number] if name in names else None for name in ("url", "key"))
                    self._add(file, url, str(key), row + number, WHOLE_FILE)
            row += len(batch)

    def _add(self, file: str, url: str | None, name: str, offset: int, length: int) -> None:
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        self._keys.append(hash64("name", name) if url is None else hash64("url", url))
        self._places.extend((len(self._files) - 1, offset, length, url is None))


def picture_column(names: Sequence[str]) -> str | None:
    return next((name for name in PICTURE_COLUMNS if name in names), None)


def _stated_url(facts: bytes) -> str | None:
    try:
        record = json.loads(facts)
    except (ValueError, RecursionError):
        return None
    url = record.get("url") if isinstance(record, dict) else None
    return url if isinstance(url, str) else None


# ------------------------------------------------------------------------------------------------ joined pairs


JOINED = pa.schema(
    [
        ("caption", pa.string()),
        ("annotation", pa.string()),  # the file, and the entry in it
        ("entry", pa.string()),
        ("file", pa.string()),  # and what else a Place holds
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("box", pa.list_(pa.float64())),  # left, top, right, bottom as shares of width and height; null: all of it
    ]
)


class PicturePairs(ParquetFiles):
    """The rows of a Parquet file of JOINED pairs. A row with a box has that part of its picture, as a JPEG."""

    def __init__(self, path: str) -> None:
        super().__init__([path], "text", text_column="caption")
        self.kind = "pairs"
        self._table: ParquetFiles | None = None  # the Parquet file of pictures that was read last
        self._whole: tuple[Place | None, np.ndarray | None] = (None, None)  # the last picture that a part was cut from

    def where(self, row: int) -> tuple[str, str]:
        return self.cell(row, "annotation"), self.cell(row, "entry")

    def picture(self, row: int) -> bytes:
        box = self.cell(row, "box")
        return self._bytes(row) if box is None else self._part(row, box)

    def identity(self, row: int) -> str:
        file, *inside = self._place(row)
        return "\n".join((os.path.abspath(file), str(inside), str(self.cell(row, "box"))))

    def _place(self, row: int) -> Place:
        return Place(*(self.cell(row, name) for name in Place._fields))

    def _bytes(self, row: int) -> bytes:
        """Raises BadSample."""
        file, offset, length = self._place(row)
        if file.endswith(".parquet"):
            if self._table is None or self._table.paths != [file]:
                column = picture_column(pq.read_schema(file).names)
                self._table = ParquetFiles([file], "images", image_column=column)
            return self._table.picture(offset)
        if length == WHOLE_FILE:
            return self.picture_file(row, file)
        try:
            with open(file, "rb") as shard:
                shard.seek(offset)
                data = shard.read(length)
        except OSError as error:
            raise self.bad(row, f"its picture in {file} cannot be read: {error}") from None
        if not data or len(data) < length:
            raise self.bad(row, f"its picture in {file} is empty or cut short")
        return data

    def _part(self, row: int, box: Sequence[float]) -> bytes:
        """Raises BadSample."""
        place = self._place(row)
        if self._whole[0] != place:
            try:
                self._whole = (place, decode(self._bytes(row)))
            except DecodeError as error:
                raise self.bad(row, f"its picture {place.file}: {error}") from None
        pixels_HWC = self._whole[1]
        assert pixels_HWC is not None
        height, width, _ = pixels_HWC.shape
        # Shares are rounded numbers: what was a whole number of pixels is one again.
        left, top = (math.floor(share * size + 1e-6) for share, size in zip(box[:2], (width, height), strict=True))
        right, bottom = (math.ceil(share * size - 1e-6) for share, size in zip(box[2:], (width, height), strict=True))
        buffer = io.BytesIO()
        Image.fromarray(pixels_HWC[top:bottom, left:right]).save(buffer, "JPEG", quality=CROP_QUALITY)
        return buffer.getvalue()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_table": None, "_whole": (None, None)}
