"""Tar shards: the index, what it refuses, and what happens when a shard changes or is damaged."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import tracemalloc
import warnings
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trivium.data import shards as shards_module
from trivium.data.files import TEXT_LIMIT
from trivium.data.shards import TarShards, open_index
from trivium.data.sources import open_source
from trivium.errors import BadSample, TriviumError


def picture(height: int = 6, width: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes, **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data) if member.isreg() else None)


def write_shard(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            add(archive, name, data)
    return path


GOOD = [
    *(("000.png", picture()), ("000.txt", b"a red mug"), ("000.cls", b"7\n")),
    *(
        ("./deep/001.seg.png", b"no part of ours"),
        ("./deep/001.PNG", picture(3, 2)),
        ("./deep/001.json", b'{"caption": "two"}'),
    ),
    *(("002.jpg", picture()), ("002.txt", "größer".encode()), ("002.npy", b"\x93NUMPY"), ("002.pkl", b"\x80\x04.")),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def bad(source: TarShards, row: int) -> str:
    with pytest.raises(BadSample) as caught:
        source.read(row, row)
    return str(caught.value)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_of_two_shards(tmp_path: Path, format: int) -> None:
    long_name = "folder/" * 8 + "x" * 90 if format == tarfile.USTAR_FORMAT else "folder/" * 30 + "x" * 120
    write_shard(tmp_path / "b-0.tar", GOOD, format)
    write_shard(tmp_path / "b-1.tar", [(f"{long_name}.png", picture()), (f"{long_name}.txt", b"long")], format)
    source = open_source("pairs", [tmp_path / "b-*.tar"])
    assert isinstance(source, TarShards)
    samples = [source.read(row, row) for row in range(len(source))]
    assert [sample["text"] for sample in samples] == ["a red mug", "two", "größer", "long"]
    assert [len(sample["image"]) for sample in samples] == [len(picture()), len(picture(3, 2)), *[len(picture())] * 2]
    assert (samples[0]["label"], samples[1].get("label")) == (7, None)
    assert samples[1]["name"] == f"{tmp_path}/b-0.tar (deep/001)"
    assert list(source.blocks()) == [range(3), range(3, 4)]
    lengths = source.lengths()
    assert lengths is not None
    assert list(lengths) == [9, 3, 6, 4]
    # Three of the pictures are the same bytes, so the same picture.
    assert [samples[row]["same_image"] == samples[0]["same_image"] for row in range(4)] == [True, False, True, True]
    assert all(sample["same_image"] == sample["same_text"] for sample in samples)
    assert source.read(0, 3)["text"] == "long"
    assert source.notes == []


def test_the_index_is_a_sidecar_that_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = str(write_shard(tmp_path / "a.tar", GOOD))
    built = open_index(shard)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index.parquet"]
    row = built.to_pylist()[1]
    assert (row["key"], row["height"], row["width"], row["caption_length"]) == ("deep/001", 3, 2, 3)
    with open(shard, "rb") as file:
        file.seek(row["image_offset"])
        assert file.read(row["image_length"]) == picture(3, 2)

    def never(*_: object) -> None:
        raise AssertionError("built again")

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_build_index", never)
        assert open_index(shard).equals(built)
    write_shard(tmp_path / "a.tar", GOOD[:3])
    assert open_index(shard).num_rows == 1
    facts = os.stat(shard)
    write_shard(tmp_path / "a.tar", [("999.png", picture()), *GOOD[1:3]])
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert os.path.getsize(shard) == facts.st_size
    assert open_index(shard)["key"].to_pylist() == ["999", "000"]


@pytest.mark.parametrize("content", [b"", b"PAR1 not really PAR1"])
def test_a_broken_sidecar_is_built_again(tmp_path: Path, content: bytes) -> None:
    shard = str(write_shard(tmp_path / "a.tar", GOOD))
    (tmp_path / "a.tar.index.parquet").write_bytes(content)
    assert open_index(shard).num_rows == 3
    assert pq.read_table(tmp_path / "a.tar.index.parquet").num_rows == 3


def test_where_nothing_can_be_written_beside_the_shard(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in place of the sidecar: even root cannot write there."""
    shard = str(write_shard(tmp_path / "a.tar", GOOD))
    (tmp_path / "a.tar.index.parquet").mkdir()
    (tmp_path / "a.tar.index.parquet" / "full").touch()
    assert open_index(shard).num_rows == 3
    assert len(list((cache / "trivium" / "shards").iterdir())) == 1
    monkeypatch.setattr(shards_module, "_build_index", None)
    assert open_index(shard).num_rows == 3
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index.parquet"]


