"""Samples in tar shards (the WebDataset layout: members of one sample share a name up to the first dot).

A shard is read through a sidecar index, ``shard.tar.index.parquet``: the key of each sample, and offset, length and
checksum of its members, the length of its caption and the size of its picture. It is built at first use, beside the
shard or, where that cannot be written, in a cache folder; it is built again when the shard's size or time has changed.

Nothing is ever unpacked. Only members with a suffix on the list are looked at; links, devices, sparse members, absolute
names and names with ``..`` are left out, and ``notes`` says how many. A shard cut short keeps what came before.
"""

from __future__ import annotations

import itertools
import json
import os
import tarfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trivium.data.decode import DecodeError, picture_size
from trivium.data.files import PICTURE_LIMIT, Kind, RandomFile, RowSource
from trivium.data.tables import TEXT_COLUMNS
from trivium.errors import TriviumError
from trivium.manifest import file_beside
from trivium.train.protocol import hash64

PARTS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "text", "json": "json", "cls": "cls"}
LIMITS = {"image": PICTURE_LIMIT, "text": 2**26, "json": 2**26, "cls": 2**10}  # bytes of a member that is read
OPEN_SHARDS = 64  # file handles and indexes that a process keeps
ABSENT = -1  # stands for null once an index is open
FORMAT = "1"  # of the index; another number builds it anew
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        *((f"{part}_{fact}", pa.int64()) for part in LIMITS for fact in ("offset", "length", "crc32")),
        ("caption_length", pa.int64()),  # in characters
        ("height", pa.int64()),
        ("width", pa.int64()),
    ]
)


# --------------------------------------------------------------------------------------------------- index


def open_index(shard: str) -> pa.Table:
    """The index of a shard: read from its sidecar, or built and, where possible, written. Raises TriviumError.

    The metadata holds ``notes``, a JSON list of sentences on what was left out.
    """
    try:
        facts = os.stat(shard)
    except OSError as error:
        raise TriviumError(f"{shard} cannot be read: {error}") from None
    stamp = f"{FORMAT} {facts.st_size} {facts.st_mtime_ns}".encode()
    sidecars = (
        Path(f"{shard}.index.parquet"),
        _cache_folder() / f"{hash64(os.path.abspath(shard)):016x}.index.parquet",
    )
    for sidecar in sidecars:
        index = _read_sidecar(sidecar)
        if index is not None and index.schema.metadata.get(b"stamp") == stamp:
            return index
    index = _build_index(shard, stamp)
    any(_write_sidecar(sidecar, index) for sidecar in sidecars)
    return index


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium" / "shards"


def _read_sidecar(path: Path) -> pa.Table | None:
    try:
        index = pq.read_table(path, memory_map=False)
    except (pa.ArrowException, OSError):
        return None
    return index if index.schema.equals(SCHEMA) and index.schema.metadata else None


