"""`trivium data doctor`: what it writes and says, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.shop import THINGS, data_of, drawing, flags, trivium
from trivium.load import load

DOCTOR = ["data", "doctor"]


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.data.doctor.MOST_SECONDS", 0.05)


def test_findings_are_said_shown_and_written(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shop's validation is a part of its pairs: everything of it leaks. One picture is cut short."""
    drawing("red", "bar").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    (tmp_path / "more.csv").write_text("image,caption\ncut.png,a bar that is cut\n")
    out = tmp_path / "seen"
    words = [*data_of(shop), "--data.validation", shop / "goods.csv", *flags()]
    words.insert(words.index("--data.images"), str(tmp_path / "more.csv"))
    assert trivium(*DOCTOR, "--out", out, *words) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert f"pairs: {len(THINGS) + 1} samples; 24 distinct pictures, 40 x 40 pixels; 36 texts, " in captured.out
    assert "! pairs: 1 of 25 samples (4 %) cannot be read: above 1 % a run stops" in lines
    assert any(line.startswith(f"    {tmp_path / 'more.csv'} (line 2): ") for line in lines)
    assert "! validation: 12 of 12 pictures (100 %) of this split are in training too, equal to the pixel" in lines
    assert any(
        re.match(r"the loader gives about [\d,]+ samples/s here with no worker \(pairs ", line) for line in lines
    )
    assert lines[-1] == f"report: {out / 'report.html'}"

    written = json.loads((out / "report.json").read_text())
    counts = {(finding["stream"], finding["kind"]): finding["count"] for finding in written["findings"]}
    assert counts["pairs", "unreadable"] == 1
    assert counts["validation", "leakage-exact"] == counts["validation", "leakage-captions"] == 12
    assert counts["pairs", "several-captions"] == 12
    assert written["streams"]["pairs"]["captions"] == 36

    page = (out / "report.html").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    assert not re.search(r"""<[^>]+ (src|href)="(?!data:)""", page), "the page asks for another file"
    for finding in written["findings"]:
        assert finding["sentence"].split(" (")[0] in page
    assert page.count("data:image/webp") > 24
    assert str(shop / "goods.jsonl") in page


def test_the_share_at_which_a_run_stops_is_the_runs_own(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.png").write_bytes(b"no picture")
    (tmp_path / "more.csv").write_text("image,caption\ncut.png,a bar that is cut\n")
    words = [*data_of(shop), *flags(), "--train.bad-rate", "0.2"]
    words.insert(words.index("--data.images"), str(tmp_path / "more.csv"))
    assert trivium(*DOCTOR, "--out", tmp_path / "seen", *words) == 0
    assert "! pairs: 1 of 25 samples (4 %) cannot be read, which a run replaces by others" in capsys.readouterr().out


def test_without_any_data_it_examines_the_embedded_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trivium(*DOCTOR, "--out", tmp_path, "--sample", 200, *flags()) == 0
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "report.json").read_text())
    assert set(written["streams"]) == {
        "pairs", "images", "text", "validation", "validation images", "validation text",
    }  # fmt: skip
    assert all(facts["read"] <= 200 and facts["unreadable"] == 0 for facts in written["streams"].values())
    assert (
        out.count("were read, whole batches spread evenly; the others were not looked at") == len(written["notes"]) > 2
    )
    assert not [finding for finding in written["findings"] if finding["kind"] == "leakage-exact"]


WORKERS = ["--train.workers", "0"]


