"""`trivium evaluate`: a run, or a model folder on captioned pictures of one's own."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.recipes.shop import LOSSES, THINGS, checkpoint, data_of, flags, flip_a_bit, trivium

PAIR_NAMES = {
    f"retrieval.pairs.{way}_{order}{figure}"
    for way in ("text_to_image", "image_to_text")
    for order in ("", "reranked_")
    for figure in ("r1", "r5", "r10", "median_rank")
}


class Addresses(HTMLParser):
    """What a page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", page)
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fetched = [value or "" for name, value in attrs if name in ("src", "srcset", "data", "poster")]
        fetched += [value or "" for name, value in attrs if name == "href" and tag == "link"]
        self.found += [address for address in fetched if not address.startswith("data:")]


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def check_schema(found: dict) -> None:
    assert found.keys() == {"schema", "command", "version", "machine", "seconds", "results"}
    assert {"cpu", "class", "cores", "threads"} <= found["machine"].keys()
    for name, result in found["results"].items():
        assert result.keys() == {"value", "low", "high", "n"}, name
        if result["low"] is not None:
            assert result["low"] <= result["value"] <= result["high"], name
            assert result["n"] > 0
    assert {f"seconds.{name}": value for name, value in found["seconds"].items()} == {
        name: result["value"] for name, result in found["results"].items() if name.startswith("seconds.")
    }


