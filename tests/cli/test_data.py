"""`trivium data codes`: what it writes and says, how it goes on, what it refuses."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.recipes.shop import THINGS, data_of, drawing, flags, trivium
from trivium.data.codes import CodeCache, build, picture_digest
from trivium.data.files import Folder
from trivium.data.views import Views

CODES = ["data", "codes", "flava"]


def number_of_pictures(out: Path) -> int:
    with safe_open(out, framework="numpy") as file:
        return int(file.get_slice("pictures").get_shape()[0])


def test_it_caches_every_picture_once_and_says_how_to_go_on(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shop's pictures stand in pairs, in images and in validation; together they are one file each."""
    out = tmp_path / "codes.safetensors"
    words = [*data_of(shop), "--data.validation", shop / "goods.csv", *flags()]
    assert trivium(*CODES, "--out", out, "--crops", 2, *words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == (
        f"codes of {len(THINGS)} pictures, 2 crops each, in {out}\ntrain with the same fields and --data.codes {out}\n"
    )
    assert number_of_pictures(out) == len(THINGS)
    assert sorted(tmp_path.iterdir()) == [out]
    before = out.read_bytes()
    assert trivium(*CODES, "--out", out, "--crops", 2, *words) == 0
    assert out.read_bytes() == before


def test_what_cannot_be_read_is_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("image", "caption")]
    for number in range(14):
        drawing("red", "bar").rotate(number).save(tmp_path / f"{number}.png")
        rows.append((f"{number}.png", "a bar"))
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    out = tmp_path / "codes.safetensors"
    # The same table as validation: its bad rows are named once.
    both = ["--data.pairs", tmp_path / "a.csv", "--data.validation", tmp_path / "a.csv"]
    assert trivium(*CODES, "--out", out, *both, *flags(model__num_codes=8)) == 0
    captured = capsys.readouterr()
    assert "codes of 2 pictures" in captured.out
    assert "; 12 could not be read and are left out" in captured.out
    lines = captured.err.splitlines()
    assert lines[0].startswith(f"  {tmp_path / 'a.csv'} (line 2): ")
    assert lines[-1] == "  and 2 more"
    assert len(lines) == 11


def test_parts_of_an_interrupted_build_serve_the_same_data_alone(tmp_path: Path) -> None:
    views = Views(size=16)
    sources = {}
    for name, colour in (("first", "red"), ("second", "blue")):
        (tmp_path / name).mkdir()
        for number in range(6):
            drawing(colour, "square").rotate(9 * number).save(tmp_path / name / f"{number}.png")
        sources[name] = Folder(tmp_path / name, "images")
    calls = 0

    def encode(pixels_BCHW: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return torch.zeros(len(pixels_BCHW), 4, dtype=torch.int64)

    def run(name: str) -> None:
        build(sources[name], views, encode, "hash", tmp_path / "c", crops=1, rows_per_part=2, source_name=name)

    with pytest.raises(KeyboardInterrupt):
        run("first")
    run("first")
    assert calls == 4  # two parts were kept, one was made
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        run("first")
    run("second")  # as many rows, other pictures
    assert calls == 6
    cache = CodeCache(tmp_path / "c", views, "hash")
    for file in (tmp_path / "second").iterdir():
        cache.lookup(picture_digest(file.read_bytes()), 0, file.name)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data", "codes"], "trivium data codes needs RECIPE and --out PATH"),
        (["data", "coeds", "flava", "--out", "c"], "there is no verb data coeds: did you mean data codes?"),
        ([*CODES, "--out", "c", "--crops", "0"], "--crops 0: training needs at least 1 crop of each picture"),
        ([*CODES, "--out", "nowhere/c"], "nowhere/c: there is no folder nowhere to write into"),
        (["data", "codes", "flaav", "--out", "c"], "there is no recipe flaav: did you mean flava?"),
        ([*CODES, "--out", "c", "--size", "big"], "there is no FLAVA of size big: use one of tiny, small, base"),
        ([*CODES, "--out", "c", "--data.flap", "1"], "the recipe has no option data.flap: did you mean data.flip?"),
        ([*CODES, "--out", "c", "--data.text", "t.txt"], "there is no picture to make codes of: give --data.pairs or"),
        ([*CODES, "--out", "c", "--data.images", "gone"], "gone does not exist"),
        ([*CODES, "--out", "c", "--model.image-size", "65"], "a picture of 65 pixels cannot be cut into patches of 16"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("words alone\n")
    assert trivium(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert sentence in captured.err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "t.txt"]


def test_a_folder_without_one_good_picture_leaves_nothing_to_train_on(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    assert trivium(*CODES, "--out", tmp_path / "c", "--data.images", tmp_path / "bad", *flags()) == 2
    assert "there is no picture to learn an image codebook from" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("verb", "words"), [("codes", "--data.image-tokenizer"), ("pack", "--data.pairs PATH")])
def test_its_help_loads_no_torch(verb: str, words: str) -> None:
    code = f"import sys; from trivium.cli import main; main(['data', {verb!r}, '-h']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert words in done.stdout


def test_the_actions_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert trivium("data") == trivium("data", "--help") == 0
    assert capsys.readouterr().out.count("  data pack ") == 2


def test_pack_says_what_it_made_and_how_to_use_it(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    words = ["data", "pack", "--data.pairs", shop / "goods.jsonl", "--samples-per-shard", 5, "--workers", 1]
    assert trivium(*words, "--out", out, "--part", "2/2") == 0
    assert "other parts are not done yet" in capsys.readouterr().out
    assert trivium(*words, "--out", out) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == (
        f'12 samples in 3 shards, 2 of them from before, in {out}\nuse them with --data.pairs "{out}/*.tar"\n'
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.text", "t.txt", "--part", "3of4"], "--part 3of4: write it as 3/64, the third of 64 parts"),
        (["--data.text", "t.txt", "--part", "0/4"], "part 0/4 is out of range: the first is 1/4, the last 4/4"),
        (["--data.text", "t.txt", "--data.images", "."], "a folder of shards holds one kind: give one of --data.pairs"),
        ([], "a folder of shards holds one kind: give one of --data.pairs"),
        (["--data.text", "t.txt", "--quality", "100"], "a JPEG quality of 100: it lies between 1 and 95"),
        (["--data.text", "t.txt", "--workers", "0"], "0 workers can do nothing: give at least 1"),
        (["--data.pair", "t.txt"], "trivium data pack has no option --data.pair: did you mean --data.pairs?"),
    ],
)
def test_a_mistake_in_packing_is_one_sentence_and_leaves_nothing(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("words alone\n")
    assert trivium("data", "pack", "--out", "shards", *words) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert sentence in captured.err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "t.txt"]
