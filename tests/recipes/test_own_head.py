"""ALBEF's fine-tuned files, converted and scored by `trivium evaluate` on the official annotation files of their task:
every figure as a plain loop over the rows gives it."""

from __future__ import annotations

import csv
import errno
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import trivium
from tests.convert.test_albef import GRID, PATCH, VOCABULARY, official
from tests.data.test_referring import PICTURE, refer_folder
from tests.evaluate.datasets.test_captions import CAPTIONS, coco, flickr
from tests.recipes.shop import trivium as run
from trivium.bundle import Bundle
from trivium.data.tokenizer import BERT_SPECIALS

WORDS = [*BERT_SPECIALS, "picture", "caption", *map(str, range(5)), "a", "the", "dog", "cat", "red", "blue", "is", "it"]
WORDS += ["what", "both", "are", "man", "in", "guy", "corner", "yes", "no"]
SENTENCES = ["a red dog", "the cat is blue", "it is a dog", "both are red", "what is it", "the blue cat is the red dog"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def converted(kind: str, folder: Path, *, answers: list[str] | None = None, seed: int = 5) -> Path:
    """A released file with random weights, written again by `trivium convert`, its words beside it."""
    torch.manual_seed(seed)
    theirs = official(kind)
    for name, tensor in theirs.items():  # so that rows differ in what is said of them
        if name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            tensor += 1
        elif name.startswith("text_encoder") and tensor.ndim == 2 and tensor.is_floating_point():
            tensor *= 4
    if kind == "vqa":
        theirs["text_decoder.cls.predictions.decoder.weight"] = theirs[
            "text_decoder.bert.embeddings.word_embeddings.weight"
        ].clone()
    folder.mkdir()
    whole = theirs if kind == "refcoco" else {"model": theirs}
    torch.save(whole, folder / f"{kind}.pth")
    (folder / "vocab.txt").write_text("\n".join(WORDS + [f"w{n}" for n in range(VOCABULARY - len(WORDS))]) + "\n")
    if answers is not None:
        (folder / "answer_list.json").write_text(json.dumps(answers))
    to = {"retrieval": "albef-retrieval", "refcoco": "albef-grounding"}.get(kind, "albef")
    assert run("convert", folder / f"{kind}.pth", "--to", to, "--out", folder / "model") == 0
    for name in ("vocab.txt", "answer_list.json"):
        if (folder / name).is_file():
            (folder / "model" / name).write_bytes((folder / name).read_bytes())
    return folder / "model"


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Parts that a file lacks are drawn, and that is said."""
    import warnings

    warnings.simplefilter("ignore", UserWarning)


def opened(model: Path) -> Bundle:
    return trivium.load(model)  # type: ignore[operator, no-any-return]


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (GRID * PATCH, GRID * PATCH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    path.with_suffix(".png").rename(path)  # whatever it is called: without loss
    return path


def evaluated(model: Path, root: Path, out: Path, task: str, *words: object) -> dict[str, float]:
    assert run("evaluate", model, "--suite", "albef", "--task", task, "--data.root", root, "--out", out, *words) == 0
    entries = json.loads((out / "results.json").read_text())["results"]
    return {name: entry["value"] for name, entry in entries.items() if not name.startswith("seconds")}


def said(cache: Path, split: str, suffix: str = ".jsonl") -> list[dict[str, object]]:
    [path] = cache.glob(f"**/predictions/{split}{suffix}")
    text = path.read_text()
    return json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines()]  # type: ignore[no-any-return]


def test_entailment_by_the_heads_own_order_of_labels(tmp_path: Path, cache: Path) -> None:
    model, root = converted("ve", tmp_path / "ve"), tmp_path / "data"
    told = ["entailment", "neutral", "contradiction"]
    rows = [{"image": str(n % 3), "sentence": text, "label": told[n % 3]} for n, text in enumerate(SENTENCES)]
    for number in range(3):
        picture(root / "flickr30k-images" / f"{number}.jpg", number)
    for split, some in (("dev", rows[:4]), ("test", rows)):
        (root / f"ve_{split}.json").write_text(json.dumps(some))  # no training file is asked for
    found = evaluated(model, root, tmp_path / "out", "SNLI-VE")
    theirs = torch.load(tmp_path / "ve" / "ve.pth")["model"]
    bundle, chosen = opened(model), []
    for row in rows:
        image = bundle.encode_image(root / "flickr30k-images" / f"{row['image']}.jpg")
        with torch.no_grad():  # Linear, ReLU, Linear on the raw class token; contradiction is 0, entailment 2
            fused = bundle.fuse(image, bundle.encode_text(row["sentence"])).tokens[:, 0]
            inner = (fused @ theirs["cls_head.0.weight"].T + theirs["cls_head.0.bias"]).relu()
            logits = inner @ theirs["cls_head.2.weight"].T + theirs["cls_head.2.bias"]
        chosen.append(["contradiction", "neutral", "entailment"][int(logits.argmax())])
    assert len(set(chosen)) > 1
    assert [line["prediction"] for line in said(cache, "test")] == chosen
    right = [answer == row["label"] for answer, row in zip(chosen, rows, strict=True)]
    assert found["SNLI-VE.test.accuracy"] == pytest.approx(np.mean(right))
    assert found["SNLI-VE.dev.accuracy"] == pytest.approx(np.mean(right[:4]))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "by the model's own head, trained for visual_entailment, which reads the model's own states" in (
        html.unescape(page)
    )
    [kept] = cache.glob("**/tasks/*/results.json")
    kept.write_text(re.sub(r'"value": [0-9.e-]+', '"value": 0.125', kept.read_text()))  # told, and not measured again
    again = evaluated(model, root, tmp_path / "again", "SNLI-VE")
    assert again.keys() == found.keys() and set(again.values()) == {0.125}
    (root / "ve_dev.json").write_text(json.dumps([{**row, "label": "neutral"} for row in rows]))
    neutral = evaluated(model, root, tmp_path / "other", "SNLI-VE")["SNLI-VE.dev.accuracy"]
    assert neutral == pytest.approx(np.mean([answer == "neutral" for answer in chosen]))  # the file is another


@pytest.mark.parametrize("lost", ["0.jpg", "3.jpg"])
def test_what_the_disk_does_not_give_today_is_asked_for_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """One of several pictures of test, or the only one of dev."""
    model, root = converted("ve", tmp_path / "ve"), tmp_path / "data"
    for number in range(4):
        picture(root / "flickr30k-images" / f"{number}.jpg", number)
    rows = [{"image": str(number), "sentence": SENTENCES[number], "label": "neutral"} for number in range(4)]
    for split, some in (("dev", rows[3:]), ("test", rows[:3])):
        (root / f"ve_{split}.json").write_text(json.dumps(some))
    whole = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == lost:
            raise OSError(errno.EIO, "Input/output error")
        return whole(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read_bytes)
        first = evaluated(model, root, tmp_path / "first", "SNLI-VE")
    assert "Input/output error" in html.unescape((tmp_path / "first" / "report.html").read_text())
    assert ("SNLI-VE.dev.accuracy" in first) == (lost == "0.jpg")
    assert not list(cache.glob("**/tasks/*/about.json"))
    again = evaluated(model, root, tmp_path / "again", "SNLI-VE")
    assert {"SNLI-VE.dev.accuracy", "SNLI-VE.test.accuracy"} <= again.keys()
    assert json.loads((tmp_path / "again" / "results.json").read_text())["results"]["SNLI-VE.test.accuracy"]["n"] == 3
    assert list(cache.glob("**/tasks/*/about.json"))


@pytest.mark.parametrize("form", ["albef", "official"])
def test_answers_are_ranked_and_scored_as_vqav2_is(tmp_path: Path, cache: Path, form: str) -> None:
    answers = ["yes", "no", "red", "blue", "a dog", "the cat"]
    model, root = converted("vqa", tmp_path / "vqa", answers=answers), tmp_path / "data" / "vqa"
    questions = [(7 * n, n % 2, f"{text}?") for n, text in enumerate(SENTENCES)]
    for number in range(2):
        picture(root / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)
    bundle = opened(model)
    best = []
    for _, image, question in questions:
        [answer] = bundle.ask(root / "val2014" / f"COCO_val2014_{image:012d}.jpg", question, k=1)
        best.append(answer.text)
    # Ten people each: two of them agree with the model in one row, none in the next.
    given = [[best[n]] * 2 + ["purple"] * 8 if n % 2 else ["purple"] * 10 for n in range(len(questions))]
    given[0] = [best[0]] * 10
    if form == "albef":
        entries = [{"question_id": key, "question": question, "answer": truths, "dataset": "vqa",
                    "image": f"val2014/COCO_val2014_{image:012d}.jpg"}
                   for (key, image, question), truths in zip(questions, given, strict=True)]  # fmt: skip
        (root / "vqa_val.json").write_text(json.dumps(entries))
        unlabelled = [{name: v for name, v in entry.items() if name != "answer"} for entry in entries]
        (root / "vqa_test.json").write_text(json.dumps(unlabelled))
    else:
        asked = [{"question_id": key, "image_id": image, "question": question} for key, image, question in questions]
        (root / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
        annotated = [{"question_id": key, "multiple_choice_answer": "purple",
                      "answers": [{"answer": each} for each in truths]}
                     for (key, _, _), truths in zip(questions, given, strict=True)]  # fmt: skip
        (root / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotated}))
    found = evaluated(model, tmp_path / "data", tmp_path / "out", "VQAv2")
    # Leaving one out: 8 of 10 times both who agree are left, 2 of 10 times one.
    two = (8 * 2 / 3 + 2 * 1 / 3) / 10
    assert found["VQAv2.dev.accuracy"] == pytest.approx((1 + 3 * two) / 6)
    assert [line["prediction"] for line in said(cache, "dev")] == best
    if form == "albef":
        [server] = cache.glob("**/predictions/test.json")
        assert json.loads(server.read_text()) == [
            {"question_id": key, "answer": answer} for (key, _, _), answer in zip(questions, best, strict=True)
        ]


def test_a_list_is_ranked_as_one_asks_and_figures_of_two_ways_are_kept_apart(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ["yes", "no", "red", "blue dog", "a dog", "the red cat"]
    model, root = converted("vqa", tmp_path / "vqa", answers=answers), tmp_path / "data"
    shown = picture(root / "vqa" / "0.jpg", 0)
    bundle = opened(model)
    entries = [{"question_id": n, "question": f"{text}?", "answer": ["red"] * 10, "dataset": "vqa", "image": "0.jpg"}
               for n, text in enumerate(SENTENCES)]  # fmt: skip
    (root / "vqa" / "vqa_val.json").write_text(json.dumps(entries))

    def scored(question: str) -> tuple[dict[str, float], dict[str, float]]:
        """By its first word and by the words after it, each read alone: log-likelihoods of every answer."""
        tokenizer, first, rest = bundle.tokenizer.for_answers(), {}, {}  # type: ignore[union-attr]
        fused = bundle.fuse(bundle.encode_image([shown]), bundle.encode_text([question]))
        for answer in answers:
            ids = torch.tensor(tokenizer.encode([answer], 30))
            with torch.no_grad():
                states, _ = bundle.head.states(ids[:, :-1], bundle.head.read(fused))  # type: ignore[operator, union-attr]
                logs = bundle.head.predict_words(states).log_softmax(-1)[0].gather(1, ids[0, 1:, None])  # type: ignore[operator, union-attr]
            first[answer], rest[answer] = float(logs[0]), float(logs[1:].sum())
        return first, rest

    both = [scored(entry["question"]) for entry in entries]  # type: ignore[arg-type]
    likeliest: dict[tuple[object, ...], list[str]] = {
        (): [max(answers, key=lambda a: first[a] + rest[a]) for first, rest in both],
        ("--first-word-twice",): [max(answers, key=lambda a: 2 * first[a] + rest[a]) for first, rest in both],
        ("--ranked", 1): [max(answers, key=first.__getitem__) for first, _ in both],
    }
    assert len(set(map(tuple, likeliest.values()))) == 3
    for number, (words, expected) in enumerate(likeliest.items()):
        found = evaluated(model, root, tmp_path / str(number), "VQAv2", *words)
        assert found["VQAv2.dev.accuracy"] == pytest.approx(np.mean([answer == "red" for answer in expected]))
        kept = set(cache.glob("**/predictions/dev.jsonl"))
        assert len(kept) == number + 1
        newest = max(kept, key=lambda path: path.stat().st_mtime_ns)
        assert [json.loads(line)["prediction"] for line in newest.read_text().splitlines()] == expected
        page = html.unescape((tmp_path / str(number) / "report.html").read_text())
        read = 1 if "--ranked" in words else 6
        assert f"of the list of answers the {read} that begin most likely are read to their end" in page
        assert ("the first word counts twice, as in the public code" in page) == ("--first-word-twice" in words)
        for entry, answer in zip(entries, expected, strict=True):
            capsys.readouterr()
            assert run("ask", model, "--image", shown, "--question", entry["question"], *words) == 0
            lines = capsys.readouterr().out.splitlines()
            assert lines[0].split(maxsplit=1)[1] == answer and len(lines) == (1 if "--ranked" in words else 5)


@pytest.mark.parametrize(
    ("kind", "words", "sentence"),
    [
        ("ve", ("evaluate", "--suite", "albef", "--ranked", 9), "has no head that ranks a list of answers"),
        ("vqa", ("evaluate", "--task", "RefCOCO+", "--first-word-twice"), "are of VQAv2 alone: name it with --task"),
        ("vqa", ("evaluate", "--ranked", 9), "--ranked is of the papers' tasks"),
        ("vqa", ("evaluate", "--task", "VQAv2", "--ranked", 0), "it must be 1 at least"),
        ("vqa", ("evaluate", "--task", "VQAv2", "--ranked", 9, "--fine-tuned", "RUN"), "or that run from --fine-tuned"),
        ("vqa", ("ask", "--image", "PICTURE", "--question", "a dog?", "--ranked", 9), "name one with --answers"),
        ("vqa", ("ask", "--image", "PICTURE", "--question", "a dog?", "--ranked", 9, "--freely"), "chooses from no li"),
    ],
)
def test_what_ranks_no_list_is_not_told_how(
    kind: str, words: tuple[object, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *rest = words
    places = {"PICTURE": picture(tmp_path / "0.png", 0), "RUN": tmp_path / "run"}
    (tmp_path / "run").mkdir()
    entry = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    (tmp_path / "run" / "results.json").write_text(json.dumps({"schema": 1, "results": {"VQAv2.dev.accuracy": entry}}))
    out = ("--out", tmp_path / "out") if verb == "evaluate" else ()
    assert run(verb, converted(kind, tmp_path / kind), *(places.get(str(word), word) for word in rest), *out) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in told
    assert not (tmp_path / "out").exists()


def test_a_list_of_answers_may_lie_with_the_data_and_must_lie_somewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, root = converted("vqa", tmp_path / "vqa"), tmp_path / "data"
    picture(root / "0.png", 0)
    entry = {"question_id": 1, "question": "what is it?", "answer": ["red"] * 10, "image": "0.png", "dataset": "vqa"}
    (root / "vqa_val.json").write_text(json.dumps([entry]))
    words = ("evaluate", model, "--task", "VQAv2", "--data.root", root, "--out", tmp_path / "out")
    assert run(*words) == 2
    assert "ranks a list of answers, and has none: put answer_list.json into" in capsys.readouterr().err
    asked = [{**entry, "question_id": n, "answer": [("red", "blue")[n % 2]] * 10} for n in range(20)]
    (root / "vqa_val.json").write_text(json.dumps(asked))  # whose answers are common enough, and are held out
    assert run(*words) == 2
    assert "ranks a list of answers, and has none" in capsys.readouterr().err
    (root / "vqa_val.json").write_text(json.dumps([entry]))
    (root / "answer_list.json").write_text('["red", "blue"]')
    assert run(*words) == 0
    value = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["VQAv2.dev.accuracy"]["value"]
    [best] = opened(model).ask(root / "0.png", "what is it?", k=1, answers=["red", "blue"])
    assert value == float(best.text == "red")


@pytest.mark.parametrize("form", ["albef", "official"])
def test_statements_on_two_pictures(tmp_path: Path, cache: Path, form: str) -> None:
    model, root = converted("nlvr", tmp_path / "nlvr", seed=14), tmp_path / "data"
    rows = []
    for number, text in enumerate(SENTENCES):
        sides = [picture(root / "dev" / f"dev-{number}-0-img{side}.png", 2 * number + side) for side in (0, 1)]
        rows.append((sides, text, ("True", "False")[number % 2]))
    if form == "albef":
        entries = [{"images": [str(side.relative_to(root)) for side in sides], "sentence": text, "label": label}
                   for sides, text, label in rows]  # fmt: skip
        (root / "nlvr_dev.json").write_text(json.dumps(entries))
    else:
        (root / "data").mkdir()
        lines = [json.dumps({"identifier": f"dev-{n}-0-1", "sentence": text, "label": label})
                 for n, (_, text, label) in enumerate(rows)]  # fmt: skip
        (root / "data" / "dev.json").write_text("\n".join(lines) + "\n")
    found = evaluated(model, root, tmp_path / "out", "NLVR2")
    bundle = opened(model)
    told = [bundle.ask(left, text, k=1, second_picture=right)[0].text for (left, right), text, _ in rows]
    assert len(set(told)) > 1
    assert [line["prediction"] for line in said(cache, "dev")] == told
    assert found["NLVR2.dev.accuracy"] == pytest.approx(
        np.mean([answer == label for answer, (_, _, label) in zip(told, rows, strict=True)])
    )


def test_retrieval_stands_under_the_names_of_a_fine_tuned_model(tmp_path: Path) -> None:
    model, root = converted("retrieval", tmp_path / "mscoco"), tmp_path / "data"
    coco(root, "albef")
    found = evaluated(model, root, tmp_path / "out", "COCO retrieval")
    bundle, captions = opened(model), [text for texts in CAPTIONS for text in texts]
    logits = torch.empty(3, 15)
    for label in range(3):
        for row, text in enumerate(captions):
            image = bundle.encode_image(root / "coco" / "val2014" / f"COCO_val2014_{label:012d}.jpg")
            with torch.no_grad():
                logits[label, row] = bundle.model.match(bundle.fuse(image, bundle.encode_text(text)))[0, 1]  # type: ignore[operator]
    own = torch.arange(15) // 5
    first = [int((logits[:, row] >= logits[own[row], row]).sum()) == 1 for row in range(15)]
    assert found["COCO retrieval.test.ir_reranked_r1"] == pytest.approx(np.mean(first))
    best = [1 + int((logits[p, own != p] >= logits[p, own == p].max()).sum()) for p in range(3)]
    assert found["COCO retrieval.test.tr_reranked_r5"] == pytest.approx(np.mean([rank <= 5 for rank in best]))
    assert not any("zero_shot" in name for name in found)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "fine-tuned for Flickr30K retrieval or COCO retrieval: its file does not say for which of them" in page
    assert run("convert", tmp_path / "mscoco" / "retrieval.pth", "--to", "trivium", "--out", tmp_path / "ours") == 0
    assert opened(tmp_path / "ours").tuned_for == ("Flickr30K retrieval", "COCO retrieval")


@pytest.mark.parametrize("kind", ["pretrained", "refcoco"])
def test_a_model_that_was_not_tuned_for_retrieval_stands_in_its_zero_shot_row_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model, root, out = converted(kind, tmp_path / kind), tmp_path / "data", tmp_path / "out"
    coco(root, "albef")
    flickr(root, "albef")
    assert {name.split(".")[1] for name in evaluated(model, root, out, "Flickr30K retrieval")} == {"zero_shot"}
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    of = {way: [line for line in lines if line["protocol"] == way] for way in ("zero-shot", "fine-tune")}
    assert all(line["state"] == "measured" and line["this model"] for line in of["zero-shot"])
    assert {line["state"] for line in of["fine-tune"]} == {"not fine-tuned"}
    assert not any(line["this model"] for line in of["fine-tune"])
    page = html.unescape((out / "report.html").read_text())
    assert "nothing says that this model was fine-tuned for Flickr30K retrieval" in page
    assert f"fine-tune it with `trivium finetune retrieval_flickr30k --init {model} --data DIR" in page
    words = ("evaluate", model, "--suite", "albef", "--task", "COCO retrieval", "--data.root", root, "--out", out)
    capsys.readouterr()
    assert run(*words) == 2  # of COCO the suite has fine-tuned rows alone
    told = capsys.readouterr()
    assert "nothing says that this model was fine-tuned for COCO retrieval" in told.out
    assert "is nothing to measure this model on" in told.err


def test_rows_without_labels_are_predicted_and_listed_as_unscored(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, root = converted("vqa", tmp_path / "vqa", answers=["red", "blue"]), tmp_path / "data"
    picture(root / "0.png", 0)
    asked = {"question_id": 1, "question": "what is it?", "image": "0.png", "dataset": "vqa"}
    (root / "vqa_test.json").write_text(json.dumps([asked]))
    for out in ("first", "second"):
        assert not evaluated(model, root, tmp_path / out, "VQAv2")
        told = capsys.readouterr().out
        assert "unscored" in told and "VQAv2: test: it has no labels; its predictions are written" in told
        assert "VQAv2: there is no figure, since no row that can be read has a label" in told
        page = html.unescape((tmp_path / out / "report.html").read_text())
        assert "Predicted, and without labels to score by" in page and "Figures of 0 of 1 tasks." in page
        assert "v2_mscoco_{train2014,val2014}_annotations" in page  # what is missing
        assert [line["question_id"] for line in said(cache, "test", ".json")] == [1]
        assert not list(cache.glob("**/tasks/*/about.json"))  # it is not done
        for path in cache.glob("**/predictions/*"):
            path.unlink()  # and made again by the second call
    (root / "vqa_val.json").write_text(json.dumps([{**asked, "answer": ["red"] * 10}]))
    assert "VQAv2.dev.accuracy" in evaluated(model, root, tmp_path / "third", "VQAv2")
    assert list(cache.glob("**/tasks/*/about.json"))


def test_referring_expressions_are_found_among_proposed_boxes(tmp_path: Path) -> None:
    model, root = converted("refcoco", tmp_path / "refcoco"), tmp_path / "data"
    refer_folder(root)
    boxes = [[12, 20, 28, 15], [0, 0, 20, 20], [50, 30, 30, 30]]
    (root / "refcoco+" / "dets.json").write_text(json.dumps({"7": boxes}))
    entries = [{"image": f"train2014/{PICTURE}", "text": text, "ref_id": 1} for text in ("the man in blue", "guy")]
    (root / "refcoco+_test.json").write_text(json.dumps(entries))
    found = evaluated(model, root, tmp_path / "out", "RefCOCO+")
    bundle, right = opened(model), []
    for entry in entries:
        [heat] = bundle.ground(root / entry["image"], entry["text"])
        heat_HW = torch.nn.functional.interpolate(heat.text_nn.double()[None, None], (60, 80), mode="bicubic")[0, 0]
        inside = [float(heat_HW[y : y + h, x : x + w].sum()) / (w * h) ** 0.5 for x, y, w, h in boxes]
        right.append(int(np.argmax(inside)) == 0)  # the first alone meets [10, 20, 30, 15] by half
    assert found["RefCOCO+.testA.accuracy"] == np.mean(right)


def test_what_is_wrong_in_a_file_is_told_by_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, root, out = converted("ve", tmp_path / "ve"), tmp_path / "data", tmp_path / "out"
    picture(root / "flickr30k-images" / "0.jpg", 0)
    good = {"image": "0", "sentence": "a dog " * 9, "label": "neutral"}
    wrong = [
        ({"image": "0", "label": "neutral"}, 'it has no "sentence"'),
        ({**good, "image": "9"}, "9.jpg does not exist"),
        ({**good, "label": "maybe"}, 'its label "maybe" is none of entailment, neutral, contradiction'),
    ]
    for number, (entry, says) in enumerate(wrong):
        (root / "ve_test.json").write_text(json.dumps([good, entry]))
        assert evaluated(model, root, tmp_path / f"out{number}", "SNLI-VE").keys() == {"SNLI-VE.test.accuracy"}
        page = html.unescape((tmp_path / f"out{number}" / "report.html").read_text())
        assert (
            "1 of 2 rows of test, which cannot be read; the first: " in page
            and f"ve_test.json (entry 1): {says}" in (page.replace(f"its picture {root}/flickr30k-images/", ""))
        )
        assert "texts have more than 12 tokens and are cut there; the first: " in page and "(entry 0)" in page
        (root / "ve_test.json").write_text(json.dumps([entry]))
        words = ("evaluate", model, "--suite", "albef", "--task", "SNLI-VE", "--data.root", root, "--out", out)
        capsys.readouterr()
        assert run(*words) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert "SNLI-VE: nothing can be measured" in last and "ve_test.json (entry 0)" in last
        assert not any(name.startswith("SNLI-VE") for name in json.loads((out / "results.json").read_text())["results"])


def test_a_head_of_another_task_or_with_other_labels_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, root = converted("ve", tmp_path / "ve"), tmp_path / "data"
    root.mkdir()
    (root / "nlvr_dev.json").write_text("[]")
    assert run("evaluate", model, "--task", "NLVR2", "--data.root", root, "--out", tmp_path / "out") == 2
    assert "there is nothing to measure" in capsys.readouterr().err
    bundle = opened(model)
    bundle.labels = ["no", "maybe", "yes"]
    bundle.save(tmp_path / "own")
    picture(root / "flickr30k-images" / "1.jpg", 1)
    (root / "ve_dev.json").write_text(json.dumps([{"image": "1", "sentence": "a dog", "label": "neutral"}]))
    words = ("evaluate", tmp_path / "own", "--suite", "albef", "--data.root", root, "--out", tmp_path / "out")
    assert run(*words) == 2
    assert "these files hold the labels entailment, neutral, contradiction, and this model's head knows no, maybe" in (
        capsys.readouterr().err
    )
