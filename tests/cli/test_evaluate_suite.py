"""`trivium evaluate --suite`: the verb, its files and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluate.datasets import miniatures
from tests.recipes.shop import checkpoint, trivium


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    miniatures.dtd(tmp_path / "data")
    miniatures.mnist(tmp_path / "data")
    return tmp_path / "data"


def test_a_run_on_two_tasks_and_once_more(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["evaluate", trained, "--suite", "vision", "--data.root", root, "--out", out]
    assert trivium(*words) == 0
    said = capsys.readouterr()
    assert "ImageNet: expected imagenet/{train,val}/<wnid>/*.JPEG" in said.out
    assert f"report: {out}/report.html" in said.out
    assert sorted(path.name for path in out.iterdir()) == [
        "outcomes.parquet",
        "report.html",
        "results.csv",
        "results.json",
    ]
    first = json.loads((out / "results.json").read_text())
    assert {"DTD.linear_probe.accuracy", "MNIST.linear_probe.accuracy"} <= first["results"].keys()
    assert trivium(*words) == 0
    said = capsys.readouterr()
    assert "features of" not in said.err and "linear probe" not in said.err, "nothing is computed again"
    second = json.loads((out / "results.json").read_text())
    del first["results"]["seconds.total"], second["results"]["seconds.total"]
    assert second["results"] == first["results"]


def test_tasks_by_name(trained: Path, root: Path, tmp_path: Path) -> None:
    model, out = checkpoint(trained, 6) / "model", tmp_path / "out"
    assert trivium("evaluate", model, "--task", "dtd", "MNIST", "--data.root", root, "--rows", 4, "--out", out) == 0
    found = json.loads((out / "results.json").read_text())["results"]
    assert {name.split(".")[0] for name in found} == {"seconds", "DTD", "MNIST"}
    assert found["MNIST.knn.accuracy"]["n"] == 4


def test_mistakes_are_sentences(trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for words, says in (
        (["--suite", "flava"], "there is no suite flava: there are flava35, vision"),
        (["--suite", "vision", "--task", "MNITS"], "there is no task 'MNITS' in vision: did you mean 'MNIST'?"),
        (["--task", "MNIST", "--data.root", tmp_path / "no"], "no: there is no such folder"),
        (["--task", "MNIST", "--data.root", tmp_path / "empty"], "there is nothing to measure: below"),
        (["--task", "MNIST"], "there is nothing to measure: no --data.root is given"),
        (["--task", "MNIST", "--data.root", root, "--rows", 0], "--rows 0: it must be at least 1"),
        (["--data.root", root], "--data.root is of the papers' tasks"),
        (["--rows", 4], "--rows is of the papers' tasks"),
        (["--suite", "language", "--fine-tuned", tmp_path / "empty"], "holds no results.json"),
        (["--suite", "vision", "--pairs", "a.csv"], "--pairs and --suite are two evaluations"),
    ):
        capsys.readouterr()
        assert trivium("evaluate", trained, *words, "--out", out) == 2, words
        assert says in capsys.readouterr().err, words
        assert not out.exists()


def test_damaged_data_is_reported_beside_what_could_be_measured(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"")
    out = tmp_path / "out"
    assert trivium("evaluate", trained, "--task", "MNIST", "DTD", "--data.root", root, "--out", out) == 2
    assert "train-labels-idx1-ubyte is no IDX file" in capsys.readouterr().err
    found = json.loads((out / "results.json").read_text())["results"]
    assert "DTD.linear_probe.accuracy" in found and "MNIST.linear_probe.accuracy" not in found
    assert "There, but not readable" in (out / "report.html").read_text(encoding="utf-8")
