"""Samples from any source into tar shards that WebDataset users can read, each with its sidecar index.

    shard-000000.tar    000000000.jpg 000000000.txt 000000001.jpg 000000001.json 000000002.cls ...
    manifest.json       settings, sample counts, and for each file its bytes and sha256; written last
    skipped.jsonl       one line for each sample that could not be used, with the reason

The key of a sample is its row in the source; one caption stands in ``.txt``, several in ``.json`` as
``{"captions": [...]}``, a class in ``.cls``. A shard's bytes are a function of (source, settings, number of the shard):
headers have fixed times, owners and rights, and the shard itself has a fixed time, since its index is stamped with it.

The folder ``.packing`` holds what is under way and one record for each finished shard, which is how an interrupted run,
or another part of a job array, knows what is done. It may be removed when the manifest is there.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from trivium import manifest
from trivium.data.decode import DecodeError, decode
from trivium.data.files import INDEX_SUFFIX, Kind
from trivium.data.shards import open_index
from trivium.data.sources import open_source
from trivium.data.transforms import resize
from trivium.errors import BadSample, TriviumError
from trivium.manifest import file_beside, make_folder, sha256
from trivium.train.protocol import Sample, Source

FORMAT = 1  # of the shards: another number is another setting
SHARD_TIME = 946_684_800  # of the finished tar file: 2000-01-01, in seconds
SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}  # kept as they are
JPEG_SIDE = 65_500  # pixels at most: libjpeg writes no more
UNDER_WAY = ".packing"
Engine = Literal["local", "ray"]
Record = dict[str, Any]  # of one finished shard: {"files": {name: {bytes, sha256}}, "samples": 998, "skipped": [...]}


@dataclass(frozen=True)
class Settings:
    """What the shards are made from, and how."""

    kind: Kind
    paths: tuple[str, ...]
    image_column: str | None = None
    text_column: str | None = None
    shortest_side: int = 256  # pixels; larger pictures are made that small; 0 keeps every size
    quality: int = 90  # of the JPEGs that are written anew
    samples_per_shard: int = 1000  # rows; those that cannot be used leave their shard smaller

    def __post_init__(self) -> None:
        if self.shortest_side < 0:
            raise TriviumError(f"a shortest side of {self.shortest_side} pixels: give at least 1, or 0 to keep sizes")
        if not 1 <= self.quality <= 95:
            raise TriviumError(f"a JPEG quality of {self.quality}: it lies between 1 and 95")
        if self.samples_per_shard < 1:
            raise TriviumError(f"{self.samples_per_shard} samples to a shard: give at least 1")


@dataclass(frozen=True)
class Packed:
    """What a call of `pack` leaves behind."""

    made: int  # shards that this call wrote; the others were there
    of: int  # shards of this part
    samples: int  # in the shards of this part
    skipped: list[dict[str, Any]]  # of this part: {row, why}
    complete: bool  # all parts are done and manifest.json is written


def pack(
    settings: Settings,
    out: Path,
    *,
    source: Source | None = None,
    part: tuple[int, int] = (1, 1),
    workers: int = 1,
    engine: Engine = "local",
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write shards into the folder `out`; those that are finished already are left as they are.

    The source must stay as it is until all is packed.

    Args:
        source: the samples, where the settings' paths alone do not say how to read them.
        part: (k, n): the k-th of n shares of the shards, k from 1. Parts may run at the same time on any machines that
            see the folder; the one that ends last writes the manifest.
        workers: processes, for the engine "local".
        engine: "ray" spreads the shards over a Ray cluster whose machines all see the source and `out`.
        progress: called with the shards done and all shards of this part.

    Raises:
        TriviumError: `out` holds something else or shards of other settings, `part` is out of range, no sample can be
            used, the disk is full; finished shards stay.
    """
    number, parts = part
    if not 1 <= number <= parts:
        raise TriviumError(f"part {number}/{parts} is out of range: the first is 1/{parts}, the last {parts}/{parts}")
    if workers < 1:
        raise TriviumError(f"{workers} workers can do nothing: give at least 1")
    if engine == "ray":
        _ray()  # a missing package is told before there is a folder
    if source is None:
        source = open_source(
            settings.kind, settings.paths, image_column=settings.image_column, text_column=settings.text_column
        )
    described = json.loads(json.dumps({"format": FORMAT, **asdict(settings), "rows": len(source)}))
    total = -(-len(source) // settings.samples_per_shard)
    mine = range(total * (number - 1) // parts, total * number // parts)
    try:
        _refuse_other_things(out, described)
        with _at_work(out, total, described):
            todo = [shard for shard in mine if not _is_finished(out, shard)]
            make = partial(pack_shard, source, settings, out)
            for done, _ in enumerate(_run(make, todo, workers, engine), start=len(mine) - len(todo) + 1):
                if progress is not None:
                    progress(done, len(mine))
            records = [_read(_record_path(out, shard)) for shard in mine]
            complete = _finish(out, total, described)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise TriviumError(
                f"{out}: the disk is full or a limit on file size is reached ({error.strerror}); finished shards stay:"
                " free some space and run the same command again"
            ) from None
        raise
    return Packed(
        made=len(todo),
        of=len(mine),
        samples=sum(record["samples"] for record in records),
        skipped=[entry for record in records for entry in record["skipped"]],
        complete=complete,
    )


# ------------------------------------------------------------------------------------------------ one shard


def pack_shard(source: Source, settings: Settings, out: Path, shard: int) -> Record:
    """Make one shard, its index and its record; the same bytes whoever makes it, and whenever. Raises OSError."""
    name = shard_name(shard)
    staged = out / UNDER_WAY / name
    rows = range(len(source))[shard * settings.samples_per_shard : (shard + 1) * settings.samples_per_shard]
    samples = 0
    skipped = []
    with file_beside(staged) as beside, tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as archive:
        for row in rows:
            try:
                members = members_of(source.read(row, row), settings)
            except BadSample as error:
                skipped.append({"row": row, "why": str(error)})
                continue
            samples += 1
            for suffix, data in sorted(members.items()):
                _add(archive, f"{row:09d}.{suffix}", data)
    # The index is stamped with the time of its shard, so that must not be the time of day. Some file systems are
    # swept of what nobody has read for long: the time of reading stays true.
    os.utime(staged, (staged.stat().st_atime, SHARD_TIME))
    open_index(str(staged))
    index = staged.with_name(staged.name.removesuffix(".tar") + INDEX_SUFFIX)
    if not index.exists():
        raise OSError(errno.ENOSPC, "its index could not be written", str(index))
    record = {
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in (staged, index)},
        "samples": samples,
        "skipped": skipped,
    }
    for path in (index, staged):
        path.replace(out / path.name)
    with file_beside(_record_path(out, shard)) as beside:
        beside.write_text(json.dumps(record), encoding="utf-8")
    return record


def members_of(sample: Sample, settings: Settings) -> dict[str, bytes]:
    """The files of a sample by their suffix. Raises BadSample for what cannot be decoded or written."""
    members: dict[str, bytes] = {}
    if "image" in sample:
        try:
            suffix, data = packed_picture(sample["image"], settings.shortest_side, settings.quality)
        except DecodeError as error:
            raise BadSample(sample.get("name", "a picture"), "", str(error)) from None
        members[suffix] = data
    try:
        if "texts" in sample:
            members["json"] = json.dumps({"captions": sample["texts"]}, ensure_ascii=False).encode()
        elif "text" in sample:
            members["txt"] = sample["text"].encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        raise BadSample(sample.get("name", "a text"), "", "its text is no Unicode (a lone surrogate)") from None
    if "label" in sample:
        members["cls"] = str(sample["label"]).encode()
    return members


def packed_picture(data: bytes, shortest_side: int, quality: int) -> tuple[str, bytes]:
    """Suffix and bytes: those given where the picture is small enough and a JPEG, PNG or WebP; else a JPEG of it.

    Every picture is decoded, so that none that is damaged gets in. Raises DecodeError.
    """
    pixels_HWC = decode(data)
    height, width, _ = pixels_HWC.shape
    suffix = next((suffix for start, suffix in SIGNATURES.items() if data.startswith(start)), None)
    shrinks = 0 < shortest_side < min(height, width)
    if suffix is not None and not shrinks:
        return suffix, data
    if shrinks:
        scale = shortest_side / min(height, width)
        pixels_HWC = resize(pixels_HWC, (round(height * scale), round(width * scale)))
    height, width, _ = pixels_HWC.shape
    if max(height, width) > JPEG_SIDE:
        raise DecodeError(f"as a JPEG it would have {width:,} x {height:,} pixels: no side may have over {JPEG_SIDE:,}")
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=quality)
    return "jpg", buffer.getvalue()


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time, owner and group are 0 and nobody
    member.size, member.mode = len(data), 0o644
    archive.addfile(member, io.BytesIO(data))


