"""`trivium data doctor`: what it writes and says, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.shop import THINGS, data_of, drawing, flags, trivium

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
