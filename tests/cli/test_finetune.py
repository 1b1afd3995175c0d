"""`trivium finetune` from end to end: every kind of task on tiny models, and what a user can do wrong."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trivium
from tests.data.drawn import drawn_picture
from tests.data.test_vqa import lines, vqa
from tests.flava_batches import TINY as TINY_FLAVA
from tests.flava_batches import random_flava
from tests.parity.test_unit_plain import TINY as TINY_UNIT
from tests.recipes.shop import checkpoint, data_of, digests, lines_of
from tests.recipes.shop import flags as of_the_shop
from tests.recipes.shop import trivium as run
from trivium.bundle import Bundle
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.evaluate.results import read, read_notes
from trivium.models.bert import Bert, BertConfig
from trivium.models.flava import Flava
from trivium.models.unit import Unit
from trivium.recipes.unit_start import at_random
from trivium.train import trainer
from trivium.train.initial import initialise
from trivium.train.run import Run

WORDS = [*BERT_SPECIALS, "good", "bad", "fine", "awful", "film", "the", "a", "was", "it", "red", "blue", "two"]
QUICK = {
    "data.batch": 8, "train.steps": 6, "train.evaluate-every": 3, "train.workers": 0, "train.threads": 1,
    "train.precision": "fp32", "train.log-every": 1, "optim.warmup": 0.2, "optim.lr": 0.003, "head.dropout": 0.0,
}  # fmt: skip


def flags(**changes: object) -> list[str]:
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in {**QUICK, **named}.items() for word in (f"--{name}", str(value))]


def saved(folder: Path, family: str, model: torch.nn.Module, **changes: object) -> Path:
    Bundle(family, model, Tokenizer.wordpiece(WORDS), ImageTransform(size=32), **changes).save(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Bert(BertConfig(32, 4, 64, 2, len(WORDS), 16, dropout=0.0))
    initialise(model, 0, 0.1)
    return saved(tmp_path_factory.mktemp("models") / "bert", "bert", model, max_length=16)


@pytest.fixture(scope="module")
def flava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_flava(replace(TINY_FLAVA, vocab_size=len(WORDS)), dtype=torch.float32)
    return saved(tmp_path_factory.mktemp("models") / "flava", "flava", model, max_length=16)


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    rows = [("the film was good", "yes"), ("a fine film", "yes"), ("the film was bad", "no"), ("it was awful", "no")]
    text = "".join(f"{text} {n % 3 * 'the '},{label}\n" for n in range(24) for text, label in rows)
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + text)
    return str(path)


def figures(out: Path) -> dict[str, float]:
    return {name: entry["value"] for name, entry in json.loads((out / "results.json").read_text())["results"].items()}


def finetune(task: str, init: Path, out: Path, *words: object, **changes: object) -> dict[str, float]:
    assert run("finetune", task, "--init", init, "--out", out, *flags(**changes), *words) == 0
    return figures(out)


def test_one_csv_is_enough_and_the_model_that_comes_out_is_used(bert: Path, reviews: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = finetune("text_classification", bert, out, "--data", reviews, "--data.dev", reviews, train__steps=40)
    assert found["text classification.dev.accuracy"] == found["text classification"] == 1.0
    bundle = trivium.load(out)
    assert bundle.labels == ["no", "yes"]
    answers = bundle.answer(texts=["it was bad", "a good film"])
    assert answers.argmax(1).tolist() == [0, 1]
    assert torch.equal(bundle.answer(texts="it was bad"), answers[:1])
    bundle.encode_text(["a film"])  # what the model could before, it can
    predictions = lines_of(out / "predictions" / "dev.jsonl")
    assert len(predictions) == 96
    assert all(line["prediction"] == line["label"] for line in predictions)
    assert predictions[0]["row"].endswith("reviews.csv:line 2")
    probability = float(bundle.answer(texts="the film was good")[0].max())
    assert predictions[0]["probability"] == pytest.approx(probability, abs=1e-4)
    assert (out / "report.html").is_file()


def test_held_out_rows_of_a_class_that_training_lacks_are_wrong_and_told(
    bert: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dev, out = tmp_path / "dev.csv", tmp_path / "run"
    labels = [*3 * ["yes"], *2 * ["no"], *15 * ["perhaps"]]
    dev.write_text(
        "text,label\n" + "".join(f"the film was {word} {n % 7 * 'a '},{word}\n" for n, word in enumerate(labels))
    )
    found = finetune("text_classification", bert, out, "--data", reviews, "--data.dev", dev)
    told = read(out / "results.json")["text classification.dev.accuracy"]
    predictions = lines_of(out / "predictions" / "dev.jsonl")
    assert told.n == 20 and [line["label"] for line in predictions] == labels
    assert found["text classification"] == sum(line["prediction"] == line["label"] for line in predictions) / 20 <= 0.25
    sentence = "15 of 20 rows of dev have a class that no training row has (perhaps): counted as wrong"
    assert sentence in read_notes(out / "results.json")
    said = capsys.readouterr()
    assert sentence in said.err and sentence in said.out and "cannot be read" not in said.out
    assert "where the commonest answer gives 0.1500" in said.out  # "perhaps" cannot be answered
    assert sentence in (out / "report.html").read_text()


def test_a_run_that_is_resumed_chooses_and_ends_as_one_that_was_not(bert: Path, reviews: str, tmp_path: Path) -> None:
    words = ("--data", reviews, "--train.save-every", 2, "--train.keep-last", 9)
    finetune("text_classification", bert, tmp_path / "straight", *words, dropout=0.1)
    for again in ("finetune", "pretrain"):
        out = tmp_path / again
        finetune("text_classification", bert, out, *words, dropout=0.1)
        for step in (4, 6):
            (checkpoint(out, step) / "manifest.json").unlink()  # as if they had not come to be
        assert run(again, out, "--resume") == 0
        assert digests(checkpoint(out, 6)) == digests(checkpoint(tmp_path / "straight", 6))
        assert figures(out)["text classification"] == figures(tmp_path / "straight")["text classification"]


def test_the_teacher_of_distillation_is_resumed_too(bert: Path, reviews: str, tmp_path: Path) -> None:
    words = ("--data", reviews, "--train.save-every", 2, "--distillation.alpha", 0.4, "--distillation.reach", 3)
    finetune("text_classification", bert, tmp_path / "straight", *words)
    out = tmp_path / "again"
    finetune("text_classification", bert, out, *words)
    kept = load_file(checkpoint(out, 6) / "training" / "method.safetensors")
    assert {"teacher.copy.backbone.encoder.blocks.0.attention.qkv.weight", "teacher.copy.head.inner.weight"} <= set(
        kept
    )
    (checkpoint(out, 6) / "manifest.json").unlink()  # as if it had not come to be
    assert run("finetune", out, "--resume") == 0
    assert digests(checkpoint(out, 6)) == digests(checkpoint(tmp_path / "straight", 6))


def test_the_best_checkpoint_is_kept_beyond_the_last_ones_and_measured(
    bert: Path, reviews: str, tmp_path: Path
) -> None:
    """A rate that grows a hundredfold ruins the model after its first evaluations: the last is not the best."""
    words = ("--data", reviews, "--data.dev", reviews, "--train.keep-last", 1, "--optim.final", 100)
    out = tmp_path / "run"
    found = finetune("text_classification", bert, out, *words, train__patience="null", train__steps=40)
    values = {
        e["step"]: e["results"]["figures"]["dev.accuracy"] for e in lines_of(out / "metrics.jsonl") if "results" in e
    }
    best = max(values, key=lambda step: (values[step], -step))
    assert found["text classification"] == values[best] > values[40]
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == sorted({checkpoint(out, best).name, checkpoint(out, 40).name})
    theirs = (checkpoint(out, best) / "model" / "model.safetensors").read_bytes()
    assert (out / "model" / "model.safetensors").read_bytes() == theirs
    assert run("evaluate", out) == 0  # measures what was chosen, not what came last
    assert figures(out)["text classification"] == found["text classification"]


def test_patience_ends_a_run_and_resuming_does_not_begin_it_again(
    bert: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    finetune("text_classification", bert, out, "--data", reviews, optim__lr=0.0, train__steps=60, train__patience=2)
    assert "stopped after step 9 of 60" in capsys.readouterr().out  # best at 3, no better at 6 and 9
    assert checkpoint(out, 9).is_dir()
    assert run("finetune", out, "--resume") == 0
    steps = [entry["step"] for entry in lines_of(out / "metrics.jsonl") if "results" not in entry]
    assert max(steps) == 9


def test_several_seeds_have_a_folder_each_and_a_median(bert: Path, reviews: str, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    words = ("--data", reviews, "--data.test", reviews, "--seeds", 3, "--train.seed", 5)
    found = finetune("text_classification", bert, out, *words)
    each = [figures(out / f"seed-{seed}")["text classification"] for seed in (5, 6, 7)]
    assert found["text classification.median"] == sorted(each)[1]
    assert (found["text classification.lowest"], found["text classification.highest"]) == (min(each), max(each))
    whole = [read(out / f"seed-{seed}" / "results.json")["text classification"] for seed in (5, 6, 7)]
    median = read(out / "results.json")["text classification.median"]
    assert median.low is not None
    assert median in whole, "with the interval of the run in the middle"
    [notes] = {tuple(read_notes(path)) for path in out.glob("**/results.json")}
    assert notes[0].startswith("leakage: 80 of 96 rows of test stand"), "the median is of the same rows"
    heads = [(out / f"seed-{seed}" / "model" / "head.safetensors").read_bytes() for seed in (5, 6, 7)]
    assert len(set(heads)) == 3
    shutil.rmtree(out / "seed-7")  # as if it had not been begun
    assert run("finetune", out, "--resume") == 0
    assert figures(out)["text classification.median"] == found["text classification.median"]
    assert (out / "seed-7" / "model" / "head.safetensors").read_bytes() == heads[2]


def test_a_signal_stops_all_seeds_and_they_go_on(
    bert: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "runs", trainer.one_step

    def one_step(recipe: Run, optimizer: torch.optim.Optimizer, step: int, *rest: Any) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(recipe, optimizer, step, *rest)

    monkeypatch.setattr(trainer, "one_step", one_step)
    words = ("--init", bert, "--out", out, "--seeds", 2, *flags(), "--data", reviews)
    assert run("finetune", "text_classification", *words) == 0
    assert (out / "seed-0" / "checkpoints" / "step-00000004").is_dir() and not (out / "seed-1").exists()
    assert not (out / "results.json").exists()
    monkeypatch.undo()
    assert run("finetune", out, "--resume") == 0
    assert "text classification.median" in figures(out)


def test_seeds_that_never_began_leave_nothing_in_the_way(
    bert: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    words, seeds = ["finetune", "text_classification", "--init", bert, "--out", out, *flags()], ["--seeds", 2]
    assert run(*words, *seeds, "--data", tmp_path / "none.csv") == 2
    assert "none.csv" in capsys.readouterr().err
    assert run(*words, *seeds, "--data", reviews) == 0
    assert "text classification.median" in figures(out)
    for again in (seeds, []):  # one run alone would replace the median just the same
        assert run(*words, *again, "--data", reviews) == 2
        assert "holds runs of several seeds already" in capsys.readouterr().err


def test_seeds_are_not_begun_around_a_run_that_stands_there(
    bert: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    finetune("text_classification", bert, out, "--data", reviews)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert {"results.json", "outcomes.parquet"} <= before.keys()
    words = ["--init", bert, "--out", out, "--data", reviews, *flags()]
    assert run("finetune", "text_classification", *words, "--seeds", 2) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_test_split_without_its_pictures_costs_itself_alone(
    flava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = pictures(tmp_path), tmp_path / "run"
    test = tmp_path / "test.csv"
    test.write_text("image,caption,label\ngone.png,a film,red\nlost.png,a film,blue\n")
    more = ("--data", data, "--data.dev", data, "--data.test", test, "--train.bad-rate", 1)
    found = finetune("image_text_classification", flava, out, *more)
    assert "classification of a picture and a text.dev.accuracy" in found
    assert not any(".test." in name for name in found)
    told = capsys.readouterr().out
    assert "test: none of its rows can be read; the first: " in told and "gone.png does not exist" in told


def test_a_dev_split_without_its_pictures_is_found_before_training(
    flava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, dev = pictures(tmp_path), tmp_path / "run", tmp_path / "dev.csv"
    dev.write_text("image,caption,label\ngone.png,a film,red\nlost.png,a film,blue\n")
    words = ["--init", flava, "--out", out, "--data", data, "--data.dev", dev, *flags()]
    assert run("finetune", "image_text_classification", *words) == 2
    told = capsys.readouterr().err
    assert "dev: none of its first 2 rows can be read; the first: " in told and "gone.png does not exist" in told
    assert not out.exists()


def test_what_training_and_held_out_rows_share_is_said(
    bert: Path, flava: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune("text_classification", bert, tmp_path / "texts", "--data", reviews, "--data.dev", reviews)
    told = capsys.readouterr()
    assert "leakage: 96 of 96 rows of dev stand, in the same letters, in training" in told.out
    assert "leakage" not in told.err, "neither start nor resume waits for it"
    assert "texts that training and held-out rows have in common" in told.err
    assert "leakage: 96 of 96" in (tmp_path / "texts" / "report.html").read_text(encoding="utf-8")
    [note] = read_notes(tmp_path / "texts" / "results.json")
    assert note.startswith("leakage: 96 of 96 rows of dev"), "for whoever reads the figures without the page"
    data = pictures(tmp_path)
    words = ("--data", data, "--data.dev", data, "--train.bad-rate", 1)
    finetune("image_text_classification", flava, tmp_path / "pictures", *words)
    told = capsys.readouterr()
    assert "rows of dev show a picture that stands, equal to the pixel, in training" in told.out
    assert "pictures that training and held-out rows have in common" in told.err


def test_layer_decay_and_freezing_reach_the_model_and_not_the_head(bert: Path, reviews: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--data", reviews, "--optim.layer-decay", 0.5, "--optim.freeze", "backbone.embeddings.*")
    finetune("text_classification", bert, out, *words)
    before, after = trivium.load(bert).model.state_dict(), trivium.load(out).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("embeddings.") for name in moved)
    assert "encoder.blocks.0.attention.qkv.weight" in moved
    groups = json.loads((checkpoint(out, 6) / "training" / "optimizer.json").read_text())["groups"]
    assert sorted({group["full_lr"] for group in groups}) == pytest.approx([0.003 / 4, 0.003 / 2, 0.003])


def test_a_head_goes_on_where_the_labels_are_the_same_by_name(
    bert: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    finetune("text_classification", bert, first, "--data", reviews, "--data.dev", reviews, train__steps=40)
    folder = first / "model"
    before = trivium.load(folder).answer(texts="it was bad")
    turned = trivium.load(folder)  # the same model with its classes in another order
    turned.labels = ["yes", "no"]
    assert turned.head is not None
    for part in ("weight", "bias"):
        tensor = turned.head.get_parameter(f"decoder.{part}")
        tensor.data = tensor.data.flip(0)
    turned.save(tmp_path / "turned")
    capsys.readouterr()
    found = finetune(
        "text_classification", tmp_path / "turned", tmp_path / "second", "--data", reviews, "--data.dev", reviews,
        optim__lr=0.0,
    )  # fmt: skip
    assert found["text classification"] == 1.0
    told = capsys.readouterr().err
    assert "its labels matched by name" in told
    assert "no higher than before training (1): the model that it began with is at least as good" in told
    torch.testing.assert_close(trivium.load(tmp_path / "second").answer(texts="it was bad"), before)
    other = tmp_path / "other.csv"
    other.write_text("text,label\nthe film,one\na film,two\n" * 8)
    finetune("text_classification", tmp_path / "turned", tmp_path / "third", "--data", other, "--data.dev", other)
    assert "does not fit: a new one is drawn" in capsys.readouterr().err
    first_line = lines_of(tmp_path / "third" / "metrics.jsonl")[0]
    assert first_line["step"] == 1, "what a new head says before training is nobody's model"


def test_a_task_that_is_not_learned_is_told_so(
    bert: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of four rows are of one class, so guessing that costs 0.5623."""
    table = tmp_path / "unequal.csv"
    table.write_text("text,label\n" + "the film was,one\nthe film was,one\nthe film was,one\nthe film was,two\n" * 8)
    words = ("--data", table, "--data.dev", table, "--train.monitor-every", 4)
    finetune("text_classification", bert, tmp_path / "same", *words, train__steps=16)
    sentence = next(line for line in capsys.readouterr().out.splitlines() if "guessing" in line)
    assert "(text_classification): text_classification is 0." in sentence and "guessing gives 0.5623" in sentence
    finetune("text_classification", bert, tmp_path / "told", "--data", reviews, "--data.dev", reviews, *words[4:],
             train__steps=60, optim__lr=0.01)  # fmt: skip
    lines = [line for line in lines_of(tmp_path / "told" / "monitors.jsonl") if line["monitor"] == "chance"]
    assert lines[-1]["value"] < 0.8 and not lines[-1]["crossed"]


