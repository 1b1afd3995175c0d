"""A file of another library that has neither a matching head nor projections, as ALBEF's ve, vqa.pth and nlvr: what is
drawn in their place answers nothing, until training has reached it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import trivium
from tests.cli.test_finetune import figures
from tests.cli.test_finetune_retrieval import QUICK, WORDS, drawn_picture, saved
from tests.recipes.shop import trivium as run
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.errors import TriviumError
from trivium.evaluate import embedded
from trivium.models.finetuned import HeadConfig

LABELS = ["contradiction", "neutral", "entailment"]
HEAD = "nothing has trained this model's matching head"
PROJECTIONS = "nothing has trained this model's projections to the space that pictures and texts share"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of an ALBEF with a head of entailment."""
    folder = tmp_path_factory.mktemp("models")
    bundle = trivium.load(saved(folder / "albef", "albef"))
    width = bundle.model.config.width
    config = HeadConfig("visual_entailment", "fused", "class", width, 3, width, "relu", dropout=0.0)
    replace(bundle, head=config.build(), head_config=config, labels=LABELS).save(folder / "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def foreign(whole: Path) -> Path:
    """The same in the layout of ve, which has no place for matching head and projections."""
    out = whole.parent / "ve"
    assert run("convert", whole, "--to", "albef", "--out", out) == 0
    return out


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    lines = ["image,text"]
    for n in range(8):
        (tmp_path / f"{n}.png").write_bytes(drawn_picture(n))
        lines.append(f"{n}.png,a picture of number {WORDS[9 + n]}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv"


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    for made in (Scenes("train", 6, seed=6), Scenes("new-scenes", 4, seed=6)):
        write_scenes(made, tmp_path / "scenes", ["refcoco"])
    for half in ("train", "val"):
        (folder := tmp_path / "scenes" / "refcoco" / half / "refcoco").rename(folder.with_name("refcoco+"))
    return tmp_path / "scenes" / "refcoco"


def quick(*left_out: str) -> list[str]:
    return [word for name, value in QUICK.items() if name not in left_out for word in (f"--{name}", str(value))]


def test_what_needs_a_part_that_was_drawn_is_refused_by_a_sentence(
    foreign: Path, pairs: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run("convert", foreign, "--to", "trivium", "--out", tmp_path / "own") == 0  # what is known lasts
    picture, out = pairs.parent / "0.png", tmp_path / "out"
    suite = ("--suite", "albef", "--data.root", scenes, "--out", out)
    capsys.readouterr()
    for model in (foreign, tmp_path / "own"):
        for words, says in (
            (("ground", model, "--image", picture, "--text", "a", "--out", tmp_path / "m.png"), f"{HEAD}, which is"),
            (("evaluate", model, "--pairs", pairs, "--out", out), f"{PROJECTIONS}, which are drawn"),
            (("evaluate", model, "--task", "RefCOCO+", *suite), HEAD),
            (("evaluate", model, "--task", "Flickr30K retrieval", *suite), PROJECTIONS),
            (("search", model, "number", "--images", pairs.parent), f"{PROJECTIONS}, which are drawn"),
            (("search", model, "number", "--images", pairs.parent, "--rerank", "2"), "--rerank needs a matching head"),
        ):
            assert run(*words) == 2, words
            told = capsys.readouterr()
            assert says in told.out + told.err
        with pytest.raises(TriviumError, match=f"{HEAD}.*belong together"):
            trivium.load(model).match(str(picture), "a picture")
        with pytest.raises(TriviumError, match=f"{PROJECTIONS}.*by the cosine"):
            trivium.load(model).ground_by_cosine(str(picture), "a picture")
    assert not (tmp_path / "m.png").exists()
    assert run("search", foreign, "--picture", picture, "--images", pairs.parent) == 0  # by what is trained
    assert capsys.readouterr().out.splitlines()[0].endswith("0.png")


def test_the_drawings_are_sorted_by_what_is_trained_alone(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedded, "_probe", lambda *_: None)  # which takes long, and needs none of it
    assert run("evaluate", foreign, "--out", tmp_path) == 0
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert "knn.group" in found
    assert not [name for name in found if name.startswith(("itm", "zero_shot")) or "text" in name or "reranked" in name]
    told = capsys.readouterr().out
    assert f"image-text matching, and re-ranking by it: {HEAD}" in told
    assert f"retrieval by text and zero-shot classification: {PROJECTIONS}" in told


def test_retrieval_trains_what_was_drawn(
    foreign: Path, pairs: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--init", foreign, "--data", pairs, "--data.dev", pairs, *quick())
    assert run("finetune", "retrieval", *words, "--out", tmp_path / "both", "--objectives.pool", 6) == 0
    assert "retrieval.dev.tr_reranked_r1" in figures(tmp_path / "both")
    tuned = trivium.load(tmp_path / "both")
    assert tuned.untrained == ()
    tuned.ground(str(pairs.parent / "0.png"), "a picture")
    assert run("finetune", "retrieval", *words, "--out", tmp_path / "itc", "--objectives.itm", 0) == 0
    assert "retrieval.dev.tr_r1" in figures(tmp_path / "itc")
    assert "retrieval.dev.tr_reranked_r1" not in figures(tmp_path / "itc"), "nothing has trained the matching head"
    assert run("finetune", "retrieval", *words, "--out", tmp_path / "itm", "--objectives.contrastive", 0) == 2
    assert "retrieval is measured by cosine" in capsys.readouterr().err
    words = ("--init", foreign, "--data", scenes, *quick())
    assert run("finetune", "grounding", *words, "--out", tmp_path / "none", "--objectives.itm", 0) == 2
    assert "grounding is measured by it" in capsys.readouterr().err
    assert run("finetune", "grounding", *words, "--out", tmp_path / "ground", "--objectives.pool", 6) == 0
    assert "RefCOCO+.val.pointing" in figures(tmp_path / "ground")


def test_it_is_told_where_a_layout_cannot_keep_that_a_part_is_untrained(
    foreign: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "left out: albef-grounding has no place for untrained; that nothing has trained itm_head, image_projection"
    for model, is_told in ((foreign, True), (whole, False)):
        assert run("convert", model, "--to", "albef-grounding", "--out", tmp_path / model.name) == 0
        assert (said in capsys.readouterr().out) == is_told
        shutil.rmtree(tmp_path / model.name)
