"""`trivium evaluate --suite`: the verb, its files and its mistakes."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.datasets import miniatures
from tests.recipes.shop import checkpoint, trivium
from trivium.cli.evaluate_suite import _rows, _run_of, evaluate_suite, read_fine_tuned, tasks_of
from trivium.errors import TriviumError
from trivium.evaluate.paper_tasks import SUITES
from trivium.evaluate.tuned_runs import of_task
from trivium.recipes.own_head import PLACES


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
    notes = json.loads((out / "results.json").read_text())["notes"]
    assert notes[0] == "At most 4 pictures of each split were used: these are not the papers' figures."
    assert "MNIST: at most 4 pictures of each split, drawn with a fixed seed: not the papers' figures" in notes


def test_what_is_wrong_with_data_is_told_as_a_task_ends_and_beside_its_figures(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    lost = min((root / "dtd" / "images").glob("*/*_test_*.jpg"))  # the others stand in training as well
    lost.write_bytes(b"no picture")
    for _ in range(2):  # measured, and kept
        assert trivium("evaluate", trained, "--task", "dtd", "--data.root", root, "--out", out) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("DTD: ")]
        wrong = [line for line in told if "cannot be read" in line or "leakage" in line]
        assert len(wrong) == 2 and lost.name in wrong[0] and "leakage: 8 of 8 test" in wrong[1]
        assert not any("the official split" in line or "linear probe:" in line for line in told)
        notes = json.loads((out / "results.json").read_text())["notes"]
        assert {*wrong} < {*notes} and any("the official split" in note for note in notes)


def test_what_is_kept_of_one_size_is_not_that_of_another(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", trained, "--task", "MNIST", "--data.root", root, "--out", tmp_path / "out"]
    for more, is_new in (([], True), (["--image-size", 64], True), (["--image-size", 32], False)):
        capsys.readouterr()
        assert trivium(*words, *more) == 0
        assert ("features of" in capsys.readouterr().err) == is_new, more


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
        (["--suite", "language", "--fine-tuned", tmp_path / "nowhere"], "holds no results.json"),
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


def test_what_is_to_be_fine_tuned_first_is_told_as_a_command_where_its_data_lies(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "glue" / "SST-2").mkdir(parents=True)
    (root / "glue" / "SST-2" / "dev.tsv").write_text("sentence\tlabel\ngood \t1\n")
    (root / "coco").mkdir()
    (root / "coco" / "coco_train.json").write_text("[]")
    out = tmp_path / "out"
    for name, tasks in (("flava35", ["SST-2", "RTE", "DTD"]), ("albef", ["COCO retrieval"])):
        capsys.readouterr()
        code = trivium("evaluate", trained, "--suite", name, "--task", *tasks, "--data.root", root, "--out", out)
        said = capsys.readouterr().out
        if name == "albef":
            assert code == 2, "nothing else is there to be measured"
            command = f"trivium finetune retrieval_coco --init {trained} --data {root}/coco --out runs/retrieval_coco"
            assert f"its data is there: fine-tune it with `{command}`" in said
            assert "COCO retrieval: expected coco_{train,val,test}.json" not in said
            continue
        assert code == 0
        command = f"trivium finetune sst2 --init {trained} --data {root}/glue --out runs/sst2"
        assert f"SST-2: this model has no head for it; its data is there: fine-tune it with `{command}`" in said
        assert "SST-2: expected" not in said
        assert f"fine-tune it with `trivium finetune rte --init {trained} --data DIR" in said
        assert "RTE: expected glue_data/RTE/{train,dev}.tsv" in said
        page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
        assert command in page and "glue_data/SST-2" not in page


def test_every_task_that_takes_fine_tuning_has_a_place_for_its_data() -> None:
    tasks = {task for some in SUITES.values() for task in some if task.kind == "fine-tuning"}
    assert {task.prefix for task in tasks} == PLACES.keys()


def tuned(folder: Path, results: dict[str, float], init: Path | None = None, **data: int) -> Path:
    """What `trivium finetune` leaves of a run, as far as it is read."""
    entries = {name: {"value": value, "low": None, "high": None, "n": None} for name, value in results.items()}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"schema": 1, "results": entries}))
    if init is not None:
        config: dict[str, Any] = {"recipe": "finetune", "arguments": {"task": "sst2"}, "values": {"init": str(init)}}
        config["values"] |= {f"data.{name}": value for name, value in data.items()}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_two_runs_of_one_task_and_seeds_without_a_median_are_refused(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = tuned(runs / "a", {"SST-2": 0.9, "seconds.total": 5.0})
    second = tuned(runs / "b", {"SST-2.median": 0.8, "seconds.total": 7.0})
    tuned(runs / "c", {"RTE": 0.6, "seconds.total": 9.0})
    for tasks, folders in ((["SST-2"], [runs]), (["RTE", "SST-2"], [second, first])):
        with pytest.raises(TriviumError, match=f"two runs of SST-2, {folders[0]}.* and {runs}/[ab]: name the one"):
            evaluate_suite(tmp_path, "language", tasks, None, folders, None, None, None, tmp_path / "out", "cpu", 0.0)
    chosen = {task.name: of_task(task, read_fine_tuned([runs, runs / "c"])) for task in tasks_of("language", ["rte"])}
    assert chosen["RTE"] is not None and chosen["RTE"].seconds == 9.0, "the same run, named twice"
    seeds = tmp_path / "seeds"
    tuned(seeds / "seed-0", {"SST-2": 0.9})
    (seeds / "seeds.json").write_text("[0, 1]")
    with pytest.raises(
        TriviumError, match=f"several seeds and no median of them yet: .*trivium finetune {seeds} --resume"
    ):
        read_fine_tuned([seeds])


def test_a_run_that_began_from_another_model_is_told(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tuned(tmp_path / "same", {"SST-2": 0.9, "seconds.total": 61.0}, checkpoint(trained, 6) / "model")
    other = tuned(tmp_path / "other", {"RTE": 0.6}, tmp_path)
    silent = tuned(tmp_path / "silent", {"CoLA": 0.5})
    out = tmp_path / "out"
    words = ("--suite", "language", "--fine-tuned", same, other, silent, "--out", out)
    assert trivium("evaluate", trained, *words) == 0
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    said = capsys.readouterr().err
    for doubt in (
        f"{other} was fine-tuned from {tmp_path}, not from {trained}: these are figures of another model",
        f"nothing says which model {silent} was fine-tuned from, so it may not be {trained}",
    ):
        assert doubt in page and doubt in said
    assert str(same) not in said
    assert "<td>SST-2<small>its run of trivium finetune, which took this long</small></td><td>1 min 01 s</td>" in page
    assert "<td>RTE<small>its run of trivium finetune, which does not say</small></td><td>–</td>" in page


def test_what_a_run_shares_between_held_out_rows_and_training_stands_beside_its_figures(
    trained: Path, tmp_path: Path
) -> None:
    leak = "leakage: 2 of 872 rows of dev stand, in the same letters, in training"
    sst2, out = tuned(tmp_path / "sst2", {"SST-2": 0.9}, trained), tmp_path / "out"
    content = json.loads((sst2 / "results.json").read_text())
    (sst2 / "results.json").write_text(json.dumps(content | {"notes": [leak]}))
    assert trivium("evaluate", trained, "--task", "SST-2", "--fine-tuned", sst2, "--out", out) == 0
    assert f"<small>{leak}</small>" in html.unescape((out / "report.html").read_text(encoding="utf-8"))


def test_a_run_that_began_from_another_run_of_the_same_model(trained: Path, tmp_path: Path) -> None:
    first = tuned(tmp_path / "first", {"MNLI": 0.8}, trained, rows=400)
    (first / "passport.json").write_text("{}")
    second = tuned(tmp_path / "second", {"RTE": 0.6}, first / "model")
    foreign = tuned(tmp_path / "foreign", {"CoLA": 0.6}, tuned(tmp_path / "elsewhere", {"QQP": 0.8}, tmp_path))
    mnli, rte, cola = read_fine_tuned([first, second, foreign])
    assert mnli.doubt(str(trained)) is None
    assert mnli.part == "fine-tuned on at most 400 training rows"
    assert _rows(_run_of(first / "model")) == 400 and _rows(_run_of(trained)) is None
    assert rte.part is None and rte.doubt(str(first)) is None
    assert rte.doubt(str(trained)) == f"{second} was fine-tuned from {trained} by way of {first / 'model'}"
    assert "these are figures of another model" in str(cola.doubt(str(trained)))
    out = tmp_path / "out"
    assert trivium("evaluate", trained, "--task", "MNLI", "RTE", "--fine-tuned", first, second, "--out", out) == 0
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert str(mnli.part) in page and str(rte.doubt(str(trained))) in page


def test_runs_in_a_folder_that_are_not_done_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    tuned(runs / "done", {"SST-2": 0.9})
    begun = json.dumps({"recipe": "finetune", "arguments": {"task": "rte"}, "values": {"init": "model"}})
    pretraining = json.dumps({"recipe": "clip", "arguments": {"size": "tiny"}, "values": {}})
    for name, file, content in (
        ("begun", "config.json", begun), ("seeds", "seeds.json", "[0]"), ("pretraining", "config.json", pretraining),
        ("model", "config.json", '{"family": "clip"}'),
    ):  # fmt: skip
        (runs / name).mkdir()
        (runs / name / file).write_text(content)
    [found] = read_fine_tuned([runs])
    said = capsys.readouterr().err
    assert found.folder == runs / "done" and said.count("has no results yet") == 2
    for name in ("begun", "seeds"):
        again = f"trivium finetune {runs / name} --resume"
        assert f"{runs / name} has no results yet and is left out: end it with `{again}`" in said


def test_a_run_that_no_task_asks_for_is_named(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tuned(tmp_path / "other", {"RTE": 0.6}, trained)
    shown = tuned(tmp_path / "suite", {"SNLI-VE.zero_shot.tr_r1": 0.3, "DTD.linear_probe.accuracy": 0.2})
    words = ("--task", "DTD", "SNLI-VE", "--data.root", root, "--fine-tuned", other, shown, "--out", tmp_path / "out")
    assert trivium("evaluate", trained, *words) == 0
    said = capsys.readouterr()
    for folder in (other, shown):
        assert f"--fine-tuned: {folder} has no figure that these tasks ask for, and is left out" in said.err
    assert "fine-tune it with `trivium finetune snli_ve" in said.out


def test_a_cache_that_cannot_be_made_is_said_before_anything_is_measured(
    trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    words = ("--task", "DTD", "--data.root", root, "--out", tmp_path / "out")
    assert trivium("evaluate", trained, *words) == 2
    said = capsys.readouterr().err
    assert "no folder to keep figures and features in" in said and "set XDG_CACHE_HOME" in said
    assert not (tmp_path / "out").exists()
