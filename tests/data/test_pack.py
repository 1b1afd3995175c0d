"""Packing into tar shards: what comes back, what a kill leaves, what is refused."""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import webdataset
from PIL import Image

from tests.data.drawn import drawn_picture
from trivium.data.pack import Settings, pack, packed_picture
from trivium.data.shards import open_index
from trivium.data.sources import open_source
from trivium.errors import TriviumError
from trivium.manifest import verify_manifest

ROWS = 10


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten rows: number 3 is no picture, 4 has two captions, 5 is large."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = []
    for row in range(ROWS):
        data = drawn_picture(row, *((70, 50) if row == 5 else (20, 24)))
        (folder / f"{row}.png").write_bytes(b"no picture" if row == 3 else data)
        captions: Any = ["größer", "two"] if row == 4 else f"thing {row}"
        lines.append(json.dumps({"image": f"{row}.png", "caption": captions}))
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "a.jsonl"


def settings(table: Path, **changes: Any) -> Settings:
    return Settings("pairs", (str(table),), **{"shortest_side": 25, "samples_per_shard": 3, **changes})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_packed_comes_back(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pack(settings(table), out)
    assert (done.made, done.of, done.samples, done.complete) == (4, 4, 9, True)
    [bad] = done.skipped
    assert bad["row"] == 3
    assert f"{table} (line 4)" in bad["why"]
    assert json.loads((out / "skipped.jsonl").read_text()) == bad
    before, after = open_source("pairs", [table]), open_source("pairs", [out / "*.tar"])
    rows = [row for row in range(ROWS) if row != 3]
    for new, old in enumerate(rows):
        given, packed = before.read(old, old), after.read(new, new)
        assert (given.get("text"), given.get("texts")) == (packed.get("text"), packed.get("texts"))
        if old == 5:
            with Image.open(io.BytesIO(packed["image"])) as picture:
                assert (picture.format, picture.size) == ("JPEG", (25, 35))
        else:
            assert given["image"] == packed["image"]
    verify_manifest(out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["samples"], manifest["skipped"]) == (9, 1)
    assert manifest["files"]["shard-000001.tar"]["samples"] == 2


def test_plain_tarfile_reads_names_that_webdataset_knows(table: Path, tmp_path: Path) -> None:
    pack(settings(table), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000001.tar") as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == ["000000004.json", "000000004.png", "000000005.jpg", "000000005.txt"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
        record = archive.extractfile("000000004.json")
        assert record is not None
        assert json.load(record) == {"captions": ["größer", "two"]}


def test_webdataset_reads_what_is_packed(table: Path, tmp_path: Path) -> None:
    pack(settings(table), tmp_path / "out")
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    source = open_source("pairs", shards)
    assert len(found) == len(source) == 9
    for row, sample in enumerate(found):
        mine = source.read(row, row)
        assert mine["image"] == sample.get("png", sample.get("jpg"))
        told = json.loads(sample["json"])["captions"] if "json" in sample else [sample["txt"].decode()]
        assert told == (mine["texts"] if "texts" in mine else [mine["text"]])


def test_labels_stay(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, data in (("a.png", drawn_picture(0)), ("a.cls", b"7"), ("b.png", drawn_picture(1))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    pack(Settings("images", (str(tmp_path / "in.tar"),)), tmp_path / "out")
    source = open_source("images", [tmp_path / "out" / "shard-000000.tar"])
    assert [source.read(row, row).get("label") for row in range(2)] == [7, None]


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {row}\n" for row in range(7)))
    pack(Settings("text", (str(tmp_path / "a.txt"),), samples_per_shard=4), tmp_path / "out")
    source = open_source("text", [tmp_path / "out" / "*.tar"])
    assert [source.read(row, row)["text"] for row in range(7)] == [f"line {row}" for row in range(7)]


def test_a_format_that_webdataset_does_not_know_becomes_a_jpeg() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, "BMP")
    suffix, data = packed_picture(buffer.getvalue(), 0, 90)
    assert (suffix, data[:2]) == ("jpg", b"\xff\xd8")


def test_a_picture_too_long_for_a_jpeg_is_left_out_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 66_500)).save(tmp_path / "in" / "a.bmp")
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / "b.png")
    pack(Settings("images", (str(tmp_path / "in"),)), tmp_path / "out")
    [skipped] = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert skipped["row"] == 0
    assert "a.bmp: as a JPEG it would have 9 x 66,500 pixels: no side may have over 65,500" in skipped["why"]


def test_parts_and_workers_give_the_bytes_of_one_run(table: Path, tmp_path: Path) -> None:
    pack(settings(table), tmp_path / "one")
    seen = []
    for part in (3, 1, 2):
        done = pack(settings(table), tmp_path / "parts", part=(part, 3))
        seen.append((done.of, done.complete))
        assert (tmp_path / "parts" / "manifest.json").exists() == done.complete
    assert sorted(of for of, _ in seen) == [1, 1, 2]
    assert [complete for _, complete in seen] == [False, False, True]
    pack(settings(table), tmp_path / "pool", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "parts") == content(tmp_path / "pool")