@pytest.mark.parametrize("recipe", ["clip", "albef"])
def test_pairs_of_another_family(recipe: str, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.pairs", shop / "goods.csv", shop / "goods.jsonl", "--data.validation", shop / "goods.csv"]
    settings = ["--data.batch", "8", "--data.max-length", "3", "--data.vocabulary", "bert", *WORKERS]
    assert trivium(*DOCTOR, "--recipe", recipe, "--out", tmp_path, *words, *settings) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert set(written["streams"]) == {"pairs", "validation"}
    facts = written["streams"]["pairs"]
    assert (facts["rows"], facts["pictures"], facts["captions"]) == (24, 24, 36)
    assert facts["tokens"]["5 %"] == (4 if recipe == "albef" else 5), "ALBEF's captions end without [SEP]"
    assert written["samples_per_second"] > 0
    counts = {(finding["stream"], finding["kind"]): finding["count"] for finding in written["findings"]}
    assert counts["validation", "leakage-exact"] == counts["pairs", "several-captions"] == 12
    assert ("pairs", "long-captions") in counts
    assert "! validation: 12 of 12 pictures (100 %) of this split are in training too" in capsys.readouterr().out


def test_pictures_alone_in_crops(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of them stands there again under another name."""
    (tmp_path / "more").mkdir()
    drawing("red", "bar").save(tmp_path / "more" / "again.png")
    words = ["--data.images", shop / "pictures", tmp_path / "more", "--data.batch", "8", *WORKERS]
    assert trivium(*DOCTOR, "--recipe", "dino", "--out", tmp_path / "seen", *words) == 0
    assert "! crops: 1 picture equals another one to the pixel" in capsys.readouterr().out
    written = json.loads((tmp_path / "seen" / "report.json").read_text())
    assert list(written["streams"]) == ["crops"]
    assert (written["streams"]["crops"]["rows"], written["streams"]["crops"]["captions"]) == (25, None)
    assert written["samples_per_second"] > 0


def test_pictures_of_an_image_tokenizer(shop: Path, tmp_path: Path) -> None:
    words = ["--data.images", shop / "goods.csv", "--data.validation", shop / "pictures", "--data.batch", "8", *WORKERS]
    assert trivium(*DOCTOR, "--recipe", "dvae", "--out", tmp_path, *words) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert {name: facts["rows"] for name, facts in written["streams"].items()} == {
        "images": 12, "validation images": 24,
    }  # fmt: skip
    counts = {(finding["stream"], finding["kind"]): finding["count"] for finding in written["findings"]}
    assert counts["validation images", "leakage-exact"] == 12


def test_captions_that_a_run_does_not_read_are_left_alone(tmp_path: Path) -> None:
    """The embedded drawings have captions, and DINO reads none."""
    assert trivium(*DOCTOR, "--recipe", "dino", "--out", tmp_path, "--sample", 64, *WORKERS) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["streams"]["crops"]["captions"] is None
    assert not [finding for finding in written["findings"] if "caption" in finding["kind"]]


def test_words_are_those_of_the_text_encoder_that_a_run_starts_from(shop: Path, trained: Path, tmp_path: Path) -> None:
    caption = "a dinosaur in the garden"
    (tmp_path / "more.csv").write_text(f"image,caption\n{shop / 'pictures' / 'red-bar.png'},{caption}\n")
    words = ["--data.pairs", tmp_path / "more.csv", "--data.vocabulary", "bert", *WORKERS]
    assert trivium(*DOCTOR, "--out", tmp_path / "seen", "--init-text", trained, *words) == 0
    tokenizer = load(str(trained)).tokenizer
    assert tokenizer is not None
    [ids] = tokenizer.encode([caption], 100)
    written = json.loads((tmp_path / "seen" / "report.json").read_text())
    assert written["streams"]["pairs"]["tokens"]["50 %"] == len(ids) > 7, "BERT has each of these words"


@pytest.mark.parametrize(
    ("words", "longest"),
    [
        (["--recipe", "albef", "--objectives.queue", "null"], None),  # a quarter of the pairs
        (
            ["--recipe", "albef", "--objectives.queue", "7"],
            "a momentum queue of 7 is longer than a quarter of these 24",
        ),
        (["--recipe", "albef", "--queue", "9"], "a momentum queue of 9 is longer"),  # tiny has none of its own
        (["--recipe", "clip"], "a momentum queue of 65,536 is longer"),
        (["--recipe", "clip", "--queue", "6"], None),
    ],
)
def test_the_queue_is_the_recipes_where_no_flag_says_otherwise(
    words: list[str], longest: str | None, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.pairs", shop / "goods.csv", shop / "goods.jsonl", "--data.batch", "8", "--data.vocabulary", "bert"]
    assert trivium(*DOCTOR, "--out", tmp_path, *words, *data, *WORKERS) == 0
    said = capsys.readouterr().out
    assert longest in said if longest else "momentum queue" not in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.pairs", "gone.csv"], "gone.csv does not exist"),
        (["--data.pear", "a.csv"], "the recipe has no option data.pear: did you mean data.pairs?"),
        (["--sample", "1"], "--sample 1: to compare samples it takes at least 2"),
        (["--recipe", "flaav"], "there is no recipe flaav: did you mean flava?"),
        (["--out", "t.txt"], "t.txt is a file: name a folder with --out"),
        (["--data.batch", "0"], "--data.batch 0: this must be a whole number of 1 or more"),
        (["flava"], "'flava' stands there without an option"),
        (["--recipe", "unit"], "the recipe unit reads tables of tasks, and the doctor examines captioned pictures"),
        (["--recipe", "finetune"], "what is wrong with such tables their readers tell at the start of a run"),
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
    assert trivium(*DOCTOR, *words) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert sentence in captured.err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "t.txt"]


def test_its_help_loads_no_torch() -> None:
    code = "import sys; from trivium.cli import main; main(['data', 'doctor', '-h']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--sample" in done.stdout
