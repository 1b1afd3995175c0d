"""Shards at an address, against a server on 127.0.0.1 that fails on purpose."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.drawn import caption, drawn_picture
from tests.data.drawn import tokenizer as drawn_tokenizer
from tests.data.test_shards import write_shard
from trivium.data import remote
from trivium.data.collate import ImageInput, PairCollate, TextInput
from trivium.data.mixture import StreamMixture
from trivium.data.order import Order
from trivium.data.remote import RemoteFile
from trivium.data.shards import TarShards
from trivium.data.sources import Concat, open_source
from trivium.data.views import Views
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import Batch, Stream

ROWS = 12  # of a shard
SHARDS = 4


@dataclass
class Served:
    """A folder behind http://127.0.0.1:PORT. `faults`: for each name, what befalls its next requests, in this order: a
    status, "reset", "stall" or "garble"; the last one stays where `for_ever` holds the name."""

    root: Path
    port: int = 0
    ranges: bool = True
    tag: str = '"tag"'
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    for_ever: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # name, method and range, bytes sent

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def sent(self, suffix: str) -> int:
        return sum(size for name, _, size in self.requests if name.endswith(suffix))

    def fault(self, name: str) -> int | str | None:
        found = self.faults.get(name)
        if not found:
            return None
        return found[0] if name in self.for_ever and len(found) == 1 else found.pop(0)


def handler_of(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            name = self.path.partition("?")[0].lstrip("/")
            fault = served.fault(name)
            if fault == "reset":
                self.close_connection = True
                self.connection.close()
                return
            path = served.root / name
            status = fault if isinstance(fault, int) else 200 if path.is_file() else 404
            data = path.read_bytes() if status == 200 else b""
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if fault == "stall":
                time.sleep(1.0)
            total = len(data)
            if match and status == 200 and served.ranges:
                first, last = int(match[1]), min(int(match[2]), total - 1)
                status, data = 206, data[first : last + 1]
            if fault == "garble" and with_body:
                data = bytes([data[0] ^ 1]) + data[1:]
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", served.tag)
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.end_headers()
            served.requests.append((name, f"{self.command} {self.headers.get('Range')}", len(data) * with_body))
            if with_body:
                self.wfile.write(data)

    return Handler


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that waited no longer is what these tests are about."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Four shards, each with its index. Pauses are short, and a stall of the server is one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "STALL", 0.4)
    found = Served(tmp_path / "served")
    found.root.mkdir()
    for shard in range(SHARDS):
        members = []
        for row in range(shard * ROWS, (shard + 1) * ROWS):
            members += [(f"{row:03}.png", drawn_picture(row)), (f"{row:03}.txt", caption(row).encode())]
        TarShards([write_shard(found.root / f"shard-{shard:03}.tar", members)], "pairs")
    server = Quiet(("127.0.0.1", 0), handler_of(found))
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def pairs(address: str) -> TarShards:
    source = open_source("pairs", [address])
    assert isinstance(source, TarShards)
    return source


def test_only_the_members_that_are_asked_for_are_fetched(served: Served) -> None:
    source = pairs(served.address("shard-{000..003}.tar"))
    assert len(source) == SHARDS * ROWS
    assert [len(block) for block in source.blocks()] == [ROWS] * SHARDS
    assert served.sent(".tar") == 0  # the indexes alone
    for row in (30, 3, 47):
        sample = source.read(row, row)
        assert (sample["image"], sample["text"]) == (drawn_picture(row), caption(row))
        assert sample["name"] == f"{served.address(f'shard-{row // ROWS:03}.tar')} ({row:03})"
    asked = [request for request in served.requests if request[0].endswith(".tar") and "GET" in request[1]]
    assert all("bytes=" in how for _, how, _ in asked)
    assert served.sent(".tar") == sum(len(drawn_picture(row)) + len(caption(row).encode()) for row in (30, 3, 47))


def test_the_numbers_of_a_picture_do_not_depend_on_the_folder_one_stands_in(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = served.address("shard-000.tar")
    before = pairs(address).read(5, 5)["same_image"]
    monkeypatch.chdir(tmp_path)
    assert pairs(address).read(5, 5)["same_image"] == before


def test_an_index_is_built_once_where_none_is_served(served: Served) -> None:
    for sidecar in served.root.glob("*.parquet"):
        sidecar.unlink()
    whole = (served.root / "shard-001.tar").stat().st_size
    source = pairs(served.address("shard-001.tar"))
    assert 0 < served.sent(".tar") <= whole  # from end to end, in ranges
    assert all("bytes=" in how for name, how, _ in served.requests if name.endswith(".tar") and "GET" in how)
    assert source.read(4, 4)["text"] == caption(ROWS + 4)
    assert source.notes == []
    before = served.sent(".tar")
    again = pairs(served.address("shard-001.tar"))
    assert (len(again), served.sent(".tar")) == (ROWS, before)
    assert sorted(path.name for path in served.root.iterdir()) == [f"shard-{number:03}.tar" for number in range(SHARDS)]


def test_a_shard_that_was_replaced_is_indexed_anew(served: Served) -> None:
    """Its tag says so, though it has the size of before."""
    address = served.address("shard-000.tar")
    for sidecar in served.root.glob("*.parquet"):
        sidecar.unlink()
    assert pairs(address).read(0, 0)["text"] == caption(0)
    data = (served.root / "shard-000.tar").read_bytes()
    (served.root / "shard-000.tar").write_bytes(data.replace(caption(0).encode(), caption(0).encode().upper()))
    served.tag = '"another"'
    assert pairs(address).read(0, 0)["text"] == caption(0).upper()


@pytest.mark.parametrize("column", ["image_offset", "image_length", "text_length"])
def test_an_index_that_lies_costs_samples_alone(served: Served, column: str) -> None:
    path = served.root / "shard-000.tar.index.parquet"
    table = pq.read_table(path)
    for value in (-5, 2**62, 0):
        column_number = table.column_names.index(column)
        lies = table.set_column(column_number, table.schema.field(column), pa.array([value] * ROWS, pa.int64()))
        pq.write_table(lies, path)
        shutil.rmtree(served.root.parent / "cache", ignore_errors=True)
        with pytest.raises(BadSample):
            pairs(served.address("shard-000.tar")).read(3, 3)


def test_an_index_of_another_shard_is_not_believed(served: Served) -> None:
    shutil.copy(served.root / "shard-000.tar.index.parquet", served.root / "shard-001.tar.index.parquet")
    write_shard(served.root / "shard-001.tar", [("0.png", drawn_picture(7)), ("0.txt", b"alone")])
    source = pairs(served.address("shard-001.tar"))
    assert [source.read(row, row)["text"] for row in range(len(source))] == ["alone"]


def test_a_list_names_paths_and_addresses(served: Served, tmp_path: Path) -> None:
    shutil.copy(served.root / "shard-000.tar", tmp_path / "near.tar")
    names = f"# two shards\nnear.tar\n\n{served.address('shard-{001..002}.tar')}?signature=a.b\n"
    (tmp_path / "all.list").write_text(names)
    source = open_source("pairs", [tmp_path / "all.list"])
    assert isinstance(source, TarShards | Concat)
    assert [source.read(row, row)["text"] for row in (0, 12, 35)] == [caption(0), caption(12), caption(35)]
    assert len(source) == 3 * ROWS
    assert source.read(35, 35)["name"] == f"{served.address('shard-002.tar')} (035)"  # a signature is for nobody's eyes
    (tmp_path / "empty.list").write_text("# nothing\n")
    with pytest.raises(TriviumError, match=r"empty.list lists nothing"):
        open_source("pairs", [tmp_path / "empty.list"])
    (tmp_path / "nested.list").write_text("all.list\n")
    with pytest.raises(TriviumError, match=r"nested.list lists a list \(.*/all.list\)"):
        open_source("pairs", [tmp_path / "nested.list"])


def test_names_with_a_range_of_numbers_are_local_names_too(served: Served) -> None:
    source = open_source("pairs", [f"{served.root}/shard-{{001..003}}.tar"])
    assert source.read(0, 0)["text"] == caption(ROWS)
    with pytest.raises(TriviumError, match=r"shard-004.tar does not exist"):
        open_source("pairs", [f"{served.root}/shard-{{001..004}}.tar"])
    with pytest.raises(TriviumError, match=r"stands for no names: the range must rise"):
        open_source("pairs", [f"{served.root}/shard-{{003..001}}.tar"])


def test_what_fails_now_and_then_is_asked_again(served: Served) -> None:
    names = [f"shard-{shard:03}.tar" for shard in range(SHARDS)]
    hard: list[int | str] = [503, "reset", "stall"]
    for name in names:
        served.faults[name] = list(hard)
        served.faults[f"{name}.index.parquet"] = ["reset"]
    source = pairs(served.address("shard-{000..003}.tar"))
    for name in names:
        served.faults[name] = [500, "garble", "reset", 429]
    for row in range(len(source)):
        assert source.read(row, row)["image"] == drawn_picture(row)
    assert not any(served.faults.values())
    assert source.notes == []


def test_bytes_that_stay_wrong_cost_their_sample_alone(served: Served) -> None:
    source = pairs(served.address("shard-000.tar"))
    path = served.root / "shard-000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(drawn_picture(5)) + 60] ^= 4
    path.write_bytes(data)
    with pytest.raises(BadSample) as caught:
        source.read(5, 5)
    address = served.address("shard-000.tar")
    assert str(caught.value) == f"{address} (005): its image is not what was indexed (checksum): the shard is damaged"
    assert source.read(6, 6)["image"] == drawn_picture(6)


def test_a_shard_of_wrong_bytes_is_lost_after_a_few(served: Served) -> None:
    """A bad sample is asked for twice and never again; with the third all of the shard is bad, and one note says so."""
    source = pairs(served.address("shard-{000..001}.tar"))
    path = served.root / "shard-000.tar"
    data = bytearray(path.read_bytes())
    for row in (2, 5, 7, 9):
        data[data.index(drawn_picture(row)) + 60] ^= 4
    path.write_bytes(data)

    def asked() -> int:
        return sum(name == "shard-000.tar" and "GET" in how for name, how, _ in served.requests)

    def read(row: int) -> str | None:
        try:
            return source.read(row, row)["name"] and None
        except BadSample as error:
            return str(error)

    address = served.address("shard-000.tar")
    for _ in range(3):  # epochs
        for row in (2, 5):
            assert (
                read(row) == f"{address} (00{row}): its image is not what was indexed (checksum): the shard is damaged"
            )
    assert asked() == 4
    assert (read(6), source.notes) == (None, [])
    lost = f"{address}: the shard cannot be read (3 of its samples are not what was indexed (checksum))"
    before = asked()
    assert [read(row) for row in (7, 9, 6, 2)] == [lost] * 4
    assert asked() == before + 2
    assert source.notes == [f"{lost}: its 12 samples are replaced by others"]
    assert read(ROWS) is None
    assert pickle.loads(pickle.dumps(source)).read(6, 6)["image"] == drawn_picture(
        6
    )  # another process finds for itself


def test_wrong_bytes_on_a_disk_cost_their_samples_alone(served: Served) -> None:
    path = served.root / "shard-000.tar"
    source = open_source("pairs", [path])
    source.read(6, 6)  # the index is open
    data = bytearray(path.read_bytes())
    for row in range(5):
        data[data.index(drawn_picture(row)) + 60] ^= 4
    with path.open("r+b") as file:
        file.write(data)
    for row in range(5):
        with pytest.raises(BadSample, match="checksum"):
            source.read(row, row)
    assert source.read(6, 6)["image"] == drawn_picture(6)


VIEWS = Views(size=16, crop_scale=(0.5, 1.0))
COLLATE = PairCollate(ImageInput(VIEWS, patch=4), TextInput(drawn_tokenizer(), 16))


def epoch(source: TarShards, workers: int = 0) -> list[Batch]:
    mixture = StreamMixture([Stream("pairs", source, COLLATE, 16, 8)], seed=5, workers=workers, window=2)
    return [batch for step in mixture.loader(0, 0, 1, 3) for batch in step]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_is_survived_and_counted(served: Served, workers: int) -> None:
    """Its index is known, its samples are not to be had: each is replaced by place, the others stay where they were."""
    source = pairs(served.address("shard-{000..003}.tar"))
    whole = epoch(source)
    assert not any(batch.bad for batch in whole)
    (served.root / "shard-002.tar").unlink()
    source = pairs(served.address("shard-{000..003}.tar"))
    assert len(source) == SHARDS * ROWS
    address = served.address("shard-002.tar")
    assert source.notes == [f"there is no {address} (HTTP 404): its 12 samples are replaced by others"]
    found = epoch(source, workers)

    order = Order(len(source), source.blocks(), 5, "pairs", 2)
    lost = set(range(2 * ROWS, 3 * ROWS))
    num_bad = 0
    for place, row in enumerate(order.rows(torch.arange(SHARDS * ROWS).numpy()).tolist()):
        attempt = 0
        while row in lost:
            num_bad, attempt = num_bad + 1, attempt + 1
            row = order.substitute(place, attempt)
    sentences = [sentence for batch in found for sentence in batch.bad]
    assert len(sentences) == num_bad >= ROWS
    assert set(sentences) == {f"{address}: the shard cannot be read (there is no {address} (HTTP 404))"}
    for before, after in zip(whole, found, strict=True):
        numbers = torch.stack([before.images[0].same_B, after.images[0].same_B])
        kept = numbers[0] == numbers[1]
        assert torch.equal(before.images[0].pixels_BCHW[kept], after.images[0].pixels_BCHW[kept])
        assert int((~kept).sum()) == sum(before_row in lost for before_row in order.rows(before.places_B.numpy()))


def test_a_shard_that_was_never_there(served: Served) -> None:
    source = pairs(served.address("shard-{000..005}.tar"))
    assert len(source) == SHARDS * ROWS
    assert [note.partition(" (")[0] for note in source.notes] == [
        f"there is no {served.address(f'shard-{number:03}.tar')}" for number in (4, 5)
    ]
    assert all(note.endswith("left out, and nobody knows how many samples it held") for note in source.notes)
    with pytest.raises(TriviumError, match=r"no sample in .*; there is no http.*nothing.tar \(HTTP 404\): left out"):
        pairs(served.address("nothing.tar"))


def test_a_server_that_does_not_answer_is_waited_for_once(served: Served) -> None:
    source = pairs(served.address("shard-{000..001}.tar"))
    served.faults["shard-000.tar"] = [503]
    served.for_ever.add("shard-000.tar")
    for _ in range(5):
        with pytest.raises(BadSample, match=r"cannot be read \(.*gave no answer in 4 attempts, at last HTTP 503\)"):
            source.read(3, 3)
    asked = [how for name, how, _ in served.requests if name == "shard-000.tar" and not how.startswith("HEAD")]
    assert len(asked) <= 2 * remote.ATTEMPTS
    assert source.read(ROWS, ROWS)["text"] == caption(ROWS)
    served.for_ever.clear()
    served.faults.clear()
    assert pickle.loads(pickle.dumps(source)).read(3, 3)["text"] == caption(3)  # another process asks for itself


def test_a_server_of_whole_files_is_told(served: Served) -> None:
    source = pairs(served.address("shard-000.tar"))
    served.ranges = False
    with pytest.raises(BadSample, match="serves whole files alone, no ranges"):
        source.read(9, 9)


def test_a_file_is_read_by_each_process_for_itself(served: Served) -> None:
    file = RemoteFile(served.address("shard-000.tar"))
    data = (served.root / "shard-000.tar").read_bytes()
    assert file.read(100, 700) == data[100:700]
    assert file.read(len(data) - 5, len(data) + 100) == data[-5:]
    assert file.read(len(data) + 5, len(data) + 100) == b""
    child = os.fork()
    if not child:
        os._exit(int(file.read(512, 1024) != data[512:1024]))
    assert os.waitpid(child, 0)[1] == 0
    with file.stream() as stream:
        assert stream.read() == data


def test_what_is_not_read_from_an_address(served: Served) -> None:
    with pytest.raises(TriviumError, match=r"pairs.csv is no tar shard, and only these are read from an address"):
        open_source("pairs", [served.address("pairs.csv")])
    with pytest.raises(TriviumError, match=r"nowhere://a/b.tar cannot be read: .*nowhere"):
        open_source("pairs", ["nowhere://a/b.tar"])
