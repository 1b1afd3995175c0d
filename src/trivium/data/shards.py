"""Samples in tar shards (the WebDataset layout: members of one sample share a name up to the first dot).

A shard is read through a sidecar index, ``shard.tar.index.parquet``: the key of each sample, and offset, length and
checksum of its members, the length of its caption and the size of its picture. It is built at first use, beside the
shard or, where that cannot be written, in a cache folder; it is built again when the shard's size or time has changed.

A shard may stand at an address (``remote.py``). Its index is fetched from beside it, or built by reading it once in
pieces, and kept in the cache folder; then only the members that are asked for are read. What a network garbled is read
again; where that does not help, the sample is a bad one and not asked for again. A shard that cannot be read at all has
bad samples alone, and so has one with GARBLED_LIMIT of them: what is served there is something else.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trivium.data.decode import DecodeError, picture_size
from trivium.data.files import (
    INDEX_SUFFIX,
    PICTURE_LIMIT,
    PICTURE_SUFFIXES,
    Kind,
    RandomFile,
    RowSource,
    open_file,
    readable,
)
from trivium.data.remote import RemoteFile, beside, is_remote, without_query
from trivium.data.tables import TEXT_COLUMNS
from trivium.errors import BadSample, TriviumError
from trivium.manifest import file_beside
from trivium.train.protocol import Blocks, hash64

PARTS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "text", "json": "json", "cls": "cls"}
LIMITS = {"image": PICTURE_LIMIT, "text": 2**26, "json": 2**26, "cls": 2**10}  # bytes of a member that is read
HEADER_LIMIT = 2**20  # bytes of one header with its long names
OPEN_SHARDS = 64  # file handles and indexes that a process keeps
OPENED_AT_ONCE = 16  # when a source begins: servers' answers are waited for together
SIDECAR_LIMIT = 2**30  # bytes of an index that is fetched
GARBLED_LIMIT = 3  # samples of a shard at an address whose bytes stay wrong: then all of it is lost
ABSENT = -1  # stands for null once an index is open
SIDECAR = INDEX_SUFFIX.removeprefix(".tar")
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
    """The index of a shard: read from its sidecar, or built and, where possible, written.

    The metadata holds ``notes``, a JSON list of sentences on what was left out. Raises TriviumError where it is no tar
    file, OSError where it cannot be read. A shard at an address that was indexed and is gone keeps its index.
    """
    file = open_file(shard)
    try:
        size, version = file.facts()
    except OSError as error:
        index = next(itertools.chain(_sidecars(shard), _fetched(shard)), None) if is_remote(shard) else None
        if index is None:
            raise
        note = f"{error}: its {index.num_rows:,} samples are replaced by others"
        return _with_metadata(index, notes=json.dumps([note]))
    stamp = f"{FORMAT} {size} {version}"
    for index in _sidecars(shard):
        if index.schema.metadata[b"stamp"].decode() == stamp:
            return index
    for index in _fetched(shard):
        # The date and the tag of a file belong to its server: whoever packed it knew only its size. Of what is read
        # later, every member has its checksum.
        if index.schema.metadata[b"stamp"].split()[1] == str(size).encode():
            index = _with_metadata(index, stamp=stamp)
            _write_sidecar(_cached(shard), index)
            return index
    with file.stream() as stream:
        index = _with_metadata(_build_index(shard, stream), stamp=stamp)
    local = [] if is_remote(shard) else [Path(f"{shard}{SIDECAR}")]
    any(_write_sidecar(sidecar, index) for sidecar in (*local, _cached(shard)))
    return index


def _sidecars(shard: str) -> Iterator[pa.Table]:
    """The indexes of a shard that lie on this machine, whether they still fit it or not."""
    paths = [_cached(shard)] if is_remote(shard) else [Path(f"{shard}{SIDECAR}"), _cached(shard)]
    yield from (index for path in paths if (index := _read_sidecar(path)) is not None)


def _fetched(shard: str) -> Iterator[pa.Table]:
    """The index that is served beside a shard, where it stands at an address and there is one."""
    if not is_remote(shard):
        return
    try:
        data = RemoteFile(beside(shard, SIDECAR)).read(0, SIDECAR_LIMIT)
    except OSError:
        return
    if (index := _read_sidecar(pa.BufferReader(data))) is not None:
        yield index


def _cached(shard: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium" / "shards"
    return folder / f"{hash64(_identity(shard)):016x}{SIDECAR}"


def _identity(shard: str) -> str:
    return without_query(shard) if is_remote(shard) else readable(os.path.abspath(shard))


def _with_metadata(index: pa.Table, **changes: str) -> pa.Table:
    metadata = {**(index.schema.metadata or {}), **{name.encode(): text.encode() for name, text in changes.items()}}
    return index.replace_schema_metadata(metadata)


def _read_sidecar(path: Path | pa.BufferReader) -> pa.Table | None:
    """An index of this FORMAT; None where there is none, or something else."""
    try:
        with pq.ParquetFile(path) as file:  # twice as fast as pq.read_table, and there may be thousands
            index = file.read(use_threads=False)
    except (pa.ArrowException, OSError, UnicodeEncodeError):  # the last where the path is not UTF-8
        return None
    metadata = index.schema.metadata or {}
    stamp = metadata.get(b"stamp", b"").split()
    if not index.schema.equals(SCHEMA) or len(stamp) < 2 or stamp[0] != FORMAT.encode() or index["key"].null_count:
        return None
    try:
        return index if isinstance(json.loads(metadata[b"notes"]), list) else None
    except (KeyError, ValueError, RecursionError):
        return None


def _write_sidecar(path: Path, index: pa.Table) -> bool:
    """A reader meets the whole index or none. False where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as beside:
            pq.write_table(index, beside)
    except (OSError, UnicodeEncodeError):
        return False
    return True


