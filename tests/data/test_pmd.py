"""A subset of PMD from annotations to shards: what is joined and missing, what a kill leaves, what is refused."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data import pmd_files
from tests.data.drawn import drawn_picture
from tests.data.pmd_files import write_json, write_lines
from tests.data.test_pack import content, touched
from trivium.data import pmd
from trivium.data.pictures import PicturePairs, Pictures
from trivium.data.sources import open_source
from trivium.errors import TriviumError
from trivium.manifest import sha256, verify_manifest

ROWS = 8


def url(row: int) -> str:
    return f"http://a.org/{row}.jpg"


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Eight pairs of a CC12M; rows 0 and 5 show one picture; row 6 is broken."""
    lines = [f"{url(0 if row == 5 else row)}\tthing number {row}" for row in range(ROWS)]
    lines[6] = "no address\tthing number 6"
    return write_lines(tmp_path / "cc12m.tsv", lines)


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def downloaded(folder: Path, form: str, rows: list[int]) -> Path:
    """What img2dataset writes for some addresses: keys of its own, and each picture's address beside it."""
    (folder / "00000").mkdir(parents=True)
    facts = {row: json.dumps({"url": url(row), "key": f"{row:09}", "status": "success"}).encode() for row in rows}
    columns = {"url": list(map(url, rows)), "key": [f"{row:09}" for row in rows], "caption": ["x"] * len(rows)}
    if form == "webdataset":
        members = [
            (f"{row:09}.{suffix}", data)
            for row in rows
            for suffix, data in (("jpg", drawn_picture(row)), ("json", facts[row]), ("txt", b"x"))
        ]
        tar_of(folder / "00000.tar", members)
    elif form == "parquet":
        columns["url"].append(url(99))  # a picture that was not got has no bytes
        columns["key"].append("000000099")
        columns["caption"].append("x")
        columns["jpg"] = [*map(drawn_picture, rows), None]
    else:
        for row in rows:
            (folder / "00000" / f"{row:09}.jpg").write_bytes(drawn_picture(row))
            (folder / "00000" / f"{row:09}.json").write_bytes(facts[row])
    pq.write_table(pa.table(columns), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    return folder


def build(table: str, out: Path, *pictures: Path, **changes: Any) -> pmd.Built:
    changes = {"samples_per_shard": 2, **changes}
    return pmd.build("cc12m", [table], out, pictures=list(map(str, pictures)), **changes)


def in_shards(folder: Path) -> list[tuple[str, bytes]]:
    source = open_source("pairs", [folder / "shards" / "*.tar"])
    samples = [source.read(row, row) for row in range(len(source))]
    return [(sample["text"], sample["image"]) for sample in samples]


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- without pictures


def test_without_pictures_it_lists_each_address_once(table: str, tmp_path: Path) -> None:
    built = build(table, tmp_path / "pmd")
    folder = tmp_path / "pmd" / "cc12m"
    assert pq.read_table(folder / "urls.parquet").to_pylist() == [
        {"url": url(row), "caption": f"thing number {row}"} for row in (0, 1, 2, 3, 4, 7)
    ]
    assert pq.read_table(folder / "pairs.parquet")["entry"].to_pylist() == [f"line {n}" for n in (1, 2, 3, 4, 5, 6, 8)]
    assert built.to_download == 6
    assert built.sentences == [f'{table} (line 7): its url "no address" is no web address']
    [left_out] = lines_of(folder / "left_out.jsonl")
    assert (left_out["file"], left_out["entry"]) == (table, "line 7")
    assert pmd.download_command("cc12m", folder).startswith(
        f"img2dataset --url_list {folder}/urls.parquet --input_format"
    )
    facts = built.facts
    assert (facts.entries, facts.pairs, facts.unique_images, facts.left_out, facts.mean_words) == (8, 7, 6, 1, 3.0)
    assert facts.given["annotations"] == {table: {"bytes": os.path.getsize(table), "sha256": sha256(Path(table))}}
    assert facts.packed is None


def test_figures_of_all_subsets_stand_beside_the_published_ones(table: str, tmp_path: Path) -> None:
    out = tmp_path / "pmd"
    build(table, out)
    pmd.build("visual-genome", pmd_files.visual_genome(tmp_path), out)
    pmd.build("localized-narratives", [pmd_files.localized_narratives(tmp_path / "ln.jsonl")], out)
    summary = json.loads((out / "pmd.json").read_text())
    found = {
        name: (each["pairs"], each["unique_images"], round(each["mean_words"], 3), each["without_url"])
        for name, each in summary["subsets"].items()
    }
    # Regions of one picture are pictures of their own; sentences of one narrative are not.
    assert found == {
        "localized-narratives": (6, 4, 4.667, 2),
        "visual-genome": (3, 3, 2.667, 0),
        "cc12m": (7, 6, 3.0, 0),
    }
    assert summary["total"]["pairs"] == 16
    assert summary["total"]["mean_words"] == pytest.approx((28 + 8 + 21) / 16)
    assert summary["subsets"]["cc12m"]["published_pairs"] == 11_000_000
    assert sum(subset.published_pairs for subset in pmd.SUBSETS.values()) == pytest.approx(pmd.PUBLISHED_PAIRS)


# ------------------------------------------------------------------------------------------------------- joining


@pytest.mark.parametrize("form", ["webdataset", "parquet", "files"])
def test_what_img2dataset_wrote_is_joined_by_address(table: str, tmp_path: Path, form: str) -> None:
    """Keys say nothing: key 3 is another row's picture. Rows 2 and 7 were not got."""
    pictures = downloaded(tmp_path / "got", form, [4, 0, 3, 1])
    built = build(table, tmp_path / "pmd", pictures)
    folder = tmp_path / "pmd" / "cc12m"
    expected = [(f"thing number {row}", drawn_picture(0 if row == 5 else row)) for row in (0, 1, 3, 4, 5)]
    assert in_shards(folder) == expected
    assert [line["url"] for line in lines_of(folder / "missing.jsonl")] == [url(2), url(7)]
    assert lines_of(folder / "missing.jsonl")[0] == {"file": table, "entry": "line 3", "url": url(2), "names": []}
    assert pq.read_table(folder / "urls.parquet")["url"].to_pylist() == [url(2), url(7)]
    assert (built.facts.packed, built.facts.missing, built.facts.skipped, built.to_download) == (5, 2, 0, 2)
    verify_manifest(folder / "shards")
    assert built.facts.shards == json.loads((folder / "shards" / "manifest.json").read_text())["files"]
    assert len([name for name in built.facts.shards if name.endswith(".tar")]) == 3


def test_pictures_are_joined_by_file_name_in_folders_and_tars(tmp_path: Path) -> None:
    file = pmd_files.coco_captions(tmp_path / "captions_train2014.json")
    (tmp_path / "train2014").mkdir()
    (tmp_path / "train2014" / "COCO_train2014_000000057870.jpg").write_bytes(drawn_picture(1))
    shard = tar_of(tmp_path / "more.tar", [("train2017/000000384029.png", drawn_picture(2))])
    built = pmd.build("coco", [file], tmp_path / "pmd", pictures=[str(tmp_path / "train2014"), str(shard)])
    assert in_shards(built.folder) == [
        ("A restaurant has modern wooden tables and chairs.", drawn_picture(1)),
        ("A man preparing desserts in a kitchen.", drawn_picture(2)),
        ("A long restaurant table.", drawn_picture(1)),
    ]
    # The picture that stands there twice is one picture: its captions are never each other's negatives.
    source = open_source("pairs", [built.folder / "shards" / "*.tar"])
    same = [source.read(row, row)["same_image"] for row in range(3)]
    assert same[0] == same[2] != same[1]
    assert [source.read(row, row)["same_text"] for row in range(3)] == same


def test_a_region_is_cut_out_of_its_picture_at_any_size(tmp_path: Path) -> None:
    """The picture on the disk has half the size that the annotations state."""
    files = pmd_files.visual_genome(tmp_path)
    (tmp_path / "VG_100K").mkdir()
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, 20:] = (0, 255, 0)  # where the green clock is
    for name in ("1", "2"):
        Image.fromarray(pixels).save(tmp_path / "VG_100K" / f"{name}.png")
    built = pmd.build("visual-genome", files, tmp_path / "pmd", pictures=[str(tmp_path / "VG_100K")])
    sizes = []
    for caption, data in in_shards(built.folder):
        with Image.open(io.BytesIO(data)) as picture:
            sizes.append((caption, picture.format, picture.size))
            if caption == "the clock is green":
                assert np.abs(np.asarray(picture, np.int16) - (0, 255, 0)).max() <= 4
    assert sizes == [
        ("the clock is green", "JPEG", (20, 10)),
        ("a long shadow", "JPEG", (40, 15)),
        ("sky", "JPEG", (4, 4)),
    ]
    source = PicturePairs(str(built.folder / "joined.parquet"))
    again = pickle.loads(pickle.dumps(source))
    assert again.read(1, 1) == source.read(1, 1)
    assert len({source.read(row, row)["same_image"] for row in range(3)}) == 3
    assert "--resize_mode no" in pmd.download_command("visual-genome", built.folder)


