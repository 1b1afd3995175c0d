"""What held-out rows share with training is found, equal and nearly so, and nothing else is."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trivium.data import leakage
from trivium.data.decode import decode
from trivium.data.duplicates import close_across
from trivium.data.glue import read_glue
from trivium.data.labelled import LabelledRows, Row
from trivium.data.small_vqa import PicturesInMemory
from trivium.data.sources import Concat, open_source
from trivium.errors import BadSample
from trivium.train.protocol import Source

TRAIN = [
    "a gripping , often funny film that never lets go of its audience until the very last frame has faded",
    "the plot is thin and the actors look as if they would rather be anywhere else than in this picture",
    "an honest and moving portrait of a family that has to learn how to live with one another again",
]


def texts(*rows: str | tuple[str, str], file: str = "train.tsv") -> LabelledRows:
    pairs = [(row, None) if isinstance(row, str) else row for row in rows]
    return LabelledRows([Row(file, f"line {n}", str(n), a, b, label=0) for n, (a, b) in enumerate(pairs, 1)], "text")


def test_texts_that_are_equal_or_nearly_so() -> None:
    dev = texts(
        "something else entirely , of which no training row says a word , however long one looks for it",
        "The plot is thin and  the actors LOOK as if they would rather be anywhere else than in this picture",
        "an honest and moving portrait of a family that has to learn how to live with one another once again .",
        file="dev.tsv",
    )
    exact, near = leakage.of_texts(texts(*TRAIN), {"dev": dev})
    assert exact == (
        "leakage: 1 of 3 rows of dev stand, in the same letters, in training; they are counted all the same; the first:"
        " dev.tsv (line 2) and train.tsv (line 2)"
    )
    assert "1 of 3 rows of dev have a near copy (at most 8 of 64 bits of the hash) in training" in near
    assert near.endswith("dev.tsv (line 3) and train.tsv (line 3)")
    assert leakage.of_texts(texts(*TRAIN, "!"), {"dev": texts("nothing of the kind", "?")}) == []


def test_training_is_gone_through_once_for_all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    simhashes = leakage.simhashes
    monkeypatch.setattr(leakage, "simhashes", lambda texts: (hashed.extend(texts), simhashes(texts))[1])
    dev, test = texts(TRAIN[0], file="dev.tsv"), texts("nothing of the kind", TRAIN[1], file="test.tsv")
    [of_dev, of_test] = leakage.of_texts(texts(*TRAIN), {"dev": dev, "test": test})
    assert "1 of 1 rows of dev stand" in of_dev and of_dev.endswith("dev.tsv (line 1) and train.tsv (line 1)")
    assert "1 of 2 rows of test stand" in of_test and of_test.endswith("test.tsv (line 2) and train.tsv (line 2)")
    assert len(hashed) == len(TRAIN) + 1 + 2


def test_of_a_pair_both_texts_count() -> None:
    train = texts(("it rains", "it is wet"), ("it snows", "it is cold"))
    assert leakage.of_texts(train, {"dev": texts(("it rains", "it is cold"))}) == []
    [told] = leakage.of_texts(train, {"dev": texts(("it snows", "it is cold"))})
    assert "1 of 1 rows" in told


def test_rows_that_cannot_be_used_are_passed_over() -> None:
    train = LabelledRows([BadSample("train.tsv", "line 1", "no text"), *texts(*TRAIN).rows], "text")
    [told] = leakage.of_texts(train, {"dev": texts(TRAIN[0])})
    assert told.endswith("and train.tsv (line 1)")
    assert leakage.of_texts(LabelledRows([BadSample("a", "", "b")], "text"), {"dev": texts(TRAIN[0])}) == []


def test_pairs_across_two_sets_are_those_of_every_comparison() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300).astype(np.uint64)
    others = hashes[rng.integers(0, 300, 200)]
    for row, flips in enumerate(rng.integers(0, 12, 200)):
        for bit in rng.choice(63, flips, replace=False):
            others[row] ^= np.uint64(1) << np.uint64(bit)
    apart = np.array([[bin(int(a) ^ int(b)).count("1") for b in others] for a in hashes])
    for distance in (3, 8):
        found = close_across(hashes, others, distance)
        assert sorted(found[:, 1]) == np.flatnonzero((apart <= distance).any(0)).tolist()
        assert all(apart[one, other] <= distance for one, other in found)


def photograph(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)


def shown(folder: Path, name: str, files: list[str]) -> LabelledRows:
    rows = [Row(f"{name}.csv", f"line {n}", str(n), "a text", image=str(folder / file), label=0)
            for n, file in enumerate(files, 2)]  # fmt: skip
    return LabelledRows(rows, "pairs")


def test_pictures_that_are_equal_or_nearly_so_whatever_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        photograph(seed).save(tmp_path / f"{seed}.png")
    os.link(tmp_path / "2.png", tmp_path / "copy.png")
    buffer = io.BytesIO()
    photograph(3).save(buffer, "JPEG", quality=60)
    (tmp_path / "again.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    train = shown(tmp_path, "train", ["0.png", "1.png", "2.png", "3.png", "broken.png", "gone.png"])
    dev = shown(tmp_path, "dev", ["4.png", "copy.png", "copy.png", "1.png", "again.jpg", "broken.png", "5.png"])
    exact, near = leakage.of_pictures(train, {"dev": dev})
    assert "3 of 7 rows of dev show a picture that stands, equal to the pixel, in training" in exact
    assert exact.endswith("dev.csv (line 3) and train.csv (line 4)")
    assert "1 of 7 rows of dev show a near copy (at most 6 of 64 bits of the hash and 4 of 255 in colour)" in near
    assert near.endswith("dev.csv (line 6) and train.csv (line 5)")
    opened: list[bytes] = []
    monkeypatch.setattr(leakage, "decode", lambda data: (opened.append(data), decode(data))[1])
    both = leakage.of_pictures(train, {"dev": dev, "test": shown(tmp_path, "test", ["0.png"])})
    assert both[:2] == [exact, near] and "1 of 1 rows of test show a picture that stands" in both[2]
    third = (tmp_path / "3.png").read_bytes()
    assert opened.count(third) == 1, "training is gone through once for both"
    monkeypatch.setattr(leakage, "PICTURES", 5)
    [files] = leakage.of_pictures(train, {"dev": dev})
    all_ = "which is all that was looked for among more than 5 pictures"
    assert f"4 of 7 rows of dev show a picture that stands, equal to the byte, {all_}, in training" in files
    assert files.endswith("dev.csv (line 3) and train.csv (line 4)"), "a copy under another name"
    other = shown(tmp_path, "other", ["4.png", "5.png", "gone.jpg"])
    [none] = leakage.of_pictures(train, {"other": other})
    assert none == f"leakage: no row of other shows a picture that stands, equal to the byte, in training, {all_}"


def test_of_many_pictures_the_bytes_are_compared_and_whole_only_where_size_and_end_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leakage, "PICTURES", 0)
    contents = {"one": b"a" + bytes(9000), "same": b"a" + bytes(9000), "head": b"b" + bytes(9000),
                "size": bytes(9000), "end": b"a" + bytes(8999) + b"c", "empty": b"", "none": b""}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    read: list[str] = []
    digest = leakage._digest
    monkeypatch.setattr(leakage, "_digest", lambda path: (read.append(Path(path).stem), digest(path))[1])
    train = shown(tmp_path, "train", ["one.jpg", "empty.jpg", "gone.jpg"])
    told = {}
    for name in contents:
        [told[name]] = leakage.of_pictures(train, {name: shown(tmp_path, name, [f"{name}.jpg"])})
    found = [name for name, sentence in told.items() if sentence.startswith("leakage: 1 of 1 rows")]
    assert found == ["one", "same"], "a file without a byte shows nothing, under its own name too"
    assert not {"size", "end"} & set(read) and "head" in read
    missing = shown(tmp_path, "missing", ["gone.jpg"])
    [told["gone"]] = leakage.of_pictures(train, {"missing": missing})
    assert told["gone"].startswith("leakage: no row of missing") and "files of their own" not in told["gone"]


def test_of_many_pictures_those_that_are_no_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "PICTURES", 0)
    (tmp_path / "0.png").write_bytes(b"a picture")
    asked = [Row("qa.jsonl", f"line {n}", str(n), "a text", image=f"{n}.png", label=0) for n in range(2)]
    within = PicturesInMemory(asked, {"0.png": b"a picture", "1.png": b"another"})
    [told] = leakage.of_pictures(shown(tmp_path, "train", ["0.png"]), {"dev": within})
    assert told.startswith("leakage: no row of dev shows a picture that stands, equal to the byte, in training")
    assert told.endswith("(2 of them no files of their own, and known by a checksum or a name alone)")
    [told] = leakage.of_pictures(within, {"dev": within.with_rows(asked[1:])})
    assert told.startswith("leakage: 1 of 1 rows of dev") and "(2 of them no files" in told


def test_captioned_pictures_that_stand_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        photograph(seed).save(tmp_path / f"{seed}.png")
    os.link(tmp_path / "1.png", tmp_path / "copy.png")

    def source(name: str, files: list[str]) -> Source:
        lines = [json.dumps({"image": file, "caption": f"{file} it is"}) for file in files]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        return open_source("pairs", [tmp_path / f"{name}.jsonl"])

    train, dev = source("train", ["0.png", "1.png", "1.png"]), source("dev", ["2.png", "copy.png", "0.png", "3.png"])
    [told] = leakage.of_pairs(train, {"dev": dev})
    assert "2 of 4 rows of dev show a picture that stands, equal to the pixel, in training" in told
    assert "dev.jsonl" in told and "train.jsonl" in told
    assert leakage.of_pairs(train, {"new": source("new", ["2.png", "3.png"])}) == []
    monkeypatch.setattr(leakage, "PICTURES", 2)
    monkeypatch.setattr(leakage, "decode", lambda data: pytest.fail("it is opened"))
    [told] = leakage.of_pairs(train, {"dev": dev})
    assert "2 of 4 rows of dev show a picture that stands, equal to the byte, which is all that was looked for" in told
    assert "dev.jsonl (line 2)" in told and told.endswith("train.jsonl (line 2)")
    both = Concat([source("folder", ["2.png"]), packed(tmp_path, "copy.png")])
    [told] = leakage.of_pairs(packed(tmp_path, "1.png"), {"dev": both})
    assert "1 of 2 rows of dev show a picture" in told, "in shards by the checksum"


def packed(folder: Path, file: str) -> Source:
    """A shard with one picture."""
    path = folder / f"of-{file}.tar"
    with tarfile.open(path, "w") as shard:
        for name, content in (("0.png", (folder / file).read_bytes()), ("0.txt", b"so it is")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return open_source("pairs", [path])


@pytest.mark.data
@pytest.mark.parametrize(("task", "equal"), [("sst2", 2), ("cola", 19)])
def test_the_sentences_that_glue_has_on_both_sides(task: str, equal: int) -> None:
    splits = read_glue(task, str(Path(os.environ["TRIVIUM_DATA"]) / "glue"))
    told = leakage.of_texts(splits.train, {"dev": splits.held_out["dev"]})
    assert told[0].startswith(
        f"leakage: {equal} of {len(splits.held_out['dev']):,} rows of dev stand, in the same letters"
    )


@pytest.mark.data
def test_a_word_that_is_changed_is_near_and_other_sentences_are_not() -> None:
    """On SST-2's dev sentences of twenty words or more."""
    splits = read_glue("sst2", str(Path(os.environ["TRIVIUM_DATA"]) / "glue"))
    sentences = [row.text or "" for row in splits.held_out["dev"].good()]
    sentences = [sentence for sentence in sentences if len(sentence.split()) >= 20]
    hashes = leakage.simhashes([leakage._letters(Row("", "", "", sentence)) for sentence in sentences])
    changed = [" ".join(word for n, word in enumerate(each.split()) if n != 7) for each in sentences]
    others = leakage.simhashes([leakage._letters(Row("", "", "", sentence)) for sentence in changed])
    apart = np.array([[bin(int(a) ^ int(b)).count("1") for b in others[:200]] for a in hashes[:200]])
    assert (np.diag(apart) <= leakage.TEXT_DISTANCE).mean() > 0.7
    assert (apart[~np.eye(len(apart), dtype=bool)] > leakage.TEXT_DISTANCE).all()