def test_dangerous_members_are_left_out_and_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        add(archive, "../up.png", picture())
        add(archive, "/etc/passwd.txt", b"root")
        add(archive, "a/../../b.txt", b"out")
        add(archive, "link.txt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "hard.txt", b"", type=tarfile.LNKTYPE, linkname="good.txt")
        add(archive, "null.txt", b"", type=tarfile.CHRTYPE)
        add(archive, "pipe.txt", b"", type=tarfile.FIFOTYPE)
        add(archive, "folder", b"", type=tarfile.DIRTYPE)
        add(archive, "._good.png", b"macOS")
        add(archive, "good.png", picture())
        add(archive, "good.txt", b"fine")
        add(archive, "good.txt", b"twice")
    source = TarShards([tmp_path / "evil.tar"], "pairs")
    assert len(source) == 1
    assert source.read(0, 0)["text"] == "fine"
    assert source.notes == [
        f"{tmp_path}/evil.tar: left out 3 x a name that leads out of the folder",
        f"{tmp_path}/evil.tar: left out 4 x a link, device or sparse file",
        f"{tmp_path}/evil.tar: left out 1 x a second member for the same part of a sample",
    ]


def test_pictures_under_names_that_are_not_read_are_counted(tmp_path: Path) -> None:
    names = ("000.jpg", "IMG.2020.jpg", "001.GIF", "dir.x/002.png", "._003.png", "notes.md")
    source = TarShards([write_shard(tmp_path / "n.tar", [(name, picture()) for name in names])], "images")
    assert [source.where(row)[1] for row in range(len(source))] == ["000", "dir.x/002"]
    assert source.notes == [
        f"{tmp_path}/n.tar: left out 2 x a picture that is not named key.jpg, .jpeg, .png or .webp, without another dot"
    ]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_not_utf8_cost_nothing(tmp_path: Path, format: int) -> None:
    odd = os.fsdecode(b"caf\xe9")
    shard = write_shard(tmp_path / f"{odd}.tar", [(f"{odd}.png", picture()), (f"{odd}.txt", b"a cup")], format)
    for _ in range(2):  # the second time by the index that the first has written
        pair = TarShards([shard], "pairs").read(0, 0)
        alone = TarShards([shard], "text").read(0, 0)
        assert (pair["image"], pair["text"], alone["text"]) == (picture(), "a cup", "a cup")
        assert pair["name"] == alone["name"] == rf"{tmp_path}/caf\udce9.tar (caf\udce9)"


def test_a_shard_cut_short_keeps_what_came_before(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "cut.tar", [*GOOD[:2], ("001.png", picture()), ("001.txt", b"x" * 5000)])
    data = shard.read_bytes()
    shard.write_bytes(data[: data.index(b"x" * 5000) + 2000])
    source = TarShards([shard], "pairs")
    assert source.read(0, 0)["text"] == "a red mug"
    assert bad(source, 1) == f"{shard} (001): the shard ends inside its text: it was cut short"
    assert source.notes == [f"{shard}: left out 1 x the rest: it is cut short or damaged"]


def test_a_size_that_lies(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "lie.tar", GOOD[:2])
    data = bytearray(shard.read_bytes())
    at = data.index(b"000.txt")
    header = tarfile.TarInfo("000.txt")
    header.size = 8 * 2**30
    data[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    shard.write_bytes(data)
    source = TarShards([shard], "pairs")
    assert bad(source, 0) == f"{shard} (000): its text has 8,589,934,592 bytes, more than 67,108,864"
    header.size = 10_000_000
    data[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    shard.write_bytes(data)
    os.utime(shard, ns=(1, 1))
    assert "the shard ends inside its text" in bad(TarShards([shard], "pairs"), 0)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("first", [True, False])
def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path: Path, kind: bytes, first: bool) -> None:
    """The file is as long as the header says: three gigabytes of nothing, which a file system stores in a few bytes."""
    shard = tmp_path / "long.tar"
    header = tarfile.TarInfo("0")
    header.type, header.size = kind, 3 * 2**30
    with shard.open("wb") as file:
        if not first:
            file.write(write_shard(tmp_path / "good.tar", GOOD[:2]).read_bytes()[: 4 * 512])
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(3 * 2**30 + 2**20)
    tracemalloc.start()
    if first and kind != tarfile.GNUTYPE_SPARSE:
        with pytest.raises(TriviumError, match=r"long.tar is no tar file \(a header of more than 1,048,576 bytes\)"):
            TarShards([shard], "images")
    elif first:
        with pytest.raises(TriviumError, match="left out 1 x a link, device or sparse file"):
            TarShards([shard], "images")
    else:
        source = TarShards([shard], "pairs")
        assert len(source) == 1
        assert source.read(0, 0)["text"] == "a red mug"
        assert "left out 1 x" in source.notes[0]
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "flip.tar", GOOD)
    facts = os.stat(shard)
    source = TarShards([shard], "pairs")
    data = bytearray(shard.read_bytes())
    data[data.index(picture(3, 2)) + 45] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as a failing disk would: size and time are the same
    for reader in (source, TarShards([shard], "pairs")):
        assert (
            bad(reader, 1) == f"{shard} (deep/001): its image is not what was indexed (checksum): the shard is damaged"
        )
        assert reader.read(0, 0)["text"] == "a red mug"


def test_a_shard_that_changes_while_it_is_in_use(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", GOOD)
    source = pickle.loads(pickle.dumps(TarShards([shard], "pairs")))
    write_shard(shard, GOOD[:3])
    with pytest.raises(TriviumError, match=r"a.tar was changed while it was in use"):
        source.read(0, 0)


def test_samples_that_lack_a_part(tmp_path: Path) -> None:
    members = [
        *(("0.png", picture()), ("1.txt", b"alone"), ("2.png", b""), ("2.txt", b"\xff"), ("3.png", picture())),
        *(("3.json", b'{"captions": ["one", "two"], "alt": "three"}'), ("4.png", picture()), ("4.json", b"{")),
        *(("5.png", picture()), ("5.txt", b"y" * 1_000_000), ("6.png", picture()), ("6.txt", b" ")),
    ]
    shard = write_shard(tmp_path / "a.tar", members)
    source = TarShards([shard], "pairs")
    assert bad(source, 0) == f"{shard} (0): it has no text (.txt or .json)"
    assert bad(source, 1) == f"{shard} (1): it has no picture (.jpg, .jpeg, .png or .webp)"
    assert bad(source, 2) == f"{shard} (2): its picture has zero bytes"
    assert source.read(3, 3)["texts"] == ["one", "two"]
    assert "its .json has no text under caption|captions|text|title" in bad(source, 4)
    assert len(source.read(5, 5)["text"]) == TEXT_LIMIT
    assert "its text is empty" in bad(source, 6)
    assert source.cut_texts() == 1
    assert TarShards([shard], "pairs", text_column="alt").read(3, 3)["text"] == "three"
    assert (len(open_source("images", [shard])), len(open_source("text", [shard]))) == (6, 6)
    assert "its text is not UTF-8" in bad(TarShards([shard], "text"), 1)


def test_what_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"PK\x03\x04" + bytes(2000))
    with pytest.raises(TriviumError, match=r"a.tar is no tar file .*a compressed one must be unpacked to .tar first"):
        open_source("pairs", [tmp_path / "a.tar"])
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as archive:
        add(archive, "0.png", picture())
    with pytest.raises(TriviumError, match=r"gz.tar is no tar file"):
        open_source("pairs", [tmp_path / "gz.tar"])
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(TriviumError, match=r"zero.tar is no tar file"):
        open_source("pairs", [tmp_path / "zero.tar"])
    write_shard(tmp_path / "none.tar", [("0.npy", b"x")])
    with pytest.raises(TriviumError, match=r"no sample in .*none.tar has a picture and its text \(.txt or .json\)"):
        open_source("pairs", [tmp_path / "none.tar"])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_anywhere_ends_in_samples_or_in_one_of_our_sentences(
    tmp_path: Path, damage: list[tuple[float, int]]
) -> None:
    shard = write_shard(tmp_path / "fuzz.tar", GOOD)
    data = bytearray(shard.read_bytes()[: 512 * 22])
    for position, value in damage:
        data[int(position * (len(data) - 1))] = value
    shard.write_bytes(data)
    (tmp_path / "fuzz.tar.index.parquet").unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            source = TarShards([shard], "pairs")
        except TriviumError:
            return
        for row in range(len(source)):
            with suppress(BadSample):
                source.read(row, row)


def test_a_pickled_source_holds_no_index(tmp_path: Path) -> None:
    members = [
        (f"{row:05}.{suffix}", data) for row in range(500) for suffix, data in (("png", picture()), ("txt", b"t"))
    ]
    source = TarShards([write_shard(tmp_path / "a.tar", members)], "pairs")
    source.read(3, 4)
    sent = pickle.dumps(source)
    assert len(sent) < 2000 + 20 * len(source)
    assert pickle.loads(sent).read(499, 0) == source.read(499, 0)


def test_no_more_shards_stay_open_than_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 2)
    paths = [write_shard(tmp_path / f"{number}.tar", [("0.txt", str(number).encode())]) for number in range(5)]
    source = TarShards(paths, "text")
    for row in [*range(5), *range(5)]:
        assert source.read(row, row)["text"] == str(row)
    # Only the tars are counted: pyarrow closes the sidecar that it has read on a thread of its own, when it likes.
    handles = [os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()]
    assert len([path for path in handles if path.startswith(str(tmp_path)) and path.endswith(".tar")]) == 2
