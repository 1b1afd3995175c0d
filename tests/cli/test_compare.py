"""`trivium compare` on two runs of the shop that differ in their seed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.test_evaluate import Addresses
from tests.recipes.shop import data_of, flags, trivium


@pytest.fixture(scope="module")
def other(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other") / "run"
    words = ["--out", out, *data_of(shop), "--data.validation", shop / "goods.csv", *flags(train__seed=1)]
    assert trivium("pretrain", "flava", *words) == 0
    return out


def test_two_runs_side_by_side(trained: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.html"
    capsys.readouterr()
    assert trivium("compare", trained, other, "--out", page) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("train.")}
    assert fields == {"train.save_every": ["3", "500"], "train.seed": ["0", "1"]}
    found = {line.split()[0]: line.split() for line in lines if line.startswith(("retrieval.", "losses."))}
    assert found["retrieval.pairs.text_to_image_r1"][-1] == "12"  # captions of goods.csv
    assert "losses.itm.final" in found
    assert any(line.startswith("Of 16 figures that both runs were measured on, query by query") for line in lines)
    assert lines[-1] == f"page: {page}"
    text = page.read_text(encoding="utf-8")
    assert Addresses(text).found == []
    assert "train.seed" in text
    assert text.count("<figure>") == 6


def test_a_run_that_kept_no_outcomes(
    trained: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(other, run)
    (run / "outcomes.parquet").unlink()
    assert trivium("compare", trained, run) == 0
    assert f"{run} kept no outcomes of its queries" in " ".join(capsys.readouterr().out.split())


def test_mistakes_are_sentences(
    trained: Path, other: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere, damaged = tmp_path / "elsewhere", tmp_path / "damaged"
    for run in (elsewhere, damaged):
        shutil.copytree(other, run)
    (elsewhere / "results.json").write_text('{"schema": 1, "results": {"vqa.accuracy": {"value": 0.5}}}')
    (damaged / "outcomes.parquet").write_bytes(b"PAR1")
    model = next((trained / "checkpoints").iterdir()) / "model"
    for words, says in (
        ([trained, tmp_path / "none"], "none is no run folder"),
        ([model, trained], "model is no run folder, which holds config.json and metrics.jsonl"),
        ([trained, trained], "are the same run"),
        ([trained, other, "--out", tmp_path], "is a folder: name the page itself"),
        ([trained, elsewhere], "so no figure is common to both"),
        ([trained, damaged], "outcomes.parquet: not the outcomes of an evaluation"),
    ):
        capsys.readouterr()
        assert trivium("compare", *words) == 2, words
        captured = capsys.readouterr()
        assert says in captured.err
        assert len(captured.err.splitlines()) == 1
        assert captured.out == ""