def _build_index(shard: str, file: BinaryIO) -> pa.Table:
    samples: dict[str, dict[str, Any]] = {}
    left_out: Counter[str] = Counter()
    others: list[str] = []  # keys of pictures that are no part of ours: a mask beside its photo, or a photo unread
    for name, offset, length in _members(shard, file, left_out):
        folder, _, base = name.removeprefix("./").rpartition("/")
        stem, _, suffix = base.partition(".")
        part = PARTS.get(suffix.lower())
        if not stem:  # the twin that macOS writes beside each file
            continue
        key = f"{folder}/{stem}" if folder else stem
        if part is None:
            if base.lower().endswith(PICTURE_SUFFIXES):
                others.append(key)
            continue
        sample = samples.setdefault(key, {"key": key})
        if f"{part}_offset" in sample:
            left_out["a second member for the same part of a sample"] += 1
            continue
        sample |= {f"{part}_offset": offset, f"{part}_length": length}
        if length <= LIMITS[part]:
            file.seek(offset)
            data = file.read(length)
            sample |= {f"{part}_crc32": zlib.crc32(data), **_measures(part, data)}
    if unread := sum("image_offset" not in samples.get(key, {}) for key in others):
        left_out["a picture that is not named key.jpg, .jpeg, .png or .webp, without another dot"] = unread
    notes = [f"{shard}: left out {count} x {what}" for what, count in left_out.items()]
    return _with_metadata(pa.Table.from_pylist(list(samples.values()), SCHEMA), notes=json.dumps(notes))