def test_finished_shards_stay_and_a_lost_one_is_made_again(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(settings(table), out)
    before = content(out)
    inodes = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert pack(settings(table), out).made == 0
    assert {path.name: path.stat().st_ino for path in out.glob("*.tar")} == inodes
    (out / "shard-000002.tar").unlink()
    assert pack(settings(table), out).made == 1
    assert content(out) == before


# ------------------------------------------------------------------------------------- parts at the same time


def pack_part(made_from: Settings, out: Path, part: int, together: Any, pid: int | None) -> None:
    together.wait()
    with patch("os.getpid", return_value=pid or os.getpid()):
        pack(made_from, out, part=(part, 4))


@pytest.mark.parametrize("pid", [None, 7])
def test_parts_that_run_at_once_give_the_bytes_of_one_run(table: Path, tmp_path: Path, pid: int | None) -> None:
    """Four parts that begin and end together, also with equal numbers of processes, as in containers."""
    pack(settings(table), tmp_path / "one")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trivium.data.pack"])
    for round_ in range(5):
        out, together = tmp_path / f"parts-{round_}", context.Barrier(4)
        parts = [context.Process(target=pack_part, args=(settings(table), out, k, together, pid)) for k in (1, 2, 3, 4)]
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        assert [part.exitcode for part in parts] == [0, 0, 0, 0]
        assert content(out) == content(tmp_path / "one")


def test_what_a_part_is_at_work_on_stays(table: Path, tmp_path: Path) -> None:
    pack(settings(table), tmp_path / "out")
    expected = content(tmp_path / "out")
    begun = tmp_path / "out" / ".packing" / ".manifest.json.of-another"
    begun.touch()
    with (tmp_path / "out" / ".packing" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        pack(settings(table), tmp_path / "out")
        assert begun.exists()
    pack(settings(table), tmp_path / "out")  # it was killed
    assert content(tmp_path / "out") == expected


# ------------------------------------------------------------------------------------------------------ kills


def touched(event: str, arguments: tuple[Any, ...]) -> str:
    """The file that an audit event opens or renames, where it is one."""
    if event in ("open", "os.rename") and isinstance(arguments[0], str | os.PathLike):
        return f"{event} {os.fspath(arguments[0])}"
    return ""


def pack_until(made_from: Settings, out: Path, below: str, kill_at: int, log: str) -> None:
    """Pack in this process, killed by SIGKILL at the given opening or renaming of a file below a folder."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        point = touched(event, arguments)
        if below in point:
            count += 1
            os.write(descriptor, f"{point}\n".encode())
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(watch)
    pack(made_from, out)


def test_killed_at_ten_points_and_run_again_the_bytes_are_the_same(table: Path, tmp_path: Path) -> None:
    """Each opening and renaming of a file is a point: pictures read inside a shard, its parts, the manifest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trivium.data.pack"])
    log = str(tmp_path.parent / f"{tmp_path.name}.log")

    def run(name: str, kill_at: int) -> int | None:
        arguments = (settings(table), tmp_path / name, str(tmp_path), kill_at, log)
        process = context.Process(target=pack_until, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    assert run("whole", 0) == 0
    expected = content(tmp_path / "whole")
    points = Path(log).read_text().splitlines()

    def first(words: str) -> int:
        return next(number for number, point in enumerate(points, start=1) if words in point)

    named = [
        first("open") + 1,
        first("source/1.png"),  # inside the first shard
        first("os.rename") + 1,
        first(f"os.rename {tmp_path}/whole/.packing/shard-000001.tar.index.parquet"),
        first(f"os.rename {tmp_path}/whole/.packing/shard-000001.tar") + 1,  # between an index and its shard
        first("os.rename " + str(tmp_path / "whole/.packing/.000001.json")),
        first("source/6.png"),  # between shards
        first(f"open {tmp_path}/whole/.packing/.skipped.jsonl"),
        first("os.rename " + str(tmp_path / "whole/.packing/.skipped.jsonl")),
        first("os.rename " + str(tmp_path / "whole/.packing/.manifest.json")),
    ]
    assert len(set(named)) == 10
    for kill_at in named:
        assert run(f"cut-{kill_at}", kill_at) == -signal.SIGKILL, points[kill_at - 1]
        pack(settings(table), tmp_path / f"cut-{kill_at}")
        assert content(tmp_path / f"cut-{kill_at}") == expected, points[kill_at - 1]


class Halting:
    """The rows of a table; a process that reads one of `halts` leaves a file there and stays. While a process that has
    read a row is alive it holds the lock of a file with its number."""

    def __init__(self, table: Path, halts: tuple[int, ...], folder: Path) -> None:
        self.source, self.halts, self.folder = open_source("pairs", [table]), halts, folder

    def __len__(self) -> int:
        return len(self.source)

    def read(self, image_row: int, text_row: int) -> Any:
        if not held:
            held.append((self.folder / f"alive-{os.getpid()}").open("w"))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        while image_row in self.halts:
            (self.folder / f"halted-{image_row}").touch()
            time.sleep(0.01)
        return self.source.read(image_row, text_row)


held: list[Any] = []  # by this process


def pack_by_two(made_from: Settings, out: Path, source: Any) -> None:
    pack(made_from, out, source=source, workers=2)


def ends(lock: Path) -> None:
    with lock.open() as file:
        for _ in range(6000):
            with suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.01)
    raise AssertionError(f"{lock.name}: a worker outlived its parent")


@pytest.mark.parametrize("halts", [(1, 4), (7,)])
def test_killed_with_workers_and_run_again_the_bytes_are_the_same(
    table: Path, tmp_path: Path, halts: tuple[int, ...]
) -> None:
    """The parent is killed while both workers are inside their first shard, or one of them inside its second: no worker
    outlives it."""
    pack(settings(table), tmp_path / "whole")
    seen = tmp_path / "seen"
    seen.mkdir()
    parent = multiprocessing.get_context("forkserver").Process(
        target=pack_by_two, args=(settings(table), tmp_path / "cut", Halting(table, halts, seen))
    )
    parent.start()
    while len(list(seen.glob("halted-*"))) < len(halts):
        assert parent.is_alive()
        time.sleep(0.01)
    parent.kill()
    parent.join()
    assert parent.exitcode == -signal.SIGKILL
    workers = list(seen.glob("alive-*"))
    assert workers
    for worker in workers:
        ends(worker)
    pack(settings(table), tmp_path / "cut", workers=2)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------- refusals


def test_a_folder_of_other_settings_is_refused(table: Path, tmp_path: Path) -> None:
    pack(settings(table), tmp_path / "out", part=(1, 2))
    with pytest.raises(TriviumError, match="holds shards made with quality = 90, not 80: name a new folder"):
        pack(settings(table, quality=80), tmp_path / "out", part=(2, 2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(TriviumError, match="mine exists already and holds other things"):
        pack(settings(table), tmp_path / "mine")
    with pytest.raises(TriviumError, match=r"thesis.txt exists already and holds other things"):
        pack(settings(table), tmp_path / "mine" / "thesis.txt")
    with pytest.raises(TriviumError, match=r"thesis.txt/sub cannot be made a folder \(Not a directory\): name another"):
        pack(settings(table), tmp_path / "mine" / "thesis.txt" / "sub")


@pytest.mark.parametrize("part", [(0, 3), (4, 3), (1, 0)])
def test_a_part_out_of_range(part: tuple[int, int], table: Path, tmp_path: Path) -> None:
    with pytest.raises(TriviumError, match=f"part {part[0]}/{part[1]} is out of range"):
        pack(settings(table), tmp_path / "out", part=part)
    assert not (tmp_path / "out").exists()


def test_without_ray_there_is_a_sentence_and_no_folder(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TriviumError, match=r"the engine ray is not installed .*: pip install 'trivium\[scale\]'"):
        pack(settings(table), tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_no_sample_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    with pytest.raises(TriviumError, match=r"not one of 1 samples can be used; the first: .*a.png"):
        pack(Settings("images", (str(tmp_path / "in"),)), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.fixture
def no_file_above() -> Iterator[Any]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [100, 8_000])
def test_a_disk_that_is_full_is_one_sentence_and_the_next_call_goes_on(
    table: Path, tmp_path: Path, no_file_above: Any, limit: int
) -> None:
    expected = tmp_path / "whole"
    pack(settings(table), expected)
    no_file_above(limit)
    with pytest.raises(TriviumError, match="the disk is full or a limit on file size is reached"):
        pack(settings(table), tmp_path / "out")
    no_file_above(resource.RLIM_INFINITY)
    pack(settings(table), tmp_path / "out")
    assert content(tmp_path / "out") == content(expected)


def test_the_index_is_the_one_that_a_reader_takes(table: Path, tmp_path: Path) -> None:
    pack(settings(table), tmp_path / "out")
    sidecar = tmp_path / "out" / "shard-000000.tar.index.parquet"
    before = sidecar.stat().st_mtime_ns
    assert open_index(str(tmp_path / "out" / "shard-000000.tar")).num_rows == 3
    assert sidecar.stat().st_mtime_ns == before


@pytest.mark.slow
def test_ray_gives_the_same_bytes(table: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra scale is not installed")
    pack(settings(table), tmp_path / "one")
    pack(settings(table), tmp_path / "ray", engine="ray")
    assert content(tmp_path / "ray") == content(tmp_path / "one")
