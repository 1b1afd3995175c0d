"""UniT as its users meet it: tasks by the data that is named, started from detection, resumed, asked for boxes."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.recipes.shop import digests, trivium
from trivium.bundle import Bundle
from trivium.data.labelled import LabelledRows
from trivium.data.labelled_tables import Columns, read_tables
from trivium.data.order import Draws
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.load import load
from trivium.methods.unit import UnitMethod
from trivium.models.bert import Bert, BertConfig
from trivium.models.unit import PUBLISHED_TASKS, Unit, UnitConfig, UnitTask
from trivium.recipes import RECIPES
from trivium.recipes.predict import predict_by
from trivium.recipes.tasks import TASKS, TaskData
from trivium.recipes.unit import UnitRecipe, unit
from trivium.recipes.unit_losses import on_held_out
from trivium.recipes.unit_tasks import JointTask, made_scenes
from trivium.train import config, optim, trainer
from trivium.train.config import leaves, set_leaves

TINY = {
    "model.width": 32, "model.num-heads": 2, "model.mlp-width": 32, "model.decoder-layers": 2,
    "model.image-width": 32, "model.image-layers": 1, "model.text-width": 32, "model.text-heads": 2,
    "model.text-mlp-width": 32, "model.text-layers": 1, "model.vocab-size": 200, "data.short": 48, "data.longest": 80,
    "data.augmentation.shorts": 48, "data.augmentation.before-crop": 64, "tasks.vqav2.min-questions": 1,
    "train.workers": 0, "train.precision": "fp32", "train.threads": 1, "train.log-every": 1, "train.steps": 8,
    "train.save-every": 4, "train.monitor-every": 0, "measure": 8,
}  # fmt: skip
NAMES = ("coco", "vg", "vqav2", "snli_ve", "sst2")


def flags(**changes: object) -> list[str]:
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in {**TINY, **named}.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as `trivium data scenes` writes them, and a little SST-2."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 12), ("new-scenes", 8)):
        write_scenes(Scenes(split, count), root / "scenes", ("coco", "vg", "vqa", "snli-ve"))  # type: ignore[arg-type]
    (root / "glue" / "SST-2").mkdir(parents=True)
    rows = [f"a {word} film\t{label}" for word, label in (("fine", 1), ("dull", 0), ("warm", 1), ("flat", 0))]
    for split in ("train", "dev"):
        (root / "glue" / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(f"{r}\n" for r in rows))
    return root


def joint(data: Path) -> list[str]:
    batches = [word for name in NAMES for word in (f"--tasks.{name}.batch", "4")]
    return ["--data.scenes", str(data / "scenes"), "--data.glue", str(data / "glue"), *batches]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "unit"
    assert trivium("pretrain", "unit", "--out", out, *joint(data), *flags()) == 0
    return out


@pytest.fixture(scope="module")
def detector(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "detector"
    words = ["--tasks.vg.root", str(data / "scenes" / "vg"), "--tasks.vg.batch", "4"]
    assert trivium("pretrain", "unit", "--out", out, *words, *flags(model__decoder="separate")) == 0
    return out


def test_a_run_measures_every_task_that_has_data(trained: Path) -> None:
    results = json.loads((trained / "results.json").read_text())["results"]
    for name in ("COCO detection.val2017.ap50", "VG detection.val.attributes", "VQAv2.dev.accuracy",
                 "SNLI-VE.dev.accuracy", "SNLI-VE.dev.macro_f1", "SST-2.dev.accuracy",
                 "SST-2.dev.macro_f1"):  # fmt: skip
        assert 0 <= results[name]["value"] <= 1
    assert results["SST-2.dev.accuracy.majority"]["value"] == 0.5
    assert results["SST-2"] == results["SST-2.dev.accuracy"]
    page = (trained / "report.html").read_text()
    assert "COCO detection: what it finds" in page and "data:image/png" in page
    assert f"trivium detect {trained} photo.jpg" in page and "trivium search" not in page
    assert results["SST-2.dev.accuracy"]["low"] <= results["SST-2.dev.accuracy"]["value"]
    assert results["COCO detection.val2017.ap"]["low"] <= results["COCO detection.val2017.ap"]["value"]
    for loss in ("coco.class", "coco.box", "vg.attributes", "vqav2", "snli_ve", "sst2"):
        assert results[f"losses.{loss}.final"]["value"] > 0
    assert results["losses.sst2.chance"]["value"] == pytest.approx(math.log(2))
    assert "losses.coco.box.chance" not in results
    assert "vg: giou" in page and "Training curve of the loss" in page
    streams = [line["stream"] for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
               if "stream" in line]  # fmt: skip
    assert set(streams) <= set(NAMES) and len(set(streams)) > 2


def test_a_held_out_split_that_cannot_be_read_or_has_no_labels_costs_itself_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path / "data")
    scenes, sst2 = tmp_path / "data" / "scenes", tmp_path / "data" / "glue" / "SST-2"
    shutil.rmtree(scenes / "coco" / "val2017")
    (sst2 / "test.tsv").write_text("index\tsentence\n0\ta fine film\n")
    for path in sorted((scenes / "vg" / "images").glob("500000*.jpg"))[:2]:  # of new scenes
        path.unlink()
    asked: list[str] = []

    def watched(answers: Any, method: Any, rows: LabelledRows, *args: Any, **given: Any) -> Any:
        asked.append(rows.row(0).file)
        return predict_by(answers, method, rows, *args, **given)

    monkeypatch.setattr(sys.modules[UnitRecipe.__module__], "predict_by", watched)
    out = tmp_path / "run"
    assert trivium("pretrain", "unit", "--out", out, *joint(tmp_path / "data"), *flags(train__evaluate_every=8)) == 0
    said = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())["results"]
    assert not any(name.startswith(("COCO", "losses.coco")) for name in results)
    assert {"VG detection.val.ap50", "VQAv2.dev.accuracy", "SST-2.dev.accuracy", "losses.sst2.final"} <= set(results)
    assert "not measured: COCO detection, val2017: no picture of" in said
    assert "not measured: VG detection, val: 2 of 8 pictures, which cannot be read; the first: " in said
    assert "not measured: SST-2, test: it has no labels" in said
    assert asked and not any(file.endswith("test.tsv") for file in asked)
    measured = [line["results"]["figures"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
                if "results" in line]  # fmt: skip
    assert len(measured) == 1 and "vg.val.ap50" in measured[0] and not any("coco" in name for name in measured[0])


def test_losses_on_held_out_rows_are_those_of_a_step_and_their_chances_of_a_constant_guess(data: Path) -> None:
    recipe = replace(with_flags(unit("tiny"), data), measure=None)
    prepared = recipe.prepare("unit", {})
    method = prepared.run.method.eval()
    assert isinstance(method, UnitMethod)
    found, bad = on_held_out(method, prepared.tasks, prepared.collates, recipe.rows_at_once, None, lambda _: None)
    assert not bad
    for task in prepared.tasks:
        if task.of is None:
            continue
        rows = task.data.held_out["dev"]
        collate = replace(prepared.collates[task.name], train=False)
        ready = [collate.prepare(rows.read(n, n), Draws(0, task.name, n)) for n in range(len(rows))]
        number = torch.arange(len(rows))
        batch = collate.batch(task.name, ready, number, number, 0, ())
        target = batch.targets[method.targets[task.name]]
        with torch.no_grad():
            logits = method.logits(batch)
        constant = target.double().mean(0) if target.ndim == 2 else torch.bincount(target).double() / len(target)
        if target.ndim == 2:
            mine = functional.binary_cross_entropy_with_logits(logits, target.float(), reduction="sum") / len(target)
            guess = functional.binary_cross_entropy(constant.expand(len(target), -1), target.double(), reduction="sum")
            guess = guess / len(target)
        else:
            mine = functional.cross_entropy(logits, target)
            guess = functional.nll_loss(constant.clamp(min=1e-30).log().expand(len(target), -1), target)
        assert found[task.name] == (pytest.approx(float(mine), rel=1e-4), pytest.approx(float(guess), rel=1e-6))
    # A head of classes that says of every query what is true of all of them is at chance.
    head: Any = method.model.heads["coco"]
    of_coco = prepared.tasks[0]
    rows = of_coco.data.held_out["val2017"]
    wanted = np.bincount(rows.classes_M, minlength=len(of_coco.data.classes) + 1).astype(float)
    wanted[-1] = 0.1 * (20 * len(rows) - len(rows.classes_M))
    with torch.no_grad():
        head.classes.weight.zero_()
        head.classes.bias.copy_(torch.tensor(wanted / wanted.sum()).clamp(min=1e-30).log())
    again, _ = on_held_out(method, [of_coco], prepared.collates, recipe.rows_at_once, None, lambda _: None)
    value, chance = again["coco.class"]
    assert chance == pytest.approx(value, rel=1e-4)


def test_a_task_that_is_not_learned_is_told_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of four sentences, which are all one, are of one class, so guessing that costs 0.5623."""
    same = tmp_path / "glue" / "SST-2"
    same.mkdir(parents=True)
    for split in ("train", "dev"):
        (same / f"{split}.tsv").write_text("sentence\tlabel\n" + "a film\t1\na film\t1\na film\t1\na film\t0\n" * 2)
    for root, sentences, steps in ((tmp_path / "glue", 8, 16), (data / "glue", 4, 60)):
        words = ["--data.glue", root, "--tasks.sst2.batch", sentences, "--optim.lr", 0.003]
        out = tmp_path / f"in {steps} steps"
        changes = flags(train__steps=steps, train__monitor_every=4)
        assert trivium("pretrain", "unit", "--out", out, *words, *changes) == 0
        lines = [json.loads(line) for line in (out / "monitors.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["monitor"] == "chance"][-1]
        said = [line for line in capsys.readouterr().out.splitlines() if "where guessing gives" in line]
        if steps == 16:
            assert "(sst2): sst2 is 0." in said[0] and "guessing gives 0.5623" in said[0] and last["crossed"]
        else:
            assert last["value"] < 0.8 and not last["crossed"]
    method = with_flags(unit("tiny"), data).prepare("unit", {}).run.method
    assert set(method.chance({})) == {"vqav2", "snli_ve", "sst2"}  # boxes have none


def test_a_run_is_measured_again_to_the_same_figures(trained: Path, tmp_path: Path) -> None:
    assert trivium("evaluate", trained, "--out", tmp_path) == 0
    mine, theirs = (json.loads((folder / "results.json").read_text())["results"] for folder in (tmp_path, trained))
    assert {n: v for n, v in mine.items() if not n.startswith("seconds")} == {
        n: v for n, v in theirs.items() if not n.startswith("seconds")
    }


def test_the_model_folder_knows_its_tasks_and_labels(trained: Path) -> None:
    bundle = load(trained)
    assert bundle.family == "unit" and isinstance(bundle.model, Unit)
    assert [task.name for task in bundle.model.config.tasks] == list(NAMES)
    assert bundle.labels_of is not None and bundle.labels_of["snli_ve"] == ["entailment", "neutral", "contradiction"]
    assert bundle.labels_of["vg"][:2] == ["", "smileys & emotion"] and "purple" in bundle.labels_of["vg.attributes"]
    assert bundle.transform.crop == "shortest" and bundle.transform.size == 48


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(trained: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    assert trivium("pretrain", "unit", "--out", out, *joint(data), *flags(train__keep_last=3)) == 0
    for step in (8,):
        for path in sorted((out / "checkpoints" / f"step-{step:08d}").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (out / "checkpoints" / f"step-{step:08d}").rmdir()
    assert trivium("pretrain", out, "--resume") == 0
    mine, theirs = (folder / "checkpoints" / "step-00000008" / "model" for folder in (out, trained))
    assert digests(mine)["model.safetensors"] == digests(theirs)["model.safetensors"]


def test_a_run_of_boxes_alone_has_no_text_encoder_and_can_be_resumed(detector: Path) -> None:
    settings = config.load(detector)
    folder = detector / "checkpoints" / "step-00000004" / "model"
    prepared = config.build(settings, RECIPES).prepare(settings.recipe, settings.arguments, folder)
    assert prepared.bundle.model.text is None and prepared.bundle.tokenizer is None
    assert prepared.recipe.model.text_layers == 1 and load(folder).model.text is None


def test_detection_that_was_trained_alone_starts_the_shared_decoder(detector: Path, data: Path) -> None:
    recipe = with_flags(unit("tiny"), data)
    prepared = replace(recipe, init=str(detector)).prepare("unit", {})
    old, new = load(detector).model.state_dict(), prepared.bundle.model.state_dict()
    moved = {name.replace("decoders.vg.", "decoders.shared."): tensor for name, tensor in old.items()
             if not name.endswith("spare")}  # fmt: skip
    kept = [name for name in new if name in moved and moved[name].shape == new[name].shape]
    assert any(name.startswith("decoders.shared.") for name in kept) and "heads.vg.classes.weight" in kept
    assert all(torch.equal(new[name], moved[name]) for name in kept)
    assert len(kept) == len(moved)
    assert any("tensors start as" in note for note in prepared.notes)
    assert any("new are" in note and "heads.sst2" in note for note in prepared.notes)


def test_a_head_of_other_labels_does_not_start_from_detection(
    detector: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load(detector)
    assert bundle.labels_of is not None
    known = bundle.labels_of | {"vg": ["", *reversed(bundle.labels_of["vg"][1:])]}
    monkeypatch.setattr(sys.modules[UnitRecipe.__module__], "load", lambda _: replace(bundle, labels_of=known))
    prepared = replace(with_flags(unit("tiny"), data), init="it").prepare("unit", {})
    assert "it knows other labels of vg: what tells them apart starts anew" in prepared.notes
    old, new = bundle.model.state_dict(), prepared.bundle.model.state_dict()
    same = [torch.equal(old[name], new[name]) for name in ("heads.vg.classes.weight", "heads.vg.boxes.0.weight")]
    assert same == [False, True]


def test_with_separate_decoders_only_its_own_starts_from_detection(detector: Path, data: Path) -> None:
    recipe = with_flags(unit("tiny"), data)
    recipe = replace(recipe, init=str(detector), model=replace(recipe.model, decoder="separate"))
    old, new = load(detector).model.state_dict(), recipe.prepare("unit", {}).bundle.model.state_dict()
    name = "blocks.0.mlp_in.weight"
    assert torch.equal(new[f"decoders.vg.{name}"], old[f"decoders.vg.{name}"])
    assert not torch.equal(new[f"decoders.sst2.{name}"], old[f"decoders.vg.{name}"])


def with_flags(recipe: UnitRecipe, data: Path) -> UnitRecipe:
    values = {name.replace("-", "_"): value for name, value in TINY.items()}
    values |= {"data.augmentation.shorts": [48], "data.augmentation.before_crop": [64]}
    values |= {"data.scenes": str(data / "scenes"), "data.glue": str(data / "glue")}
    return set_leaves(recipe, values)


def test_questions_on_one_picture_stand_together_where_that_is_asked_for(data: Path) -> None:
    recipe = with_flags(unit("tiny"), data)
    batches = {}
    for most in (1, 3):
        made = set_leaves(recipe, {"tasks.vqav2.of_one_picture": most, "tasks.vqav2.batch": 6})
        mixture = made.prepare("unit", {}).run.mixture
        step = next(step for step in range(100) if mixture.stream_at(step).name == "vqav2")
        (batch,) = next(iter(mixture.loader(step, 0, 1, step + 1)))
        batches[most] = batch
    numbers = batches[3].images[0].same_B.tolist()
    runs = [len(list(run)) for _, run in groupby(numbers)]
    assert max(runs) == 3 and len(runs) <= 4  # two pictures, or parts of those around them
    assert len(set(batches[1].images[0].same_B.tolist())) > len(set(numbers))


def test_what_fits_in_memory_is_tried_with_pictures_that_no_two_rows_share(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = set_leaves(with_flags(unit("tiny"), data), {"tasks.vqav2.of_one_picture": 3, "tasks.vqav2.batch": 6})
    seen: list[list[int]] = []
    monkeypatch.setattr(
        trainer, "one_step", lambda *given: seen.extend(i.same_B.tolist() for batch in given[3] for i in batch.images)
    )
    trainer.try_streams(made.prepare("unit", {}).run)
    assert seen and all(len(set(numbers)) == len(numbers) for numbers in seen)


def test_of_one_picture_is_of_texts_on_pictures(data: Path) -> None:
    for task in ("coco", "sst2"):
        made = set_leaves(with_flags(unit("tiny"), data), {f"tasks.{task}.of_one_picture": 3})
        with pytest.raises(TriviumError, match=f"--tasks.{task}.of-one-picture is of texts on pictures"):
            made.prepare("unit", {})


def test_the_verb_detect_takes_a_run(trained: Path, data: Path, tmp_path: Path) -> None:
    picture = next((data / "scenes" / "coco" / "val2017").glob("*.jpg"))
    assert trivium("detect", trained, picture, "--out", tmp_path / "found.png", "--score", 0, "--task", "vg") == 0
    found = json.loads((tmp_path / "found.json").read_text())["objects"]
    assert len(found) == 20 and found == sorted(found, key=lambda each: -each["score"])


def suited(model: Path, root: Path, out: Path, *tasks: str, rows: int) -> dict[str, float]:
    """Figures of `trivium evaluate --suite unit`."""
    words = ("--suite", "unit", "--task", *tasks, "--rows", rows, "--data.root", root, "--out", out)
    assert trivium("evaluate", model, *words) == 0
    entries = json.loads((out / "results.json").read_text())["results"]
    return {name: entry["value"] for name, entry in entries.items() if not name.startswith("seconds")}


def test_the_suite_measures_a_run_by_the_heads_that_it_learned(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "root"
    root.mkdir()
    for name in ("vqa", "snli-ve"):
        (root / name).symlink_to(data / "scenes" / name)
    (root / "glue").symlink_to(data / "glue")
    mine = suited(trained, root, tmp_path / "suite", "VQAv2", "SNLI-VE", "SST-2", rows=8)  # as the run
    own = json.loads((trained / "results.json").read_text())["results"]
    for name in ("VQAv2.dev.accuracy", "SNLI-VE.dev.accuracy", "SST-2.dev.accuracy"):
        assert mine[name] == own[name]["value"], name
    page = html.unescape((tmp_path / "suite" / "report.html").read_text())
    assert "by the model's own head, which it learned among others" in page
    bundle = load(trained)
    names = bundle.labels_of
    assert names is not None
    for task, root_of in (("vqav2", "vqa"), ("snli_ve", "snli-ve"), ("sst2", "glue")):
        splits = TASKS[task].open(TaskData(root=str(root / root_of)))
        rows = splits.held_out["dev"].capped(8).rows
        pictures = None if task == "sst2" else [row.image for row in rows]
        answers = bundle.answer(pictures, [row.text for row in rows], task=task)
        [file] = [f for f in (tmp_path / "cache").glob("**/dev.jsonl") if Path(rows[0].file).name in f.read_text()]
        said = [json.loads(line) for line in file.read_text().splitlines()]
        assert [names[task][n] for n in answers.argmax(1)] == [line["prediction"] for line in said]
        assert answers.amax(1).tolist() == pytest.approx([line["probability"] for line in said], abs=1e-5)


def test_a_task_that_was_learned_otherwise_than_in_the_paper_is_marked(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = shutil.copytree(trained, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    settings["values"]["tasks.sst2.rows"] = 3
    (run / "config.json").write_text(json.dumps(settings))
    suited(run, data, tmp_path / "suite", "SST-2", rows=8)
    page = html.unescape((tmp_path / "suite" / "report.html").read_text())
    assert "learned from at most 3 training rows" in page
    words = ("--suite", "flava35", "--task", "SST-2", "--data.root", data, "--out", tmp_path / "flava35")
    assert trivium("evaluate", trained, *words) == 0
    page = html.unescape((tmp_path / "flava35" / "report.html").read_text())
    assert "learned beside other tasks, not fine-tuned" in page


def test_a_unit_is_asked_for_what_it_learned(
    trained: Path, detector: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, picture = load(trained), next((data / "scenes" / "snli-ve").glob("*/*.jpg"))
    names = bundle.labels_of
    assert names is not None
    answers = bundle.ask(picture, "what is there?", k=3)
    assert len(answers) == 3 and {each.text for each in answers} <= set(names["vqav2"])
    assert all(0 < each.probability < 1 for each in answers)
    judged = bundle.ask(picture, "there is a cat", task="snli_ve")
    assert sorted(each.text for each in judged) == sorted(names["snli_ve"])
    assert sum(each.probability for each in judged) == pytest.approx(1)
    assert bundle.answer(texts=["a fine film", "a dull one"]).sum(1).tolist() == pytest.approx([1, 1])
    for words, says in (
        ({"texts": "a film", "task": "qnli"}, "this UniT has no task 'qnli': it has coco"),
        ({"pictures": picture, "task": "vg"}, "the task 'vg' finds objects and answers nothing"),
        ({"pictures": picture}, r"answers nothing about a picture alone: it has vqav2 \(a picture with a text\)"),
        ({"texts": "a film", "task": "snli_ve"}, "the task snli_ve reads pictures"),
    ):
        with pytest.raises(TriviumError, match=says):
            bundle.answer(**words)
    with pytest.raises(TriviumError, match="the task sst2 asks nothing about a picture in words"):
        bundle.ask(picture, "is it fine?", task="sst2")
    with pytest.raises(TriviumError, match="chooses among its labels and writes nothing"):
        bundle.ask(picture, "what is there?", freely=True)
    with pytest.raises(TriviumError, match="no head for a task: fine-tune it first"):
        load(detector).ask(picture, "what is there?")
    capsys.readouterr()
    assert trivium("ask", trained, "--image", picture, "--question", "there is a cat", "--task", "snli_ve") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    of_texts = (UnitTask("sst2", "labels", "text", 2, 0), UnitTask("qnli", "labels", "text", 2, 1))
    several = replace(bundle, model=Unit(replace(bundle.model.config, tasks=of_texts)))
    with pytest.raises(TriviumError, match="several tasks of texts alone, sst2, qnli: name one, in a command with"):
        several.answer(texts="a film")
    with pytest.raises(TriviumError, match=r"of vqav2 are not known: put a labels\.json that has them"):
        replace(bundle, labels_of=None).ask(picture, "what is there?")


def test_a_model_that_is_tuned_further_knows_the_labels_of_its_new_task(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names that the UniT had for its own tasks are not those of the head on top."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "tuned"
    words = ("--data", data / "scenes" / "snli-ve", "--data.batch", 8, "--train.steps", 2, "--train.evaluate-every", 2,
             "--train.workers", 0, "--train.precision", "fp32", "--optim.warmup", 0)  # fmt: skip
    assert trivium("finetune", "snli_ve", "--init", trained, "--out", out, *words) == 0
    bundle = load(out)
    assert bundle.labels == ["entailment", "neutral", "contradiction"] and bundle.labels_of is None
    picture = next((data / "scenes" / "snli-ve").glob("*/*.jpg"))
    answers = bundle.ask(picture, "there is a cat")
    assert sorted(answer.text for answer in answers) == ["contradiction", "entailment", "neutral"]
    mine = json.loads((out / "results.json").read_text())["results"]["SNLI-VE (concatenated).dev.accuracy"]["value"]
    again = suited(out, data / "scenes", tmp_path / "suite", "SNLI-VE", rows=100)
    assert again["SNLI-VE (concatenated).dev.accuracy"] == mine


def test_texts_that_are_cut_are_told(data: Path) -> None:
    recipe = set_leaves(with_flags(unit("tiny"), data), {"tasks.sst2.max_length": 4})
    notes = recipe.prepare("unit", {}).notes
    for split in ("train", "dev"):
        [told] = [note for note in notes if note.startswith(f"sst2, {split}: ")]
        assert "4 texts have more than 4 tokens and are cut there; the first: " in told and "SST-2" in told
    assert not any("are cut there" in note for note in with_flags(unit("tiny"), data).prepare("unit", {}).notes)


def test_two_tasks_of_one_kind_keep_their_figures_apart(data: Path) -> None:
    recipe = with_flags(unit("tiny"), data)
    again = JointTask(21, task="coco", root=str(data / "scenes" / "coco"), num_queries=5, batch=4)
    prepared = replace(recipe, tasks=recipe.tasks | {"boats": again}).prepare("unit", {})
    assert [task.title for task in prepared.tasks if task.kind == "coco"] == ["COCO detection", "boats"]


def test_the_task_that_the_docs_add_is_trained_and_measured(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text()
    code = page.partition("## Add a task to UniT")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "my_run.py").write_text(code)
    pictures = sorted((data / "scenes" / "vg" / "images").glob("*.jpg"))[:12]
    rows = [f"{picture},a {'good' if n % 2 else 'bad'} one,{n % 2}" for n in range(3) for picture in pictures]
    (tmp_path / "memes.csv").write_text("\n".join(["image,text,label", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TASKS, "memes", TASKS["hateful_memes"])  # what my_run.py puts there is gone afterwards
    words = [word for word in joint(data) if word != str(data / "glue") and word != "--data.glue"]
    assert trivium("pretrain", "my_run.py:shop", "--out", "runs/memes", *words, *flags()) == 0
    results = json.loads((tmp_path / "runs" / "memes" / "results.json").read_text())["results"]
    assert 0 <= results["my memes.dev.auroc"]["value"] <= 1 and "losses.memes.final" in results


def test_a_task_of_ones_own_is_one_more_entry(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataclass that `finetune` takes, and a place in the mixture."""
    table = tmp_path / "moods.csv"
    table.write_text("text,label\n" + "".join(f"word {n},{'glad' if n % 2 else 'sad'}\n" for n in range(40)))
    own = replace(
        TASKS["text_classification"], name="moods", title="moods",
        open=lambda given: read_tables(given.train, given.dev, (), Columns(), kind="text", regression=False,
                                       held_out_share=0.2),
    )  # fmt: skip
    monkeypatch.setitem(TASKS, "moods", own)
    recipe = with_flags(unit("tiny"), data)
    recipe = replace(recipe, tasks=recipe.tasks | {"moods": JointTask(20, train=(str(table),), batch=4)})
    prepared = recipe.prepare("unit", {})
    assert [task.name for task in prepared.tasks] == [*NAMES, "moods"]
    assert prepared.bundle.labels_of is not None and prepared.bundle.labels_of["moods"] == ["glad", "sad"]
    batch = next(batches[0] for batches in prepared.run.mixture.loader(0, 0, 1, 200) if batches[0].stream == "moods")
    assert prepared.run.method.separate(batch, *prepared.run.method.embed(batch), {}, None)["moods"] > 0  # type: ignore[arg-type]


def test_losses_leave_out_rows_of_a_class_that_training_lacks(data: Path, tmp_path: Path) -> None:
    """None is defined of them; what is said of them is wrong."""
    for name, labels in (("train", "glad sad"), ("dev", "glad new sad new")):
        rows = "".join(f"word {n},{label}\n" for n, label in enumerate(4 * labels.split()))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows)
    train, dev = ((str(tmp_path / f"{name}.csv"),) for name in ("train", "dev"))
    own = JointTask(20, task="text_classification", train=train, dev=dev, batch=4)
    recipe = with_flags(unit("tiny"), data)
    prepared = replace(recipe, tasks={"moods": own}, measure=16).prepare("unit", {})
    found, losses = prepared.held_out(lambda _: None, None)
    final, chance = losses["moods"]
    assert 0 < final < 10 and chance == pytest.approx(math.log(2))
    figure = found.results["moods.dev.accuracy"]
    assert figure.n == 16 and figure.value <= 0.5
    assert found.notes == ["moods, 8 of 16 rows of dev have a class that no training row has (new): counted as wrong"]


def test_tables_of_a_task_are_read_as_the_task_says(data: Path, tmp_path: Path) -> None:
    """Its answers stand under "answer", whatever other column could be one of labels."""
    table = tmp_path / "asked.csv"
    pictures = sorted((data / "scenes" / "vg" / "images").iterdir())
    lines = "".join(f"{each},what is this?,{word},other\n" for each in pictures for word in ("sun", "moon"))
    table.write_text("image,question,answer,category\n" + lines)
    own = JointTask(20, task="question_answering", train=(str(table),), batch=4, min_questions=1)
    recipe = with_flags(unit("tiny"), data)
    prepared = replace(recipe, tasks=recipe.tasks | {"asked": own}).prepare("unit", {})
    assert prepared.bundle.labels_of is not None and set(prepared.bundle.labels_of["asked"]) == {"sun", "moon"}


def test_pictures_with_more_boxes_than_queries_are_told(data: Path) -> None:
    recipe = set_leaves(with_flags(unit("tiny"), data), {"tasks.vg.num_queries": 3})
    notes = recipe.prepare("unit", {}).notes
    rows = next(task for task in recipe.prepare("unit", {}).tasks if task.name == "vg").data.train
    most = [int(rows.usable_M[rows.of(row)].sum()) for row in range(len(rows))]
    more = sum(each > 3 for each in most)
    assert 0 < more < len(rows)
    assert [note for note in notes if "queries" in note] == [
        f"vg: {more} of 12 training pictures have more boxes than its 3 queries can find, at most {max(most)}:"
        f" --tasks.vg.num-queries {max(most)} would hold them all"
    ]


def test_mistakes_are_one_sentence(data: Path, tmp_path: Path) -> None:
    def refused(**tasks: JointTask) -> str:
        recipe = unit("tiny")
        with pytest.raises(TriviumError) as error:
            replace(recipe, tasks=recipe.tasks | tasks).prepare("unit", {})
        return str(error.value)

    assert "there is no task hateful_meme: use one of coco, vg, cola" in refused(hateful_meme=JointTask(2, root="x"))
    assert "boxes of the task vg are not named" in refused(vg=JointTask(1, train=("a.csv",)))
    assert "STS-B is about a number" in refused(stsb=JointTask(12, root=str(data / "glue")))
    with pytest.raises(TriviumError, match="holds none of the folders coco, vg, vqa, snli-ve"):
        set_leaves(unit("tiny"), {"data.scenes": str(tmp_path)}).prepare("unit", {})
    with pytest.raises(TriviumError, match="there is no UniT of size huge"):
        unit("huge")


def test_sentences_of_readers_name_the_flags_of_their_task(data: Path, tmp_path: Path) -> None:
    moods = tmp_path / "moods.csv"
    moods.write_text("text,label\n" + "".join(f"word {n},{'glad' if n % 2 else 'sad'}\n" for n in range(40)))
    (tmp_path / "other.csv").write_text("words,label\na,b\n")
    own = JointTask(20, task="text_classification", batch=4)

    def prepared(**tasks: JointTask) -> Any:
        recipe = with_flags(unit("tiny"), data)
        return replace(recipe, tasks=recipe.tasks | tasks).prepare("unit", {})

    for task, says in (
        ({"vqav2": JointTask(3, min_questions=1000)}, "lower --tasks.vqav2.min-questions"),
        ({"snli_ve": JointTask(9, train=("a.csv",))}, "give --tasks.snli-ve.root DIR, the folder of SNLI-VE"),
        ({"my_moods": replace(own, root=str(tmp_path))}, "name one with --tasks.my-moods.train (CSV"),
        ({"my_moods": replace(own, train=(str(tmp_path / "other.csv"),))}, "are words, label: rename them so that one"),
    ):
        with pytest.raises(TriviumError, match=re.escape(says)) as error:
            prepared(**task)
        assert "--data." not in str(error.value)
    notes = prepared(my_moods=replace(own, train=(str(moods),))).notes
    assert any(note.startswith("my_moods: no --tasks.my-moods.dev is given: ") for note in notes)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("tasks.vg.num_queries", 0, "--tasks.vg.num-queries 0: this must be a whole number of 1 or more"),
        ("tasks.vg.batch", 0, "--tasks.vg.batch 0: this must be a whole number of 1 or more"),
        ("tasks.snli_ve.max_length", 1, "--tasks.snli-ve.max-length 1: this must be 3 tokens or more"),
        ("tasks.qnli.rows", 0, "--tasks.qnli.rows 0: this must be a whole number of 1 or more"),
        ("tasks.vqav2.min_questions", 0, "--tasks.vqav2.min-questions 0: this must be a whole number of 1 or more"),
        ("tasks.vg.ratio", -1.0, "--tasks.vg.ratio -1.0: this must be 0 or more"),
        ("tasks.vg.ratio", math.nan, "--tasks.vg.ratio nan: this must be 0 or more"),
        ("tasks.vg.ratio", math.inf, "--tasks.vg.ratio inf: this must be 0 or more"),
        ("data.augmentation.shorts", [], "--data.augmentation.shorts : this must be one or more whole numbers"),
        ("data.augmentation.before_crop", [0], "--data.augmentation.before-crop 0: this must be one or more whole"),
        ("data.augmentation.crop_sides", [128, 96], "crop-sides 128 96: this must be two whole numbers of 1 or more"),
        ("data.augmentation.crop_sides", [0, 0], "crop-sides 0 0: this must be two whole numbers of 1 or more"),
        ("data.augmentation.flip", 2.0, "--data.augmentation.flip 2.0: this must be a share between 0 and 1"),
        ("data.augmentation.crop", -1.0, "--data.augmentation.crop -1.0: this must be a share between 0 and 1"),
        ("data.short", 0, "--data.short 0: this must be a whole number of 1 or more"),
        ("data.num_scenes", 0, "--data.num-scenes 0: this must be a whole number of 1 or more"),
        (
            "model.num_heads",
            3,
            "a width of 32 cannot be shared by 3 heads: choose --model.num-heads so that it divides",
        ),
        ("model.text_heads", 3, "3 heads: choose --model.text-heads so that it divides --model.text-width"),
        ("model.image_width", 33, "a width of 33 cannot be shared by 2 heads: choose --model.num-heads so that it"),
        ("model.image_width", 34, "--model.image-width 34: this must be a multiple of 4"),
        ("model.backbone_blocks", [1, 1], "gives 2 stages and --model.backbone-widths 4: give both as many numbers"),
        ("model.backbone_blocks", [1, 0, 1, 1], "--model.backbone-blocks 1 0 1 1: this must be one or more whole"),
        ("model.backbone_widths", [8, 8, 8, 20], "GroupNorm makes groups of 8 channels, so each must be a multiple"),
        ("model.decoder_layers", 0, "--model.decoder-layers 0: this must be a whole number of 1 or more"),
        ("model.max_length", 2, "--model.max-length 2: this must be 3 tokens or more"),
        ("measure", 0, "--measure 0: this must be a whole number of 1 or more"),
        ("measure", -1, "--measure -1: this must be a whole number of 1 or more"),
    ],
)
def test_a_value_that_cannot_be_is_refused(data: Path, path: str, value: Any, says: str) -> None:
    with pytest.raises(TriviumError, match=re.escape(says)):
        set_leaves(with_flags(unit("tiny"), data), {path: value}).prepare("unit", {})


def test_the_text_encoder_starts_from_a_bert_or_with_the_rest(data: Path, trained: Path, tmp_path: Path) -> None:
    start = load(trained)
    bert = Bert(BertConfig(24, 2, 40, 2, vocab_size=250, max_length=64)).eval()
    Bundle("bert", bert, start.tokenizer, ImageTransform(32)).save(tmp_path / "bert")
    recipe = replace(with_flags(unit("tiny"), data), init_text=str(tmp_path / "bert"))
    prepared = recipe.prepare("unit", {})
    text = prepared.bundle.model.text  # type: ignore[union-attr]
    assert isinstance(text, Bert) and len(text.state_dict()) > 20
    assert all(torch.equal(tensor, bert.state_dict()[name]) for name, tensor in text.state_dict().items())
    assert any("the text encoder starts as" in note for note in prepared.notes)
    with pytest.raises(TriviumError, match=r"brings a text encoder, and so does .* leave out --init-text"):
        replace(recipe, init=str(trained)).prepare("unit", {})
    Bundle("unit", start.model, None, start.transform).save(tmp_path / "no words")  # as released files are
    with pytest.raises(TriviumError, match="brings a text encoder"):
        replace(recipe, init=str(tmp_path / "no words")).prepare("unit", {})


def test_base_is_the_published_recipe() -> None:
    recipe = unit("base")
    assert recipe.objectives.parts == {"class": 1, "box": 5, "giou": 2, "attributes": 1}
    assert recipe.data.augmentation.jitter == 0
    model = Unit(UnitConfig.of_size("tiny", tasks=PUBLISHED_TASKS[:1]))
    groups = optim.build(model, recipe.optim).param_groups
    assert {(group["full_lr"], group["full_decay"]) for group in groups} == {(5e-5, 1e-4), (1e-5, 1e-4)}
    found = leaves(recipe)
    assert (found["optim.lr"], found["optim.clip_norm"], found["optim.warmup"]) == (5e-5, 0.1, 2000)
    assert found["train.steps"] == 500_000 and {t.batch for t in recipe.tasks.values()} == {64}
    eight = ("coco", "vg", "snli_ve", "vqav2", "qnli", "mnli", "qqp", "sst2")
    assert sum(recipe.tasks[name].ratio for name in eight) == pytest.approx(1.0)
    assert [recipe.tasks[name].number for name in eight] == [0, 1, 9, 3, 5, 6, 8, 7]


def test_base_trains_no_random_weights_behind_frozen_norms(detector: Path, data: Path, tmp_path: Path) -> None:
    """It starts from DETR's backbone, and from none it does not start."""
    small = {"model.backbone_widths": [8, 8, 8, 8], "model.backbone_blocks": [1, 1, 1, 1], "model.num_heads": 4}
    recipe = set_leaves(with_flags(unit("base"), data), small)
    with pytest.raises(TriviumError, match="from a DETR or a UniT with the same backbone: name one with --init, or"):
        recipe.prepare("unit", {})
    shape = replace(recipe.model, tasks=(UnitTask("coco", "detection", "image", 91, 0, 100),), text_layers=0)
    detr = Unit(replace(shape, num_task_tokens=0, residual=False))
    Bundle("unit", detr, None, ImageTransform()).save(tmp_path / "detr")
    prepared = replace(recipe, init=str(tmp_path / "detr")).prepare("unit", {})
    assert f"{tmp_path / 'detr'} is a DETR: its backbone alone is taken, as in the paper" in prepared.notes
    old, new = detr.state_dict(), prepared.bundle.model.state_dict()
    same = {name for name in old if name in new and torch.equal(old[name], new[name]) and old[name].ndim > 1}
    assert same == {name for name in old if name.startswith("image.backbone.") and old[name].ndim > 1}
    alike = replace(shape, backbone_widths=(8, 8, 8, 16))
    Bundle("unit", Unit(alike), None, ImageTransform()).save(tmp_path / "other")
    with pytest.raises(TriviumError, match=r"with the same backbone, and .*other has another: name one with --init"):
        replace(recipe, init=str(tmp_path / "other")).prepare("unit", {})


def test_losses_of_boxes_weigh_what_the_recipe_says(data: Path) -> None:
    recipe = with_flags(unit("tiny"), data)
    assert recipe.objectives.parts == {"class": 3, "box": 5, "giou": 2, "attributes": 1}
    weights = replace(recipe, objectives=replace(recipe.objectives, giou=4)).prepare("unit", {}).run.method.weights
    for task in ("coco", "vg"):
        found = {name.partition(".")[2]: weight for name, weight in weights.items() if name.startswith(f"{task}.")}
        assert found == {"class": 3, "box": 5, "giou": 4} | ({"attributes": 1} if task == "vg" else {})
    with pytest.raises(TriviumError, match=r"--objectives\.box -1"):
        replace(recipe, objectives=replace(recipe.objectives, box=-1)).prepare("unit", {})
    none = {f"objectives.{name}": 0.0 for name in ("classes", "box", "giou", "attributes")}
    with pytest.raises(TriviumError, match=r"every loss of boxes has weight 0.* leave it out, --tasks\.coco\.ratio 0"):
        set_leaves(recipe, none).prepare("unit", {})


def test_a_run_without_any_data_makes_scenes_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = set_leaves(unit("tiny"), {"data.num_scenes": 8, "tasks.vqav2.min_questions": 1})
    prepared = recipe.prepare("unit", {})
    assert [task.name for task in prepared.tasks] == ["coco", "vg", "vqav2", "snli_ve"]
    assert len(prepared.tasks[0].data.train) == 8


def test_boxes_are_measured_with_no_more_pictures_at_once_than_are_trained(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card that holds no more; and whatever is trained, a few. The figures are the same."""
    at_once: list[int] = []
    detect = Unit.detect

    def watched(self: Unit, pixels_BCHW: torch.Tensor, *args: Any) -> Any:
        at_once.append(len(pixels_BCHW))
        return detect(self, pixels_BCHW, *args)

    monkeypatch.setattr(Unit, "detect", watched)
    figures = []
    for rows, expected in ((3, [2, 2, 2, 2]), (64, [8])):
        changes = {"train.micro_batch": rows, "tasks.vg.batch": 64, "train.evaluate_every": 4}
        recipe = set_leaves(with_flags(unit("tiny"), data), changes)
        recipe = replace(recipe, tasks={"vg": replace(recipe.tasks["vg"], root=str(data / "scenes" / "vg"))})
        recipe = replace(recipe, data=replace(recipe.data, scenes=None, glue=None))
        prepared = recipe.prepare("unit", {})
        measure = prepared.measures(prepared.recipe)
        assert measure is not None
        figures.append(measure(prepared.run.method)["figures"])
        assert at_once == expected
        at_once.clear()
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)


def test_several_may_make_the_scenes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the processes of torchrun do; here threads, which share files as they do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(3) as several:
        assert len(set(several.map(made_scenes, [40] * 3))) == 1
    [folder] = (tmp_path / "trivium").iterdir()
    assert len(list((folder / "coco" / "train2017").iterdir())) == 40
    assert sorted(path.name for path in (folder / "coco").glob("*.json")) == ["scenes-train.json", "scenes-val.json"]


def test_a_start_keeps_the_places_and_anchors_that_its_weights_know(data: Path, tmp_path: Path) -> None:
    """As of one from the time before there were any, whose config says nothing of them."""
    plain = {"model__anchored": "false", "model__place_scale": 1, "model__place_temperature": 10000, "train__steps": 1}
    words = ["--tasks.vg.root", str(data / "scenes" / "vg"), "--tasks.vg.batch", "4"]
    assert trivium("pretrain", "unit", "--out", tmp_path / "old", *words, *flags(**plain)) == 0
    asked = unit("tiny")
    asked = set_leaves(asked, {"tasks.vg.root": str(data / "scenes" / "vg"), "init": str(tmp_path / "old")})
    shape = replace(load(tmp_path / "old").model.config, tasks=(), text_layers=1, anchored=True)  # type: ignore[arg-type]
    [kept] = (tmp_path / "old" / "checkpoints").glob("*/model")
    for given, resumed in ((asked, None), (replace(asked, init=None), kept)):
        shaped = replace(given, model=shape)
        model = shaped.prepare("unit", {"size": "tiny"}, resumed).run.method.model
        assert isinstance(model, Unit)
        assert not model.config.anchored and model.config.place_scale == 1
        expected = load(tmp_path / "old").model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