def _write_sidecar(path: Path, index: pa.Table) -> bool:
    """A reader meets the whole index or none. False where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as beside:
            pq.write_table(index, beside)
    except OSError:
        return False
    return True


def _build_index(shard: str, stamp: bytes) -> pa.Table:
    samples: dict[str, dict[str, Any]] = {}
    left_out: Counter[str] = Counter()
    with open(shard, "rb") as file:
        for name, offset, length in _members(shard, file, left_out):
            folder, _, base = name.removeprefix("./").rpartition("/")
            stem, _, suffix = base.partition(".")
            part = PARTS.get(suffix.lower())
            if part is None or not stem:  # no stem: the twin that macOS writes beside each file
                continue
            key = f"{folder}/{stem}" if folder else stem
            sample = samples.setdefault(key, {"key": key})
            if f"{part}_offset" in sample:
                left_out["a second member for the same part of a sample"] += 1
                continue
            sample |= {f"{part}_offset": offset, f"{part}_length": length}
            if length <= LIMITS[part]:
                file.seek(offset)
                data = file.read(length)
                sample |= {f"{part}_crc32": zlib.crc32(data), **_measures(part, data)}
    notes = [f"{shard}: left out {count} x {what}" for what, count in left_out.items()]
    metadata = {b"stamp": stamp, b"notes": json.dumps(notes).encode()}
    return pa.Table.from_pylist(list(samples.values()), SCHEMA.with_metadata(metadata))


def _members(shard: str, file: BinaryIO, left_out: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of each ordinary member. What is left out is counted, by its reason."""
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (the file is the caller's)
    except (tarfile.TarError, OSError) as error:
        raise TriviumError(
            f"{shard} is no tar file ({error}); a compressed one must be unpacked to .tar first"
        ) from None
    end = 0
    while True:
        try:
            member = archive.next()
        except Exception:  # tarfile raises many types over hostile headers
            left_out["the rest: it is cut short or damaged"] += 1
            return
        if member is None:
            break
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        if member.size < 0 or member.offset_data < end:
            left_out["the rest: a header points backwards"] += 1
            return
        end = member.offset_data + member.size
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            left_out["a link, device or sparse file"] += 1
        elif member.name.startswith("/") or ".." in member.name.split("/"):
            left_out["a name that leads out of the folder"] += 1
        else:
            yield member.name, member.offset_data, member.size
    # tarfile ends at a broken header as it does at the closing block of zeros, so look which it was.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        left_out["the rest: it is cut short or damaged"] += 1


def _measures(part: str, data: bytes) -> dict[str, int]:
    """What the index knows of a member without reading it again."""
    if part == "image":
        try:
            height, width = picture_size(data)
        except DecodeError:
            return {}
        return {"height": height, "width": width}
    text = data.decode("utf-8", "replace")
    if part == "json":
        texts = _json_captions(text, None)
        return {"caption_length": max(map(len, texts))} if texts else {}
    return {"caption_length": len(text.strip())} if part == "text" else {}


def _json_captions(text: str, column: str | None) -> list[str] | None:
    """The captions under `column`, or under the first usual name; None where there are none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    names = [column] if column is not None else TEXT_COLUMNS
    value = next((record[name] for name in names if name in record), None) if isinstance(record, dict) else None
    texts = value if isinstance(value, list) else [value]
    captions = [text for text in texts if isinstance(text, str)]
    return captions if captions and len(captions) == len(texts) else None


# -------------------------------------------------------------------------------------------------- shards


class TarShards(RowSource):
    """The samples of some tar shards, each shard a block. kind "images" and "text" skip samples that lack that part.

    The caption is the ``.txt``, or `text_column` of the ``.json``; the label a number in ``.cls``.
    """

    def __init__(self, paths: Sequence[str | Path], kind: Kind, text_column: str | None = None) -> None:
        self.kind = kind
        self.paths = [str(path) for path in paths]
        self.text_column = text_column
        self.notes: list[str] = []  # one sentence for each thing that an index leaves out
        self._open: OrderedDict[int, tuple[RandomFile, dict[str, Any]]] = OrderedDict()
        self._rows: list[np.ndarray] = []  # of each shard: which rows of its index are samples
        self._sizes: list[int] = []  # of each shard: rows of its index
        lengths = []
        whole = False
        for path in self.paths:
            index = open_index(path)
            self.notes += json.loads(index.schema.metadata[b"notes"])
            has_image = index["image_offset"].is_valid().to_numpy()
            has_text = index["text_offset"].is_valid().to_numpy() | index["json_offset"].is_valid().to_numpy()
            wanted = {"pairs": has_image | has_text, "images": has_image, "text": has_text}[kind]
            whole |= bool((has_image & has_text).any())
            self._rows.append(np.flatnonzero(wanted))
            self._sizes.append(index.num_rows)
            lengths.append(index["caption_length"].fill_null(0).to_numpy()[wanted])
        self._starts = np.cumsum([0, *map(len, self._rows)])
        self._lengths = np.concatenate(lengths)
        if not len(self) or (kind == "pairs" and not whole):
            lack = {"pairs": "a picture and its text (.txt or .json)", "images": "a picture", "text": "a text"}[kind]
            raise TriviumError(
                f"no sample in {', '.join(self.paths)} has {lack}: its members must be named as key.jpg, key.txt"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blocks(self) -> Sequence[range]:
        return [range(int(a), int(b)) for a, b in itertools.pairwise(self._starts) if a < b]

    def lengths(self) -> Sequence[int] | None:
        return None if self.kind == "images" else self._lengths  # type: ignore[return-value]  # an array serves

    def where(self, row: int) -> tuple[str, str]:
        return self.paths[self._shard(row)], self._fact(row, "key")

    def picture(self, row: int) -> bytes:
        data = self._part(row, "image")
        if data is None:
            raise self.bad(row, "it has no picture (.jpg, .jpeg, .png or .webp)")
        if not data:
            raise self.bad(row, "its picture has zero bytes")
        return data

    def captions(self, row: int) -> list[str]:
        text = self._part(row, "text") if self.text_column is None else None
        if text is not None:
            return [self.utf8(row, text)]
        record = self._part(row, "json")
        if record is None:
            raise self.bad(row, "it has no text (.txt or .json)")
        captions = _json_captions(self.utf8(row, record), self.text_column)
        if captions is None:
            raise self.bad(row, f"its .json has no text under {self.text_column or '|'.join(TEXT_COLUMNS)}")
        return captions

    def identity(self, row: int) -> str:
        """A picture is known by its bytes: one that stands in several samples, each with a caption, is one picture."""
        checksum = ABSENT if self.kind == "text" else self._fact(row, "image_crc32")
        return super().identity(row) if checksum == ABSENT else f"{checksum} {self._fact(row, 'image_length')}"

    def label(self, row: int) -> int | None:
        data = self._part(row, "cls")
        return int(data) if data is not None and data.strip().isdigit() else None

    def _part(self, row: int, part: str) -> bytes | None:
        """The bytes of a member, checked. Raises BadSample."""
        offset, length = self._fact(row, f"{part}_offset"), self._fact(row, f"{part}_length")
        if offset == ABSENT:
            return None
        if length > LIMITS[part]:
            raise self.bad(row, f"its {part} has {length:,} bytes, more than {LIMITS[part]:,}")
        data = self._opened(self._shard(row))[0].read(offset, offset + length)
        if len(data) < length:
            raise self.bad(row, f"the shard ends inside its {part}: it was cut short")
        if zlib.crc32(data) != self._fact(row, f"{part}_crc32"):
            raise self.bad(row, f"its {part} is not what was indexed (checksum): the shard is damaged")
        return data

    def _fact(self, row: int, column: str) -> Any:
        shard = self._shard(row)
        return self._opened(shard)[1][column][int(self._rows[shard][row - self._starts[shard]])]

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _opened(self, shard: int) -> tuple[RandomFile, dict[str, Any]]:
        """A shard and its index by column, kept while it is among the last ones read."""
        if shard not in self._open:
            index = open_index(self.paths[shard])
            if index.num_rows != self._sizes[shard]:
                raise TriviumError(f"{self.paths[shard]} was changed while it was in use: start again")
            facts = {name: index[name].fill_null(ABSENT).to_numpy() for name in index.column_names if name != "key"}
            facts["key"] = index["key"].to_pylist()
            self._open[shard] = (RandomFile(self.paths[shard]), facts)
        self._open.move_to_end(shard)
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_open": OrderedDict()}