def pictures(folder: Path) -> str:
    from PIL import Image

    rows = ["image,caption,label"]
    for n in range(12):
        colour = ("red", "blue")[n % 2]
        Image.new("RGB", (32, 32), colour).save(folder / f"{n}.png")
        rows.append(f"{n}.png,a film,{colour}")
    (folder / "broken.png").write_bytes(b"no picture")
    rows.append("broken.png,it was,red")
    path = folder / "pictures.csv"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("task", "words", "title"),
    [
        ("image_classification", (), "image classification"),
        ("image_text_classification", (), "classification of a picture and a text"),
        (
            "image_text_classification",
            ("--head.fusion", "concatenated"),
            "classification of a picture and a text (concatenated)",
        ),
    ],
)
def test_pictures_are_learned_and_a_broken_one_is_counted(
    flava: Path, tmp_path: Path, task: str, words: tuple, title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = pictures(tmp_path), tmp_path / "run"
    more = ("--data", data, "--data.dev", data, "--train.bad-rate", 1, *words)
    found = finetune(task, flava, out, *more, train__steps=30)
    assert found[f"{title}.dev.accuracy"] == 1.0
    assert json.loads((out / "results.json").read_text())["results"][title]["n"] == 12
    told = capsys.readouterr().out
    assert "1 of 13 rows of dev, which cannot be read; the first: " in told
    assert "pictures.csv (line 14): it is no picture" in told
    times = len(lines_of(out / "skipped.jsonl"))
    assert times > 1
    replaced = (
        f"1 training sample could not be read and was replaced, {times} times in all; the first: {data} (line 14): "
    )
    [note] = [note for note in read_notes(out / "results.json") if "replaced" in note]
    assert note.startswith(replaced) and f"{note}." in told
    assert note in html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert ("side by side" in told) == bool(words)
    bundle = trivium.load(out)
    assert bundle.labels == ["blue", "red"]
    texts = {} if task == "image_classification" else {"texts": ["a film"] * 2}
    answers = bundle.answer(pictures=[tmp_path / "0.png", tmp_path / "1.png"], **texts)
    assert answers.argmax(1).tolist() == [1, 0]


def test_of_a_flava_that_was_trained_by_contrast_alone_the_head_reads_both_vectors_side_by_side(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it was drawn, the encoder that reads both tells nothing. Whatever trains it, here or later, is remembered."""
    alone = {"objectives__mmm_image": 0, "objectives__mmm_text": 0, "objectives__itm": 0}
    data, task = pictures(tmp_path), "classification of a picture and a text"

    def pretrained(name: str, *words: object, **changes: object) -> Path:
        words = ("--out", tmp_path / name, *data_of(shop), *of_the_shop(train__steps=3, **changes), *words)
        assert run("pretrain", "flava", *words) == 0
        return tmp_path / name

    def read(init: Path, name: str, *words: object) -> tuple[str, str]:
        """What the head reads, and what is said of it."""
        capsys.readouterr()
        words = ("--data", data, "--data.dev", data, "--train.bad-rate", 1, *words)
        found = finetune("image_text_classification", init, tmp_path / name, *words, train__steps=3)
        head = json.loads((tmp_path / name / "model" / "config.json").read_text())["head"]
        assert (f"{task} (concatenated)" in found) == (head["reads"] == "concatenated") == (task not in found)
        told = capsys.readouterr()
        return head["reads"], told.out + told.err

    contrastive = pretrained("contrastive", **alone)
    why = "no loss has trained what this model reads pictures and texts together with"
    reads, told = read(contrastive, "tuned")
    assert reads == "concatenated" and why in told and "reads the pooled picture and the pooled text side by" in told
    assert read(tmp_path / "tuned", "again")[0] == "concatenated", "nothing has trained it since"
    reads, told = read(contrastive, "chosen", "--head.fusion", "fused")
    assert reads == "fused" and why not in told
    assert read(tmp_path / "chosen", "later")[0] == "fused", "the head has trained it"
    longer = pretrained("longer", "--init", contrastive, **alone)
    assert trivium.load(longer).fusion_trained is False
    joint = pretrained("joint", "--init", longer, **alone | {"objectives__mmm_text": 1})
    assert read(joint, "fused")[0] == "fused"
    for model in (contrastive, tmp_path / "chosen" / "model", longer, joint):
        assert trivium.load(model).untrained == ("itm_head",), "none of these has a loss of matching"


def test_a_unit_is_fine_tuned_on_texts_and_on_pictures_with_texts(reviews: str, tmp_path: Path) -> None:
    """Two encoders that share no space: a picture and a text are read side by side."""
    model = Unit(replace(TINY_UNIT, backbone_norm="group", bottleneck=False, backbone_widths=(8, 16, 32),
                         vocab_size=len(WORDS), max_length=16))  # fmt: skip
    at_random(model, 0)
    unit = saved(tmp_path / "unit", "unit", model, max_length=16)
    out = tmp_path / "texts"
    found = finetune(
        "text_classification", unit, out, "--data", reviews, "--data.dev", reviews, train__steps=120,
        train__evaluate_every=20, train__patience="null",
    )  # fmt: skip
    assert found["text classification"] == 1.0
    data, out = pictures(tmp_path), tmp_path / "pictures"
    found = finetune(
        "image_text_classification", unit, out, "--data", data, "--data.dev", data, "--train.bad-rate", 1,
        train__steps=60, train__evaluate_every=20, train__patience="null",
    )  # fmt: skip
    assert found["classification of a picture and a text (concatenated)"] == 1.0
    head = json.loads((out / "model" / "config.json").read_text())["head"]
    assert head["reads"] == "concatenated"


def test_texts_that_are_cut_are_counted(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = tmp_path / "long.csv"
    long.write_text("text,text2,label\n" + "".join(f"{'the ' * 7}{word},{'a ' * 6},{word}\n"
                                                   for word in ("good", "bad")))  # fmt: skip
    words = ("--data", long, "--data.dev", long)
    finetune("text_classification", bert, tmp_path / "single", *words, "--data.max-length", 9, train__steps=3)
    assert "dev: 2 texts have more than 9 tokens and are cut there; the first: " in capsys.readouterr().err
    pair = ("--data.second-text-column", "text2")  # 8 + 6 words, and three more tokens
    finetune("text_classification", bert, tmp_path / "pair", *words, *pair, train__steps=3)
    assert "dev: 2 pairs of texts have more than 16 tokens and are cut there" in capsys.readouterr().err


def test_numbers_come_back_in_their_own_unit(bert: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "scores.csv", tmp_path / "run"
    data.write_text("text,score\n" + "the film was good,90\nthe film was bad,10\n" * 12)
    words = ("--data", data, "--data.dev", data)
    found = finetune("text_regression", bert, out, *words, train__steps=60, train__evaluate_every=60)
    assert found["text regression.dev.pearson"] == found["text regression"] > 0.99
    values = trivium.load(out).answer(texts=["the film was good", "the film was bad"])[:, 0].tolist()
    assert values == pytest.approx([90, 10], abs=15)
    assert trivium.load(out).labels is None


def test_vqa_is_scored_by_people_and_its_answers_go_to_a_file(flava: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    root = vqa(tmp_path / "vqa")
    found = finetune(
        "vqav2", flava, out, "--data", root, "--data.min-questions", 1, "--data.image-size", 32, train__steps=20,
        train__evaluate_every=20, data__batch=2,
    )  # fmt: skip
    assert found["VQAv2.dev.accuracy"] in (0.0, 1.0)  # seven of ten say yes; teal nobody
    answers = json.loads((out / "predictions" / "test_dev.json").read_text())
    assert [answer["question_id"] for answer in answers] == [4]
    assert answers[0]["answer"] in ("teal", "yes")
    assert "VQAv2.test_dev.accuracy" not in found


def test_hateful_memes_is_chosen_by_auroc(flava: Path, tmp_path: Path) -> None:
    (tmp_path / "memes" / "img").mkdir(parents=True)
    for n in range(8):
        (tmp_path / "memes" / "img" / f"{n}.png").write_bytes(drawn_picture(n))
    records = [{"id": n, "img": f"img/{n}.png", "label": n % 2, "text": ("good", "bad")[n % 2]} for n in range(8)]
    for name in ("train", "dev_unseen"):
        lines(tmp_path / "memes" / f"{name}.jsonl", *records)
    told_apart = [each | {"label": 1 - each["label"]} for each in records]  # so that its figure is another
    lines(tmp_path / "memes" / "dev_seen.jsonl", *told_apart)
    out = tmp_path / "run"
    found = finetune("hateful_memes", flava, out, "--data", tmp_path / "memes", data__batch=4)
    assert found["Hateful Memes"] == found["Hateful Memes.dev_unseen.auroc"] != found["Hateful Memes.dev_seen.auroc"]
    config = json.loads((out / "config.json").read_text())
    assert config["values"]["head.hidden"] == 1536
    head = json.loads((out / "model" / "config.json").read_text())["head"]
    assert (head["reads"], head["hidden"], head["task"]) == ("fused", 1536, "hateful_memes")


def test_without_a_dev_split_the_one_to_choose_by_must_be_named(
    flava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flickr30k-images").mkdir()
    (tmp_path / "flickr30k-images" / "a.jpg").write_bytes(drawn_picture(1))
    labels = {"film": "entailment", "cat": "neutral", "good": "contradiction"}
    entries = [{"image": "a", "sentence": f"a {word}", "label": label} for word, label in labels.items()]
    for split in ("train", "test"):
        (tmp_path / f"ve_{split}.json").write_text(json.dumps(entries))
    words = ["finetune", "visual_entailment", "--init", flava, "--data", tmp_path, *flags()]
    assert run(*words, "--out", tmp_path / "run") == 2
    assert (
        "no labelled dev split to choose a checkpoint by, only test: give one, or choose by --select-on test.accuracy"
        in (capsys.readouterr().err)
    )
    assert run(*words, "--out", tmp_path / "run", "--select-on", "test.accuracy") == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_glue_writes_what_its_server_takes(bert: Path, tmp_path: Path) -> None:
    root = tmp_path / "glue" / "RTE"
    root.mkdir(parents=True)
    rows = "".join(f"{n}\tthe film\twas {w}\t{label}\n" for n, (w, label) in enumerate(
        [("good", "entailment"), ("bad", "not_entailment")] * 8))  # fmt: skip
    for name in ("train", "dev"):
        (root / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    (root / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tthe film\twas good\n1\tthe film\twas bad\n")
    out = tmp_path / "run"
    found = finetune("rte", bert, out, "--data", tmp_path / "glue", train__steps=40)
    assert found["RTE"] == found["RTE.dev.accuracy"] == 1.0
    submission = (out / "predictions" / "RTE-test.tsv").read_text()
    assert submission == "index\tprediction\n0\tentailment\n1\tnot_entailment\n"
    answers = trivium.load(out).answer(texts=["the film"] * 2, second_texts=["was bad", "was good"])
    assert answers.argmax(1).tolist() == [1, 0]


Change = Callable[[Path, str], list[object]]


def test_a_warm_up_that_takes_the_whole_of_a_budget_is_refused(
    bert: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--init", bert, "--data", reviews, "--train.steps", 10**6, "--optim.warmup", 10**5]
    assert run("finetune", "text_classification", "--out", tmp_path / "run", *words, "--train.minutes", 1e-4) == 2
    assert "a warm-up of 100000 steps leaves nothing of a run of " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "words", "sentence"),
    [
        ("sst3", [], "there is no task sst3"),
        ("text_classification", ["--init", "NONE"], "no model to fine-tune: name one with --init"),
        ("image_classification", [], "a task of pictures, and a model of the family bert reads none"),
        ("sst2", [], "the data of this task is not named: give --data.root"),
        ("text_classification", ["--data", "REVIEWS", "--select-on", "dev.f2"], "use one of dev.accuracy"),
        ("text_classification", ["--data", "REVIEWS", "--optim.warmup", "50"], "a warm-up of 50 steps leaves nothing"),
        ("text_classification", ["--data", "REVIEWS", "--data.label-column", "kind"], 'no column "kind"'),
        ("text_classification", ["--data", "REVIEWS", "--head.size", "3"], "the recipe has no option head.size"),
        ("text_classification", ["--data", "REVIEWS", "--data.train", "a.csv"], "--data names what --data.train names"),
        ("text_classification", ["--data", "REVIEWS", "--seeds", 2, "--train.seed", "abc"], "takes a whole number"),
        ("text_classification", ["--data", "REVIEWS", "--seeds", 2, "--train.seed", 1, 2], "takes a whole number"),
    ],
)
def test_mistakes_are_one_sentence(
    bert: Path, reviews: str, tmp_path: Path, task: str, words: list, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    init = [] if "NONE" in words else ["--init", bert]
    given = [reviews if word == "REVIEWS" else word for word in words if word not in ("--init", "NONE")]
    base = [] if any("--optim.warmup" in str(word) for word in words) else ["--optim.warmup", 0.1]
    assert run("finetune", task, *init, "--out", tmp_path / "run", "--train.steps", 6, *base, *given) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert sentence in told[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_goes_on_is_named_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    for words, says in (
        (["--init", "bert"], "leave out --init"),
        (["--data", "a.csv"], "leave out --data"),
        (["--out", out], f"leave out --out, and name its folder alone, as in trivium finetune {out} --resume"),
        (["--config", "config.json"], "leave out --config"),
        (["--seeds", 2], "leave out --seeds"),
        ([], "--resume needs the run folder, and sst2 is none: trivium finetune RUN --resume"),
    ):
        assert run("finetune", "sst2", *words, "--resume") == 2
        assert says in capsys.readouterr().err


def test_help_lists_the_fields_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("finetune", "qqp", "--help") == 0
    page = capsys.readouterr().out
    assert "--optim.warmup" in page
    assert "(28318)" in page
    assert "--data.second-text-column" in page


def test_a_foreign_bert_is_fine_tuned_as_it_is(reviews: str, tmp_path: Path) -> None:
    import transformers

    from tests.convert.peers import shuffled

    config = transformers.BertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=1, vocab_size=len(WORDS),
        max_position_embeddings=12,
    )  # fmt: skip
    shuffled(transformers.BertModel(config)).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    found = finetune("text_classification", tmp_path / "hf", tmp_path / "run", "--data", reviews)
    assert 0 <= found["text classification"] <= 1
    assert isinstance(trivium.load(tmp_path / "run").model, Bert)
    assert not isinstance(trivium.load(tmp_path / "run").model, Flava)