# -------------------------------------------------------------------------------------------------- engines


def _run(make: Callable[[int], Record], shards: Sequence[int], workers: int, engine: Engine) -> Iterable[Any]:
    """Make the shards, in any order; yields once for each that is done."""
    if engine == "ray":
        return _on_ray(make, shards)
    if workers == 1 or len(shards) < 2:
        return map(make, shards)
    return _in_pool(make, shards, min(workers, len(shards)))


def _in_pool(make: Callable[[int], Record], shards: Sequence[int], workers: int) -> Iterator[Any]:
    # Spawned, not forked: the threads of pyarrow and torch do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker, initargs=(make,))
    try:
        yield from pool.map(_make_in_worker, shards)
    except BrokenProcessPool:
        raise TriviumError(
            "a worker was killed, often because memory ran out: run the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(make: Callable[[int], Record]) -> None:
    global _make
    _make = make

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # a parent that was killed leaves no worker behind

    threading.Thread(target=follow, daemon=True).start()


def _make_in_worker(shard: int) -> None:
    _make(shard)


_make: Callable[[int], Record]  # of a worker


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise TriviumError(f"the engine ray is not installed ({error}): pip install 'trivium[scale]'") from None
    return ray


def _on_ray(make: Callable[[int], Record], shards: Sequence[int]) -> Iterator[Any]:
    ray = _ray()
    if not shards:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    shared = ray.put(make)  # the source travels once to each machine

    def row(given: dict[str, Any]) -> dict[str, Any]:
        ray.get(shared)(given["shard"])
        return given

    numbers = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    try:
        yield from numbers.map(row).iter_rows()
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, OSError | TriviumError) else error from None