def test_a_picture_that_cannot_be_used_is_named_by_its_annotation(table: str, tmp_path: Path) -> None:
    pictures = downloaded(tmp_path / "got", "files", [0, 1, 3])
    (pictures / "00000" / "000000001.jpg").write_bytes(b"no picture")
    (pictures / "00000" / "000000003.jpg").write_bytes(b"")
    built = build(table, tmp_path / "pmd", pictures)
    assert (built.facts.packed, built.facts.skipped, built.facts.missing) == (2, 2, 3)
    assert built.sentences[1].startswith(f"{table} (line 2)")
    assert built.sentences[2].startswith(f"{table} (line 4): its picture {pictures}/00000/000000003.jpg has zero bytes")


def test_a_file_whose_name_is_not_utf8_leaves_the_others_findable(tmp_path: Path) -> None:
    for name in (b"caf\xe9.png", b"x.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(drawn_picture(1))
    assert Pictures([str(tmp_path)]).find(None, ["x"]) is not None


def test_two_pictures_of_one_name_and_none_at_all(table: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(drawn_picture(1))
    with pytest.raises(TriviumError, match=r"two pictures have the same name, in .*a/x.png and .*b/x.png"):
        Pictures([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(TriviumError, match=r"not one of 7 pairs of cc12m has its picture in .*/a: see .*missing.jsonl"):
        build(table, tmp_path / "pmd", tmp_path / "a")
    assert not (tmp_path / "pmd" / "cc12m" / "shards").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(TriviumError, match="empty holds no picture, neither in files nor in tar shards"):
        Pictures([str(tmp_path / "empty")])
    with pytest.raises(TriviumError, match="nowhere does not exist"):
        Pictures([str(tmp_path / "nowhere")])


# ------------------------------------------------------------------------------------------- again, and after kills


def test_it_goes_on_and_refuses_other_pictures(table: str, tmp_path: Path) -> None:
    pictures = downloaded(tmp_path / "got", "files", [0, 1, 3, 4])
    build(table, tmp_path / "pmd", pictures)
    folder = tmp_path / "pmd" / "cc12m"
    before = content(tmp_path / "pmd")
    inodes = {path.name: path.stat().st_ino for path in folder.rglob("*.tar")}
    build(table, tmp_path / "pmd", pictures)
    assert content(tmp_path / "pmd") == before
    assert {path.name: path.stat().st_ino for path in folder.rglob("*.tar")} == inodes
    (pictures / "00000" / "000000004.jpg").unlink()
    with pytest.raises(TriviumError, match="shards were begun from other annotations or pictures"):
        build(table, tmp_path / "pmd", pictures)
    assert content(tmp_path / "pmd") == before


def build_until(table: str, out: Path, pictures: Path, kill_at: int, log: str) -> None:
    """Build in this process, killed by SIGKILL at the given opening or renaming of a file below `out`."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        point = touched(event, arguments)
        if str(out) in point:
            count += 1
            os.write(descriptor, f"{point}\n".encode())
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(watch)
    build(table, out, pictures)


def test_killed_in_each_phase_and_run_again_the_bytes_are_the_same(table: str, tmp_path: Path) -> None:
    pictures = downloaded(tmp_path / "got", "webdataset", [0, 1, 3, 4])
    build(table, tmp_path / "warm", pictures)  # the index of the pictures' own shard is there from now on
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trivium.data.pmd"])
    log, out = str(tmp_path / "log"), tmp_path / "pmd"

    def run(kill_at: int) -> int | None:
        process = context.Process(target=build_until, args=(table, out, pictures, kill_at, log))
        process.start()
        process.join()
        return process.exitcode

    assert run(0) == 0
    expected = content(out)
    points = Path(log).read_text().splitlines()

    def first(words: str) -> int:
        return next(number for number, point in enumerate(points, start=1) if words in point)

    renamed = f"os.rename {out}/cc12m/"
    named = [
        first(f"{renamed}.pairs.parquet"),
        first(f"{renamed}.left_out.jsonl"),
        first(f"{renamed}.subset.json"),
        first(f"{renamed}.missing.jsonl"),
        first(f"{renamed}.joined.parquet"),
        first(f"{renamed}.urls.parquet"),
        first(f"{renamed}shards/.packing/shard-000001.tar"),
        first(f"{renamed}shards/.packing/.manifest.json"),
        first(f"{renamed}.pmd.json"),
        first(f"{renamed}pmd.json"),
    ]
    assert len(set(named)) == len(named)
    for kill_at in named:
        out.rename(tmp_path / f"before-{kill_at}")
        assert run(kill_at) == -signal.SIGKILL, points[kill_at - 1]
        build(table, out, pictures)
        assert content(out) == expected, points[kill_at - 1]


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_is_refused(table: str, tmp_path: Path) -> None:
    with pytest.raises(TriviumError, match="PMD has no subset cc12: did you mean cc12m"):
        pmd.build("cc12", [table], tmp_path / "pmd")
    with pytest.raises(TriviumError, match=r"no annotation file is given for coco: name captions_train2014.json"):
        pmd.build("coco", [], tmp_path / "pmd")
    with pytest.raises(TriviumError, match=r"nowhere.tsv cannot be read \(No such file or directory\)"):
        pmd.build("cc12m", [str(tmp_path / "nowhere.tsv")], tmp_path / "pmd")
    swapped = write_lines(tmp_path / "swapped.tsv", [f"a cat\t{url(1)}"] * 3)
    with pytest.raises(
        TriviumError, match=r'not one of 3 entries of cc12m .* first: .*line 1.* "a cat" is no web address'
    ):
        pmd.build("cc12m", [swapped], tmp_path / "pmd")
    assert not list((tmp_path / "pmd" / "cc12m").iterdir())
    with pytest.raises(TriviumError, match=r"swapped.tsv/cc12m cannot be made a folder \(Not a directory\): name an"):
        pmd.build("cc12m", [table], Path(swapped))
    with pytest.raises(TriviumError, match=r'no.json: it has no "dataset": is it the file'):
        pmd.build("coco", [table], tmp_path / "pmd", held_out=[write_json(tmp_path / "no.json", {"images": []})])


def test_a_table_serves_for_any_subset(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.csv", ["url,caption,image_id", f"{url(1)},a reddish plant,bp1"])
    built = pmd.build("redcaps", [file], tmp_path / "pmd")
    [pair] = pq.read_table(built.folder / "pairs.parquet").to_pylist()
    assert (pair["url"], pair["caption"], pair["names"]) == (url(1), "a reddish plant", ["bp1"])


@pytest.mark.parametrize("name", pmd.HELD_OUT_IN)
def test_nothing_is_held_out_of_a_table_and_that_is_said(tmp_path: Path, name: str) -> None:
    file = write_lines(tmp_path / "a.CSV", ["url,caption", f"{url(1)},a reddish plant"])
    splits = pmd_files.karpathy(tmp_path / "dataset_coco.json", "coco", {1: "val"})
    with pytest.raises(TriviumError, match=r"a.CSV does not say which pictures .* --held-out keeps none"):
        pmd.build(name, [file], tmp_path / "pmd", held_out=[splits])
    assert not (tmp_path / "pmd").exists()
    assert pmd.build(name, [file], tmp_path / "pmd").facts.pairs == 1
    assert pmd.build("sbu", [file], tmp_path / "pmd", held_out=[splits]).facts.pairs == 1  # has none of their pictures