def test_a_run_is_measured_on_its_own_validation_pairs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert trivium("evaluate", trained, "--out", out) == 0
    assert f"report: {out}/report.html" in capsys.readouterr().out
    found, trained_found = read(out), read(trained)
    check_schema(found)
    check_schema(trained_found)
    losses = {f"losses.{loss}.{figure}" for loss in LOSSES for figure in ("final", "chance")}
    assert found["results"].keys() == losses | PAIR_NAMES | {"seconds.train", "seconds.total"}
    # Evaluated from the files of its checkpoint, the model gives what it gave at the end of training.
    for name in losses | PAIR_NAMES:
        assert found["results"][name]["value"] == pytest.approx(trained_found["results"][name]["value"], abs=1e-6)
    assert 0 < found["seconds"]["train"] <= trained_found["seconds"]["train"]  # of the last line of metrics.jsonl
    assert sorted(path.name for path in out.iterdir()) == ["outcomes.parquet", "report.html", "results.json"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('alt="Training curve of the loss') == len(LOSSES)  # they lie in the run folder
    assert "the dot is the loss on held-out samples" in page


@pytest.mark.parametrize("of", ["run", "model folder", "checkpoint"])
def test_on_pairs_of_ones_own(trained: Path, shop: Path, tmp_path: Path, of: str) -> None:
    path = {"run": trained, "checkpoint": checkpoint(trained, 6), "model folder": checkpoint(trained, 6) / "model"}[of]
    before = (trained / "results.json").read_bytes()
    words = ["--pairs", shop / "goods.csv", shop / "goods.jsonl", "--out", tmp_path / "out"]
    assert trivium("evaluate", path, *words) == 0
    assert "What it was taught" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (trained / "results.json").read_bytes() == before
    found = read(tmp_path / "out")
    check_schema(found)
    assert found["results"].keys() == PAIR_NAMES | {"seconds.total"}
    assert found["results"]["retrieval.pairs.image_to_text_r1"]["n"] == len(THINGS)
    assert found["results"]["retrieval.pairs.text_to_image_r1"]["n"] == len(THINGS) * 3 // 2  # goods.jsonl has two each


def test_pairs_of_ones_own_leave_the_figures_of_the_run(trained: Path, shop: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {name: (run / name).read_bytes() for name in ("results.json", "report.html")}
    assert trivium("evaluate", run, "--pairs", shop / "goods.csv") == 0
    assert {name: (run / name).read_bytes() for name in before} == before
    assert read(run / "evaluation")["results"].keys() == PAIR_NAMES | {"seconds.total"}


def test_pictures_of_another_size_are_seen_at_it(trained: Path, shop: Path, tmp_path: Path) -> None:
    model, found = checkpoint(trained, 6) / "model", {}
    for size in (None, 32, 64):  # its own is 32
        out, words = tmp_path / str(size), [] if size is None else ["--image-size", size]
        assert trivium("evaluate", model, "--pairs", shop / "goods.jsonl", *words, "--out", out) == 0
        found[size] = (out / "outcomes.parquet").read_bytes()
    assert found[None] == found[32] != found[64]


def test_the_page_needs_nothing_beside_itself(trained: Path) -> None:
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert Addresses(page).found == []
    assert "<script" not in page or "http" not in "".join(re.findall(r"<script.*?</script>", page, re.DOTALL))
    assert "contrastive" in page


def test_a_damaged_checkpoint_is_passed_over_aloud(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    flip_a_bit(checkpoint(run, 6) / "model" / "model.safetensors")
    assert trivium("evaluate", run, "--out", tmp_path / "out") == 0
    assert "step-00000006 is damaged and is passed over" in capsys.readouterr().err
    flip_a_bit(checkpoint(run, 3) / "model" / "model.safetensors")
    for words in ([], ["--pairs", run / "no.csv"]):
        assert trivium("evaluate", run, "--out", tmp_path / "none", *words) == 2
    assert "every checkpoint is damaged" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_mistakes_are_sentences_and_write_nothing(
    trained: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint(trained, 6) / "model", model)
    (tmp_path / "file").touch()
    (tmp_path / "bad.csv").write_text("image,caption\nnone.png,a mug\n")
    goods = ["--pairs", shop / "goods.csv"]
    for words, says in (
        ([tmp_path / "none"], "none: there is no such file or folder"),
        ([shop, *goods], "shop"),
        ([model, "--pairs", tmp_path / "none.csv"], "none.csv does not exist"),
        ([model, *goods, "--text-column", "title"], 'has no column "title"'),
        ([model, "--text-column", "title"], "--text-column is of the tables of --pairs"),
        ([model, "--suite", "own", "--image-column", "file"], "--image-column is of the tables of --pairs"),
        ([model, "--pairs", tmp_path / "bad.csv"], f"{tmp_path}/bad.csv (line 2): its picture {tmp_path}/none.png"),
        ([model, *goods, "--device", "gpu"], "device gpu cannot be used here"),
        ([model, *goods, "--image-size", "30"], "cannot be cut into patches of 8: choose a multiple"),
        ([trained, "--image-size", "64"], "--image-size is not of what a run measures of itself"),
    ):
        capsys.readouterr()
        assert trivium("evaluate", *words, "--out", out) == 2, words
        assert says in capsys.readouterr().err
        assert not out.exists()
    assert trivium("evaluate", model, *goods, "--out", tmp_path / "file") == 2
    assert "file is a file: name a folder with --out" in capsys.readouterr().err
    os.truncate(model / "model.safetensors", 500)
    assert trivium("evaluate", model, *goods, "--out", out) == 2
    assert "model.safetensors: 500 bytes where" in capsys.readouterr().err


def test_a_run_without_validation_pairs_still_gets_a_page(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert trivium("pretrain", "flava", "--out", run, *data_of(shop), *flags(train__steps=3)) == 0
    assert "not measured: nothing was held out: give --data.validation" in capsys.readouterr().out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Not measured: nothing was held out" in page
    assert 'alt="Training curve of the loss' in page
    for absent in ("<em>chance</em>", "the dot is"):
        assert absent not in page
    assert read(run)["results"].keys() == {"seconds.train", "seconds.total"}
    assert trivium("evaluate", run) == 0
    assert read(run)["results"].keys() == {"seconds.train", "seconds.total"}
    assert Addresses((run / "report.html").read_text(encoding="utf-8")).found == []