# --------------------------------------------------------------------------------------- what is done already


def _refuse_other_things(out: Path, described: dict[str, Any]) -> None:
    """Raises TriviumError where the folder holds shards of other settings, or anything else."""
    stated = out / UNDER_WAY / "settings.json"
    # Looked at before the settings: what another part writes in between comes with settings that are found below.
    taken = out.exists() and (not out.is_dir() or any(path.name != UNDER_WAY for path in out.iterdir()))
    if stated.exists() or (out / manifest.NAME).exists():
        before = _read(stated) if stated.exists() else _read(out / manifest.NAME).get("settings", {})
        differing = next((name for name in described if before.get(name) != described[name]), None)
        if differing is not None:
            now, then = json.dumps(described[differing]), json.dumps(before.get(differing))
            raise TriviumError(
                f"{out} holds shards made with {differing} = {then}, not {now}: name a new folder or pack as before"
            )
    elif taken:
        raise TriviumError(f"{out} exists already and holds other things: name a new folder")


@contextmanager
def _at_work(out: Path, total: int, described: dict[str, Any]) -> Iterator[None]:
    """Make the folder ours. The part that ends last, which locks tell, removes what killed ones left behind.

    Where the file system has no locks, it is left there.
    """
    under_way = out / UNDER_WAY
    kept = {_record_path(out, shard).name for shard in range(total)} | {"settings.json", "lock"}
    make_folder(out)
    make_folder(under_way)
    with (under_way / "lock").open("a+") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        with file_beside(under_way / "settings.json") as beside:
            beside.write_text(json.dumps(described), encoding="utf-8")
        yield
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)  # else two that end together would both find another at work
            if (out / manifest.NAME).exists():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in under_way.iterdir():
                    if path.name not in kept:
                        path.unlink(missing_ok=True)


def _record_path(out: Path, shard: int) -> Path:
    return out / UNDER_WAY / f"{shard:06d}.json"


def _is_finished(out: Path, shard: int) -> bool:
    """Whether a shard has a record, and its files their full length."""
    path = _record_path(out, shard)
    if not path.exists():
        return False
    files = [(out / name, facts["bytes"]) for name, facts in _read(path)["files"].items()]
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise TriviumError(f"{path} is damaged: remove it, or the whole folder, and pack again")
    return content


def _finish(out: Path, total: int, described: dict[str, Any]) -> bool:
    """Write skipped.jsonl and manifest.json once all shards have a record; False while some have none."""
    paths = [_record_path(out, shard) for shard in range(total)]
    if not all(path.exists() for path in paths):
        return False
    files: dict[str, dict[str, Any]] = {}
    skipped: list[dict[str, Any]] = []
    samples = 0
    for shard, record in enumerate(map(_read, paths)):
        files |= record["files"]
        files[shard_name(shard)]["samples"] = record["samples"]
        skipped += record["skipped"]
        samples += record["samples"]
    if not samples:
        raise TriviumError(f"not one of {len(skipped)} samples can be used; the first: {skipped[0]['why']}")
    content = {"settings": described, "samples": samples, "skipped": len(skipped), "files": files}
    content["sha256"] = manifest.digest_of(files)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
    # Parts that end together write the same bytes, each under names of its own.
    for name, text in (("skipped.jsonl", lines), (manifest.NAME, json.dumps(content, indent=1) + "\n")):
        with file_beside(out / name, out / UNDER_WAY) as beside:
            beside.write_text(text, encoding="utf-8")
    return True