def _members(shard: str, file: BinaryIO, left_out: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """Name as `readable` makes it, offset and length of each ordinary member. What is left out is counted, by its
    reason."""
    headers = _Headers(file)
    try:
        archive = tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:")  # noqa: SIM115  (the file is the caller's)
    except (tarfile.TarError, OSError) as error:
        raise TriviumError(
            f"{shard} is no tar file ({error}); a compressed one must be unpacked to .tar first"
        ) from None
    end = 0
    while True:
        headers.left = HEADER_LIMIT
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
            yield readable(member.name), member.offset_data, member.size
    # tarfile ends at a broken header as it does at the closing block of zeros, so look which it was.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        left_out["the rest: it is cut short or damaged"] += 1


class _Headers:
    """A tar file as `tarfile` walks through it. A header may claim a long name of gigabytes, and `tarfile` would read
    them: here one header has no more than HEADER_LIMIT."""

    def __init__(self, file: BinaryIO) -> None:
        self.left = HEADER_LIMIT
        self.read_file, self.seek, self.tell = file.read, file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"a header of more than {HEADER_LIMIT:,} bytes")
        return self.read_file(size)


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
        self._open: OrderedDict[int, tuple[RandomFile | RemoteFile, dict[str, Any]]] = OrderedDict()
        self._lost: dict[int, str] = {}  # shards that this process could not read, and why: they are not asked again
        self._garbled: dict[int, dict[int, str]] = {}  # of shards at an address: rows whose bytes stay wrong, and why
        self._rows: list[Sequence[int]] = []  # of each shard: which rows of its index are samples
        self._sizes: list[int] = []  # of each shard: rows of its index
        lengths = []
        whole = False
        for index in self._indexes():
            self.notes += json.loads(index.schema.metadata[b"notes"])
            has_image = index["image_offset"].is_valid().to_numpy()
            has_text = index["text_offset"].is_valid().to_numpy() | index["json_offset"].is_valid().to_numpy()
            wanted = {"pairs": has_image | has_text, "images": has_image, "text": has_text}[kind]
            whole |= bool((has_image & has_text).any())
            self._rows.append(range(len(wanted)) if wanted.all() else np.flatnonzero(wanted))  # type: ignore[arg-type]
            self._sizes.append(index.num_rows)
            lengths.append(index["caption_length"].fill_null(0).to_numpy()[wanted].astype(np.int32))
        self._starts = np.cumsum([0, *map(len, self._rows)])
        self._lengths = np.concatenate(lengths)
        if not len(self) or (kind == "pairs" and not whole):
            lack = {"pairs": "a picture and its text (.txt or .json)", "images": "a picture", "text": "a text"}[kind]
            raise TriviumError(
                f"no sample in {', '.join(map(without_query, self.paths))} has {lack}: its members must be named as"
                " key.jpg, key.txt" + "".join(f"; {note}" for note in self.notes[:1])
            )

    def _indexes(self) -> Iterator[pa.Table]:
        """The index of each shard; an empty one, and a note, for one at an address that was never read."""

        def opened(path: str) -> pa.Table:
            try:
                return open_index(path)
            except OSError as error:
                if not is_remote(path):
                    raise TriviumError(f"{path} cannot be read: {error}") from None
                note = f"{error}: left out, and nobody knows how many samples it held"
                return _with_metadata(SCHEMA.empty_table(), notes=json.dumps([note]))

        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            yield from pool.map(opened, self.paths)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blocks(self) -> Sequence[range]:
        return Blocks(self._starts[np.diff(self._starts, prepend=-1) > 0])  # none for a shard without a sample

    def lengths(self) -> Sequence[int] | None:
        return None if self.kind == "images" else self._lengths  # type: ignore[return-value]  # an array serves

    def where(self, row: int) -> tuple[str, str]:
        return readable(without_query(self.paths[self._shard(row)])), self._fact(row, "key")

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
        if checksum == ABSENT:
            return "\n".join((_identity(self.paths[self._shard(row)]), self._fact(row, "key")))
        return f"{checksum} {self._fact(row, 'image_length')}"

    def label(self, row: int) -> int | None:
        data = self._part(row, "cls")
        return int(data) if data is not None and data.strip().isdigit() else None

    def _part(self, row: int, part: str) -> bytes | None:
        """The bytes of a member, checked. Raises BadSample."""
        offset, length = int(self._fact(row, f"{part}_offset")), int(self._fact(row, f"{part}_length"))
        if offset == ABSENT:
            return None
        if min(offset, length) < 0:
            raise self.bad(row, f"the index of its shard is damaged: remove {self.where(row)[0]}{SIDECAR}")
        if length > LIMITS[part]:
            raise self.bad(row, f"its {part} has {length:,} bytes, more than {LIMITS[part]:,}")
        shard = self._shard(row)
        if why := self._garbled.get(shard, {}).get(row):
            raise self.bad(row, why)
        for _ in range(2):  # what a network garbled may be right the second time
            try:
                data = self._opened(shard)[0].read(offset, offset + length)
            except OSError as error:
                raise self._lose(shard, error) from None
            if len(data) == length and zlib.crc32(data) == self._fact(row, f"{part}_crc32"):
                return data
        if len(data) < length:
            raise self.bad(row, f"the shard ends inside its {part}: it was cut short")
        why = f"its {part} is not what was indexed (checksum): the shard is damaged"
        if is_remote(self.paths[shard]):
            garbled = self._garbled.setdefault(shard, {})
            garbled[row] = why
            if len(garbled) == GARBLED_LIMIT:
                raise self._lose(shard, f"{GARBLED_LIMIT} of its samples are not what was indexed (checksum)")
        raise self.bad(row, why)

    def _fact(self, row: int, column: str) -> Any:
        shard = self._shard(row)
        return self._opened(shard)[1][column][int(self._rows[shard][row - self._starts[shard]])]

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _opened(self, shard: int) -> tuple[RandomFile | RemoteFile, dict[str, Any]]:
        """A shard and its index by column, kept while it is among the last ones read. Raises BadSample."""
        if shard in self._lost:
            raise BadSample(without_query(self.paths[shard]), "", self._lost[shard])
        if shard not in self._open:
            try:
                index = open_index(self.paths[shard])
            except OSError as error:
                raise self._lose(shard, error) from None
            if index.num_rows != self._sizes[shard]:
                raise TriviumError(f"{self.paths[shard]} was changed while it was in use: start again")
            facts = {name: index[name].fill_null(ABSENT).to_numpy() for name in index.column_names if name != "key"}
            facts["key"] = index["key"].to_pylist()
            self._open[shard] = (open_file(self.paths[shard]), facts)
        self._open.move_to_end(shard)
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]

    def _lose(self, shard: int, why: OSError | str) -> BadSample:
        """From here on every sample of the shard is bad: a server that does not answer is not waited for again. Noted
        once."""
        self._lost[shard] = f"the shard cannot be read ({why})"
        bad = BadSample(without_query(self.paths[shard]), "", self._lost[shard])
        self.notes.append(f"{bad}: its {len(self._rows[shard]):,} samples are replaced by others")
        return bad

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_open": OrderedDict(), "_lost": {}, "_garbled": {}}
