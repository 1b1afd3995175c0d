"""`trivium evaluate --suite S --fine-tune`: one command trains what takes fine-tuning, and measures it."""

from __future__ import annotations

import html
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.drawn import drawn_picture
from tests.recipes.shop import checkpoint, trivium
from trivium.recipes.retrieval import RETRIEVAL
from trivium.recipes.tasks import TASKS
from trivium.train import trainer
from trivium.train.run import Run

STEPS = 4  # in place of the published thousands


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("rte", "hateful_memes"):
        task = TASKS[name]
        shorter = replace(task, steps=STEPS, optim=replace(task.optim, warmup=0), data=replace(task.data, batch=4))
        monkeypatch.setitem(TASKS, name, shorter)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """RTE and Hateful Memes in the layout of their owners."""
    data = tmp_path / "data"
    (data / "glue" / "RTE").mkdir(parents=True)
    rows = "".join(f"{n}\tthe film\twas {word}\t{label}\n" for n, (word, label) in enumerate(
        [("good", "entailment"), ("bad", "not_entailment")] * 6))  # fmt: skip
    for split in ("train", "dev"):
        (data / "glue" / "RTE" / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    (data / "hateful_memes" / "img").mkdir(parents=True)
    records = [{"id": n, "img": f"img/{n}.png", "label": n % 2, "text": ("good", "bad")[n % 2]} for n in range(8)]
    for record in records:
        (data / "hateful_memes" / str(record["img"])).write_bytes(drawn_picture(int(str(record["id"]))))
    for split in ("train", "dev_seen", "dev_unseen"):
        (data / "hateful_memes" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return data


def asked(model: Path, root: Path, out: Path, *more: object) -> tuple[object, ...]:
    words = ("--suite", "flava35", "--task", "RTE", "HatefulMemes", "--data.root", root, "--out", out)
    return ("evaluate", model, *words, "--device", "cpu", "--fine-tune", *more)


def found(out: Path) -> dict[str, float]:
    results = json.loads((out / "results.json").read_text())["results"]
    return {name: entry["value"] for name, entry in results.items() if not name.startswith("seconds.")}


def runs_of(out: Path, verb: str) -> list[Path]:
    return sorted((out / "fine-tuned").glob(f"{verb}-*"))


def refuse_to_train(*_: object) -> None:
    raise AssertionError("what is done is not trained again")


def test_one_command_fills_both_cells_and_the_second_call_trains_nothing(
    trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert trivium(*asked(trained, root, out)) == 0
    first = found(out)
    [rte], [memes] = runs_of(out, "rte"), runs_of(out, "hateful_memes")
    assert first["RTE"] == found(rte)["RTE"]
    assert first["Hateful Memes.dev_unseen.auroc"] == found(memes)["Hateful Memes"]
    settings = json.loads((rte / "config.json").read_text())["values"]
    assert (settings["init"], settings["data.root"]) == (str(trained), str(root / "glue"))
    assert (settings["train.steps"], settings["train.device"], settings["optim.lr"]) == (STEPS, "cpu", 2e-5)
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert "its run of trivium finetune, which took this long" in page and "To be fine-tuned first" not in page
    monkeypatch.setattr(trainer, "one_step", refuse_to_train)
    assert trivium(*asked(trained, root, out)) == 0
    assert found(out) == first


def test_a_run_that_is_named_stands_for_its_task(trained: Path, root: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert trivium("finetune", "rte", "--init", trained, "--data", root / "glue", "--out", run) == 0
    assert trivium(*asked(trained, root, out, "--fine-tuned", run, "--rows", 4)) == 0
    assert not runs_of(out, "rte") and found(out)["RTE"] == found(run)["RTE"]
    [memes] = runs_of(out, "hateful_memes")
    assert json.loads((memes / "config.json").read_text())["values"]["data.rows"] == 4
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert "fine-tuned on at most 4 training rows" in page


def test_another_model_or_other_pictures_begin_a_run_of_their_own(trained: Path, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = checkpoint(trained, 3) / "model"
    for model, more in ((trained, ()), (before, ()), (before, ("--image-size", 64))):
        assert trivium(*asked(model, root, out, *more)) == 0
    inits = [json.loads((run / "config.json").read_text())["values"] for run in runs_of(out, "hateful_memes")]
    begun = {(each["init"], each["data.image_size"]) for each in inits}
    assert begun == {(str(trained), None), (str(before), None), (str(before), 64)} and len(inits) == 3


def values(run: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((run / "config.json").read_text())["values"]
    return settings


def test_a_first_look_is_ten_times_through_its_rows_whatever_was_published(
    trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rte", "hateful_memes"):
        published = replace(TASKS[name], steps=60, optim=replace(TASKS[name].optim, warmup=50))
        monkeypatch.setitem(TASKS, name, published)
    out = tmp_path / "out"
    assert trivium(*asked(trained, root, out, "--rows", 5)) == 0
    for verb in ("rte", "hateful_memes"):
        [run] = runs_of(out, verb)
        settings = values(run)
        assert (settings["data.rows"], settings["train.steps"], settings["optim.warmup"]) == (5, 20, 0.06)
        assert settings["data.batch"] == 4


def test_a_first_look_at_fewer_rows_than_a_batch_is_ten_times_through_them_too(
    trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "rte", replace(TASKS["rte"], data=replace(TASKS["rte"].data, batch=256)))
    out = tmp_path / "out"
    words = ("--suite", "flava35", "--task", "RTE", "--data.root", root, "--out", out, "--device", "cpu")
    assert trivium("evaluate", trained, *words, "--fine-tune", "--rows", 6) == 0
    [run] = runs_of(out, "rte")
    assert (values(run)["data.batch"], values(run)["train.steps"]) == (6, 10)
    said = capsys.readouterr()
    assert "times through" not in said.out + said.err


def test_retrieval_is_learned_from_the_list_that_it_is_measured_by(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Karpathy's one file holds all splits, training among them."""
    name, root, out = "retrieval_flickr30k", tmp_path / "data", tmp_path / "out"
    recipe = RETRIEVAL[name]
    short = replace(recipe, data=replace(recipe.data, batch=4), train=replace(recipe.train, steps=2), epochs=None)
    monkeypatch.setitem(RETRIEVAL, name, short)
    (root / "flickr30k" / "flickr30k-images").mkdir(parents=True)
    images = []
    for n, split in enumerate(["train", "train", "train", "train", "val", "val", "test", "test"]):
        (root / "flickr30k" / "flickr30k-images" / f"{n}.jpg").write_bytes(drawn_picture(n))
        images.append({"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"number {n}"}] * 5})
    (root / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    words = ("--suite", "albef", "--task", "Flickr30K retrieval", "--data.root", root, "--out", out, "--device", "cpu")
    assert trivium("evaluate", trained, *words, "--image-size", 64, "--fine-tune") == 0
    [run] = runs_of(out, name)
    assert values(run)["data.root"] == str(root / "flickr30k") and values(run)["data.image_size"] == 64
    assert found(run)["Flickr30K retrieval.test.tr_r1"] == found(out)["Flickr30K retrieval.test.tr_r1"]


def test_other_annotations_and_other_settings_begin_a_run_of_their_own(
    trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out", root / "glue" / "RTE" / "train.tsv"
    assert trivium(*asked(trained, root, out)) == 0
    (root / "glue" / "RTE" / "notes.txt").write_text("of the owners")
    file.write_text(file.read_text().replace("was good", "is good"))
    assert trivium(*asked(trained, root, out)) == 0
    assert (len(runs_of(out, "rte")), len(runs_of(out, "hateful_memes"))) == (2, 1)
    monkeypatch.setitem(TASKS, "rte", replace(TASKS["rte"], optim=replace(TASKS["rte"].optim, lr=1e-4)))
    assert trivium(*asked(trained, root, out)) == 0
    assert (len(runs_of(out, "rte")), len(runs_of(out, "hateful_memes"))) == (3, 1)
    [newest] = [run for run in runs_of(out, "rte") if values(run)["optim.lr"] == 1e-4]
    assert found(out)["RTE"] == found(newest)["RTE"]


@pytest.mark.parametrize(
    ("task", "folder", "file"),
    [("RTE", "glue", "RTE/train.tsv"), ("HatefulMemes", "hateful_memes", "train.jsonl")],
)
def test_a_folder_without_training_rows_is_no_mistake(
    trained: Path, root: Path, tmp_path: Path, task: str, folder: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / folder / file).unlink()
    out = tmp_path / "out"
    assert trivium(*asked(trained, root, out)) == 0
    said = capsys.readouterr()
    assert f"{task}: {root / folder} holds no training rows, so it is not fine-tuned" in said.err
    assert "came to nothing" not in said.out
    [run] = (out / "fine-tuned").iterdir()
    assert found(run).keys() <= found(out).keys()


def test_a_task_that_cannot_be_learned_leaves_the_others(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "glue" / "RTE" / "train.tsv").write_text("")
    out = tmp_path / "out"
    assert trivium(*asked(trained, root, out)) == 2
    said = capsys.readouterr()
    why = f"{root}/glue/RTE/train.tsv is empty: get it again"
    assert f"RTE: {why}" in said.err and f"RTE: its fine-tuning came to nothing: {why}" in said.out
    assert "Hateful Memes.dev_unseen.auroc" in found(out) and "RTE" not in found(out)
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert f"its fine-tuning came to nothing: {why}" in page
    (root / "glue" / "RTE" / "train.tsv").write_text((root / "glue" / "RTE" / "dev.tsv").read_text())
    assert trivium(*asked(trained, root, out)) == 0, "and mended data is learned from"
    assert "RTE" in found(out)


def test_a_mistake_of_ours_is_told_as_one(
    trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trainer.one_step

    def one_step(run: Run, *rest: Any) -> Any:
        return 1 / 0 if run.mixture.stream_at(0).name == "rte" else plain(run, *rest)

    monkeypatch.setattr(trainer, "one_step", one_step)
    out = tmp_path / "out"
    assert trivium(*asked(trained, root, out)) == 1
    said = capsys.readouterr()
    assert "RTE: its fine-tuning came to nothing: a mistake of ours (ZeroDivisionError" in said.out
    assert "Traceback" in said.err and "Hateful Memes.dev_unseen.auroc" in found(out)


def test_what_a_signal_stopped_goes_on_with_the_same_command(
    trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trainer.one_step

    def one_step(recipe: Run, optimizer: torch.optim.Optimizer, step: int, *rest: Any) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(recipe, optimizer, step, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "one_step", one_step)
        assert trivium(*asked(trained, root, out)) == 0
    assert "the same command goes on from here" in capsys.readouterr().err
    [rte] = runs_of(out, "rte")
    assert checkpoint(rte, 2).is_dir() and not (rte / "results.json").exists()
    assert not runs_of(out, "hateful_memes") and not (out / "report.html").exists()
    assert trivium(*asked(trained, root, out)) == 0
    assert [each["step"] for each in json.loads((rte / "passport.json").read_text())["resumed"]] == [2]
    assert {"RTE", "Hateful Memes.dev_unseen.auroc"} <= found(out).keys()


def test_it_is_asked_for_where_something_can_be_learned(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        (("--suite", "language", "--fine-tune"), "--fine-tune learns from what lies below --data.root"),
        (("--suite", "vision", "--data.root", root, "--fine-tune"), "none of these tasks takes fine-tuning"),
        (("--fine-tune",), "--fine-tune is of the papers' tasks: name them with --suite or --task"),
    ):
        assert trivium("evaluate", trained, *words, "--out", tmp_path / "out") == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
