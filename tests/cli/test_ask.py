"""`trivium ask`, and fine-tuning for what it asks: answers that are written, labels, statements on two pictures."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import trivium
from tests.cli.test_finetune import figures, finetune
from tests.flava_batches import TINY as TINY_FLAVA
from tests.flava_batches import random_flava
from tests.recipes.shop import lines_of
from tests.recipes.shop import trivium as run
from trivium.bundle import Bundle
from trivium.data.small_vqa import OTHER, read_daquar
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.evaluate import results, suite
from trivium.evaluate.paper_tasks import SUITES
from trivium.evaluate.reranking import judges
from trivium.evaluate.tuned_runs import TunedRun
from trivium.invariance.albef import TINY, random_albef
from trivium.models.albef_heads import AnswerDecoder, TwoPictures

WORDS = [*BERT_SPECIALS, "what", "colour", "is", "it", "this", "red", "dark", "blue", "both", "are", "one", "two"]
WORDS += ["green", "'", "don", "t", "know"]
COLOURS = {"red": "red", "dark blue": "blue"}  # an answer of one word, and one of two


@pytest.fixture(scope="module")
def albef(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(TINY, vocab_size=len(WORDS), fusion_layers=2)
    bundle = Bundle(
        "albef", random_albef(config, dtype=torch.float32), Tokenizer.wordpiece(WORDS).for_captions(),
        ImageTransform(size=32), max_length=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "albef"
    bundle.save(folder)
    return folder


@pytest.fixture(scope="module")
def flava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_flava(replace(TINY_FLAVA, vocab_size=len(WORDS)), dtype=torch.float32)
    folder = tmp_path_factory.mktemp("models") / "flava"
    Bundle("flava", model, Tokenizer.wordpiece(WORDS), ImageTransform(size=32), max_length=16).save(folder)
    return folder


def questions(folder: Path) -> Path:
    """Two colours, asked for; the last row of a table of its own has an answer that no other has."""
    rows = ["image,question,answer"]
    for number in range(12):
        answer, colour = list(COLOURS.items())[number % 2]
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
        rows.append(f"{number}.png,what colour is it?,{answer}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    (folder / "dev.csv").write_text("\n".join([*rows[:9], "0.png,what is this?,green", "no.png,what is it,red"]) + "\n")
    return folder


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_answers_are_written_ranked_and_asked_for(
    albef: Path, tmp_path: Path, alpha: float, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = questions(tmp_path), tmp_path / "run"
    found = finetune(
        "question_answering", albef, out, "--data", data / "train.csv", "--data.dev", data / "dev.csv",
        "--distillation.alpha", alpha, "--distillation.reach", 5, "--train.patience", "null",
        optim__lr=0.01, train__steps=80,
    )  # fmt: skip
    assert found["question answering.dev.accuracy"] == pytest.approx(8 / 9)  # one answer is in nobody's list
    entry = json.loads((out / "results.json").read_text())["results"]["question answering.dev.accuracy"]
    assert entry["n"] == 9
    told = capsys.readouterr()
    assert "1 of 10 questions have an answer that no training row has" in told.err
    assert "dev.csv (line 10)" in told.err and '"green"' in told.err
    assert "dev.csv (line 11)" in told.out  # the picture that is not there
    bundle = trivium.load(out)  # type: ignore[operator]
    assert isinstance(bundle.head, AnswerDecoder) and bundle.labels == ["dark blue", "red"]
    answers = bundle.ask(data / "0.png", "What colour is it?")
    assert [answer.text for answer in answers] == ["red", "dark blue"]
    assert sum(answer.probability for answer in answers) == pytest.approx(1) and answers[0].probability > 0.7
    many = bundle.answer([data / "0.png", data / "1.png"], ["what colour is it?"] * 2)
    assert many.argmax(1).tolist() == [1, 0]
    assert float(many[0, 1]) == pytest.approx(answers[0].probability, abs=1e-5)
    free = bundle.ask(data / "1.png", "what colour is it", k=2, freely=True)
    assert [each.text for each in free] == ["dark blue", "red"] and free[0].probability > free[1].probability
    assert len(bundle.ask(data / "1.png", "what colour is it", k=10 * len(WORDS), freely=True)) > 2
    with pytest.raises(TriviumError, match="question_answering reads one picture at a time"):
        bundle.ask(data / "1.png", "what colour is it", second_picture=data / "0.png", freely=True)
    other = bundle.ask(data / "1.png", "what colour is it", answers=["green", "blue", "dark blue"], k=2)
    assert other[0].text == "dark blue" and len(other) == 2
    twice = bundle.ask(data / "1.png", "what colour is it", answers=["red", "dark blue", "red"], k=3)
    assert [each.text for each in twice] == ["dark blue", "red"] and twice == bundle.ask(
        data / "1.png", "what colour is it", answers=["red", "dark blue"], k=3
    )
    with pytest.raises(TriviumError, match='no word pieces for the answer "ω": leave it out'):
        bundle.ask(data / "1.png", "what colour is it", answers=["red", "ω"])
    with pytest.raises(TriviumError, match=r"has more than the \d+ tokens that are read"):
        bundle.ask(data / "1.png", "what colour is it", answers=["red", "blue " * 40])
    words = ("--image", data / "0.png", "--question", "what colour is it?", "-k", 1)
    assert run("ask", out, *words) == 0
    assert capsys.readouterr().out.split()[1] == "red"
    assert run("convert", out, "--to", "albef", "--out", tmp_path / "official") == 0  # words and answers go with it
    capsys.readouterr()
    assert run("ask", tmp_path / "official", *words) == 0
    assert capsys.readouterr().out.split()[1] == "red"
    official = trivium.load(tmp_path / "official")  # type: ignore[operator]
    for name in ("task", "ranked", "first_word_twice"):
        assert getattr(official.head_config, name) == getattr(bundle.head_config, name)
    assert official.max_length == bundle.max_length
    (tmp_path / "official" / "tokenizer.json").unlink()  # who reads vocab.txt and its settings reads the same
    assert trivium.load(tmp_path / "official").tokenizer.encode(["What COLOUR?"], 9) == bundle.tokenizer.encode(  # type: ignore[operator]
        ["what colour"], 9
    )
    (tmp_path / "list.json").write_text('["green", "dark blue"]')
    assert run("ask", out, *words, "--answers", tmp_path / "list.json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    (tmp_path / "list.txt").write_text("green\n")
    assert run("ask", out, *words, "--answers", tmp_path / "list.txt") == 2
    assert "holds 1 answers: two at least" in capsys.readouterr().err
    assert run("ask", out, "--image", tmp_path / "no.jpg", "--question", "what?") == 2
    assert "there is no such picture" in capsys.readouterr().err
    assert run("ask", out, "--image", data / "0.png", "--question", "what colour is it " * 8) == 0
    assert capsys.readouterr().err == (
        "trivium: note: the question is longer than the 16 tokens that this model reads: its first 15 of 32 words and"
        " marks are read, the others are not\n"
    )
    for freely in ([], ["--freely"]):
        assert run("ask", out, "--image", data / "0.png", "--question", "???", *freely) == 2
        assert 'the question "???" holds nothing that this model reads' in capsys.readouterr().err
    with pytest.raises(TriviumError, match='the question "!" holds nothing that this model reads, only marks that'):
        bundle.ask(data / "0.png", "!")
    with pytest.warns(UserWarning, match="its first 15 of 16 words and marks are read"):
        bundle.ask(data / "0.png", "is it " * 8)
    assert run("ask", albef, *words) == 2
    assert "no head for a task: fine-tune it first" in capsys.readouterr().err


def test_a_writer_goes_on_from_a_writer_and_a_blind_one_knows_the_commonest(
    albef: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = questions(tmp_path)
    words = ("--data", data / "train.csv", "--data.dev", data / "train.csv")
    finetune("question_answering", albef, tmp_path / "one", *words, optim__lr=0.01, train__steps=40)
    capsys.readouterr()
    found = finetune("question_answering", tmp_path / "one" / "model", tmp_path / "two", *words, optim__lr=0.0)
    assert "the writer of answers starts as it was trained" in capsys.readouterr().err
    assert found["question answering"] == 1.0
    blind = finetune("question_answering", albef, tmp_path / "blind", *words, "--data.blank-pictures", "true",
                     optim__lr=0.01, train__steps=40)  # fmt: skip
    assert blind["question answering"] == 0.5  # both answers are as common, and all that is seen is grey


def test_it_is_told_where_a_head_of_albefs_own_reads_through_what_nothing_has_trained(
    albef: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contrastive = tmp_path / "contrastive"
    replace(trivium.load(albef), fusion_trained=False).save(contrastive)  # type: ignore[operator]
    data, pairs = questions(tmp_path), statements(tmp_path / "nlvr2")
    asked = ("question_answering", "--data", data / "train.csv", "--data.dev", data / "train.csv")
    judged = ("nlvr2", "--data", pairs, *NLVR2)
    why = "no loss has trained what this model reads pictures and texts together with, and this head reads through it"
    for number, (init, (task, *words), reads, told) in enumerate([
        (contrastive, asked, "states", True), (contrastive, judged, "two_pictures", True),
        (contrastive, (*asked, "--head.fusion", "fused"), "states", False), (albef, asked, "states", False),
    ]):  # fmt: skip
        finetune(str(task), init, tmp_path / f"{number}", *words, train__steps=3)
        head = json.loads((tmp_path / f"{number}" / "model" / "config.json").read_text())["head"]
        assert (head["reads"], why in capsys.readouterr().err) == (reads, told)
        tuned = trivium.load(tmp_path / f"{number}")  # type: ignore[operator]
        assert tuned.fusion_trained is True
        assert judges(tuned) == (init == albef), "these tasks train the fusion, and not the matching head"


def test_a_model_with_labels_is_asked_too(albef: Path, flava: Path, tmp_path: Path) -> None:
    data = questions(tmp_path)
    words = ("--data", data / "train.csv", "--data.dev", data / "train.csv")
    for model, more in ((flava, ()), (albef, ("--head.answers", "scored"))):
        out = tmp_path / model.name
        found = finetune("question_answering", model, out, *words, *more, optim__lr=0.01, train__steps=60)
        assert found["question answering"] == 1.0
        bundle = trivium.load(out)  # type: ignore[operator]
        [first] = bundle.ask(data / "0.png", "what colour is it?", k=1)
        assert first.text == "red" and first.probability > 0.5
        with pytest.raises(TriviumError, match="chooses among its labels and writes nothing"):
            bundle.ask(data / "0.png", "what colour is it?", answers=["red", "green"])
    assert run("finetune", "question_answering", "--init", flava, "--head.answers", "written",
               "--out", tmp_path / "no", *words) == 2  # fmt: skip


@pytest.mark.parametrize("way", ["auto", "scored"])
def test_an_albef_writes_answers_of_small_sets_unless_they_are_to_be_scored(
    way: str, albef: Path, tmp_path: Path
) -> None:
    """A held-out question with an answer that training has not is never right, and its answer never given."""
    shades = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    pictures = {f"{number}.png": list(shades)[number % 2] for number in range(40)}
    encoded = []
    for name in pictures.values():
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), shades[name]).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    pq.write_table(pa.table({"file": list(pictures), "image": encoded}), tmp_path / "train.parquet")
    asked = [{"file": file, "question": "what colour is it?", "answer": [name]} for file, name in pictures.items()]
    held = {row.image for row in read_daquar(str(written(tmp_path, asked))).held_out["dev"].good()}
    odd = {"file": next(iter(held)), "question": "what colour is it?", "answer": ["mauve"]}
    written(tmp_path, [*asked, odd])
    found = finetune("daquar", albef, tmp_path / "out", "--data", tmp_path, "--head.answers", way,
                     optim__lr=0.01, train__steps=60)  # fmt: skip
    assert found["DAQUAR"] == pytest.approx(len(held) / (len(held) + 1))
    bundle = trivium.load(tmp_path / "out")  # type: ignore[operator]
    assert bundle.head_config.gives == {"auto": "text", "scored": "class"}[way]
    red = next(tmp_path.joinpath(file) for file, name in pictures.items() if name == "red")
    red.write_bytes(encoded[list(pictures).index(red.name)])
    assert bundle.ask(red, "what colour is it?", k=1)[0].text == "red"
    assert (OTHER in bundle.labels) == (way == "scored")


def written(folder: Path, asked: list[dict[str, Any]]) -> Path:
    (folder / "qa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    return folder


def test_what_is_said_of_written_answers_is_refused_where_none_are_written(
    albef: Path, flava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = questions(tmp_path)
    words = ("--data", data / "train.csv", "--out", tmp_path / "no")
    for task, model, flag, value, says in (
        ("image_text_classification", albef, "--head.answers", "written", "gives is a class, not an answer"),
        ("question_answering", flava, "--head.ranked", "7", "--head.ranked is of a head that writes its answers"),
        ("image_text_classification", albef, "--head.first-word-twice", "true", "--head.first-word-twice is of"),
    ):
        assert run("finetune", task, "--init", model, flag, value, *words) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def statements(folder: Path) -> Path:
    """NLVR2 in its official layout: whether both pictures are red."""
    for part, number in (("train", 8), ("dev", 4)):
        lines = []
        for pair in range(number):
            colours = [("red", "red"), ("red", "blue"), ("blue", "red"), ("blue", "blue")][pair % 4]
            for side, colour in enumerate(colours):
                path = folder / (f"images/train/7/train-{pair}-0-img{side}.png" if part == "train"
                                 else f"dev/dev-{pair}-0-img{side}.png")  # fmt: skip
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), colour).save(path)
            lines.append({"identifier": f"{part}-{pair}-0-1", "sentence": "both are red",
                          "label": str(colours == ("red", "red")), "directory": 7})  # fmt: skip
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{part}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


NLVR2 = ("--data.image-size", 32, "--data.flip", 0, "--data.crop-scale", 1, 1, "--train.patience", "null")


@pytest.mark.parametrize("family", ["albef", "flava"])
def test_a_statement_on_two_pictures_is_learned_and_asked(
    albef: Path, flava: Path, tmp_path: Path, family: str
) -> None:
    data, out = statements(tmp_path / "nlvr2"), tmp_path / "run"
    model = {"albef": albef, "flava": flava}[family]
    found = finetune(
        "nlvr2", model, out, "--data", data, *NLVR2, optim__lr=0.01, train__steps=240, train__evaluate_every=20
    )
    assert found["NLVR2.dev.accuracy"] == found["NLVR2"] == 1.0
    bundle = trivium.load(out)  # type: ignore[operator]
    task = next(task for task in SUITES["albef"] if task.name == "NLVR2")
    measured = results.read(out / "results.json")
    [suited] = suite.run([task], bundle, None, tmp_path, fine_tuned=[TunedRun(out, measured)]).tasks
    assert suited.state == "read" and suited.figure(task.figures[0]) == measured["NLVR2.dev.accuracy"]
    assert isinstance(bundle.head, TwoPictures) == (family == "albef")
    red, blue = (data / f"dev/dev-{pair}-0-img0.png" for pair in (0, 3))
    assert bundle.ask(red, "both are red", second_picture=red)[0].text == "True"
    assert bundle.ask(red, "both are red", second_picture=blue)[0].text == "False"
    with pytest.raises(TriviumError, match="reads two pictures at once: give the second"):
        bundle.ask(red, "both are red")
    assert run("ask", out, "--image", red, "--second-image", blue, "--question", "both are red") == 0


def test_text_assignment_prepares_for_two_pictures(
    albef: Path, flava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colours = ["red", "blue", "green"]
    for colour in colours:
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
    pairs = [{"image": f"{colour}.png", "caption": [f"this is {colour}", "it"]} for colour in colours * 4]
    table = tmp_path / "pairs.json"
    table.write_text(json.dumps([*pairs, {"image": "red.png"}]))
    out = tmp_path / "assigned"
    words = ("--data", table, "--data.dev", table, "--data.image-size", 32, "--data.flip", 0, "--train.bad-rate", 1,
             "--train.patience", "null")  # fmt: skip
    found = finetune("text_assignment", albef, out, *words, optim__lr=0.01, train__steps=150, train__evaluate_every=50,
                     data__batch=12, distillation__alpha=0.4)  # fmt: skip
    assert "text assignment" in found
    losses = [line["losses"]["text_assignment"] for line in lines_of(out / "metrics.jsonl") if "losses" in line]
    assert all(abs(loss - math.log(3)) < 0.05 for loss in losses[:5]), losses[:5]  # chance, of three
    assert all(0 < loss < 3 for loss in losses) and len(set(losses)) > 100
    told = capsys.readouterr()
    assert "never learned" not in told.err
    assert "without distillation: of text assignment there is none" in told.err
    assert "pairs.json (entry 12)" in told.err and 'has no "caption|captions|text|title"' in told.err
    assert trivium.load(out).labels == ["first", "second", "neither"]  # type: ignore[operator]
    nlvr2 = finetune("nlvr2", out / "model", tmp_path / "run", "--data", statements(tmp_path / "nlvr2"), *NLVR2)
    assert "second blocks start as they were trained for text_assignment" in capsys.readouterr().err
    assert "NLVR2.dev.accuracy" in nlvr2
    for more, says in (
        (("--data.image-size", 30), "a picture of 30 pixels cannot be cut into patches of 8"),
        (("--data.batch", 192, "--train.micro-batch", 96), "micro-batches of 96 pairs cut pools of 64 in two"),
        (("--data.batch", 12, "--train.micro-batch", 2), "in a micro-batch of 2 no text has two other pictures"),
    ):
        more = (*words[:4], "--optim.warmup", 0, *more)
        assert run("finetune", "text_assignment", "--init", albef, "--out", tmp_path / "no", *more) == 2
        assert says in capsys.readouterr().err
    assert run("finetune", "text_assignment", "--init", flava, "--out", tmp_path / "no", *words) == 2
    assert "prepares ALBEF for two pictures, and flava is fine-tuned" in capsys.readouterr().err


def vqa_of_albef(root: Path, entries: list[dict]) -> Path:
    root.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(root / "0.png")
    (root / "vg").mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(root / "vg" / "0.png")
    good = {"question_id": 1, "question": "what colour is it?", "image": "0.png", "dataset": "vqa",
            "answer": ["red"] * 7 + ["dark blue"] * 3}  # fmt: skip
    genome = {"question_id": 2, "question": "what is it?", "image": "0.png", "dataset": "vg", "answer": "two"}
    (root / "vqa_train.json").write_text(json.dumps([good, *entries]))
    (root / "vg_qa.json").write_text(json.dumps([genome]))
    (root / "vqa_val.json").write_text(json.dumps([good]))
    (root / "vqa_test.json").write_text(json.dumps([{**good, "answer": None, "question_id": 9}]))
    (root / "answer_list.json").write_text(json.dumps(["red", "dark blue", "don't know", "plaid", "red " * 40]))
    return root


def test_albefs_own_files_are_read_and_what_is_wrong_is_told_by_entry(
    albef: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"question_id": 3, "question": "what is it?", "image": "0.png", "dataset": "vqa", "answer": ["red"] * 10}
    root = vqa_of_albef(tmp_path / "vqa", [
        {name: value for name, value in good.items() if name != "answer"},
        {**good, "image": "absent.png"},
        {**good, "question": "what " * 40},
        {**good, "answer": ["green"] * 10},
    ])  # fmt: skip
    out = tmp_path / "run"
    found = finetune("vqa", albef, out, "--data", root, "--data.image-size", 32, "--data.max-length", 12,
                     "--train.bad-rate", 1, data__batch=5, train__steps=4, train__evaluate_every=4)  # fmt: skip
    assert "VQAv2.dev.accuracy" in found
    told = capsys.readouterr().err
    assert 'vqa_train.json (entry 1): it has no "answer"' in told
    assert "train: 1 texts have more than 12 tokens and are cut there; the first: " in told and "(entry 3)" in told
    assert "2 of 6 questions have no answer that is in the list" in told and '(entry 4), "green"' in told
    assert any("absent.png" in line["sample"] for line in lines_of(out / "skipped.jsonl"))
    assert "answers of the list have more than" in told and '"red red red' in told
    assert "1 of 5 answers hold what the vocabulary has no word piece for" in told and '"plaid"' in told
    assert trivium.load(out).labels == ["red", "dark blue", "don't know", "plaid", ("red " * 40).strip()]  # type: ignore[operator]
    submission = json.loads((out / "predictions" / "test.json").read_text())
    assert [answer["question_id"] for answer in submission] == [9]
    assert figures(out)["VQAv2"] == found["VQAv2.dev.accuracy"]
    (root / "answer_list.json").write_text('["red", 3]')
    assert run("finetune", "vqa", "--init", albef, "--data", root, "--out", tmp_path / "no") == 2
    assert "answer_list.json (entry 1) is no answer" in capsys.readouterr().err


def test_answers_keep_their_marks_where_captions_lose_them() -> None:
    captions = Tokenizer.wordpiece(WORDS).for_captions()
    answers = captions.for_answers()
    end = captions.sep_id
    assert captions.encode(["don't know"], 9)[0][-1] != end
    assert [WORDS[n] for n in answers.encode(["Don't know"], 9)[0]] == ["[CLS]", "don", "'", "t", "know", "[SEP]"]
    assert answers.encode(["red " * 9], 4)[0][-1] == end
    plain = Tokenizer.wordpiece(WORDS)
    assert plain.for_answers() is plain
