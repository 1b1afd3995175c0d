"""VQAv2, SNLI-VE and Hateful Memes against miniatures of their official files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.drawn import drawn_picture
from trivium.data.image_text_tasks import read_hateful_memes, read_snli_ve
from trivium.data.vqa import read_vqa
from trivium.errors import BadSample, TriviumError


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def lines(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def picture(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn_picture(0))
    return drawn_picture(0)


def vqa(root: Path) -> str:
    """Two training questions, one of val and one of test-dev."""
    answers = {1: ["yes"] * 10, 2: ["Red"] * 2 + ["the red", "blue"] + ["teal"] * 6, 3: ["no"] * 3 + ["yes"] * 7}
    for split, numbers in (("train2014", (1, 2)), ("val2014", (3,)), ("test-dev2015", (4,))):
        questions = [{"image_id": 9 * n, "question": f"question {n}?", "question_id": n} for n in numbers]
        write(root / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        annotations = [
            {
                "question_id": n,
                "multiple_choice_answer": max(set(answers[n]), key=answers[n].count),
                "answers": [{"answer": a, "answer_id": k} for k, a in enumerate(answers[n], start=1)],
            }
            for n in numbers
            if n in answers
        ]
        if annotations:
            write(root / f"v2_mscoco_{split}_annotations.json", {"annotations": annotations})
        for n in numbers:
            folder = split.replace("-dev", "")
            picture(root / folder / f"COCO_{folder}_{9 * n:012d}.jpg")
    return str(root)


def test_vqa_has_its_answers_as_classes_and_says_how_right_each_is(tmp_path: Path) -> None:
    splits = read_vqa(vqa(tmp_path), min_questions=1)
    assert splits.labels == ("teal", "yes")
    first, second = splits.train.good()
    assert dict(first.answers or {}) == {1: 1.0}
    assert dict(second.answers or {}) == {0: 1.0}
    assert second.truths.count("Red") == 2
    [dev] = splits.held_out["dev"].good()
    assert dict(dev.answers or {}) == {1: 1.0}  # "no" is no class: too rare, so it is no target either
    sample = splits.train.read(0, 0)
    assert (sample["text"], sample["image"]) == ("question 1?", drawn_picture(0))
    [test] = splits.held_out["test_dev"].good()
    assert not test.is_labelled
    assert test.image == f"{tmp_path}/test2015/COCO_test2015_{36:012d}.jpg"
    assert test.key == "4"


def test_vqa_scores_of_answers_that_agree_in_part(tmp_path: Path) -> None:
    root = Path(vqa(tmp_path))
    path = root / "v2_mscoco_train2014_annotations.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["multiple_choice_answer"] = "red"
    write(path, content)
    splits = read_vqa(str(root), min_questions=1)
    scores = list(splits.train.good())[1].answers or {}
    assert {splits.labels[n]: score for n, score in scores.items()} == pytest.approx({"red": 0.9, "teal": 1.0})


def test_vqa_answers_must_be_frequent_and_a_question_without_them_is_bad(tmp_path: Path) -> None:
    root = Path(vqa(tmp_path))
    with pytest.raises(TriviumError, match=r"only 0 answers .* lower --data.min-questions"):
        read_vqa(str(root))
    path = root / "v2_mscoco_train2014_annotations.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["answers"]
    write(path, content)
    rows = read_vqa(str(root), min_questions=1).train
    with pytest.raises(BadSample, match="question 1 has no answers"):
        rows.read(0, 0)
    with pytest.raises(TriviumError, match=r"visualqa\.org"):
        read_vqa(str(tmp_path / "train2014"))


def test_the_questions_on_pictures_of_val2017_are_a_split_where_coco_says_which_these_are(tmp_path: Path) -> None:
    root = Path(vqa(tmp_path))
    listed = root / "annotations" / "instances_val2017.json"
    file, annotated = (root / f"v2_{name}.json" for name in ("OpenEnded_mscoco_val2014_questions",
                                                             "mscoco_val2014_annotations"))  # fmt: skip
    questions = json.loads(file.read_text())["questions"]
    write(file, {"questions": [*questions, {"image_id": 28, "question": "another?", "question_id": 5}]})
    annotations = json.loads(annotated.read_text())["annotations"]
    write(annotated, {"annotations": [*annotations, annotations[0] | {"question_id": 5}]})
    splits = read_vqa(str(root), min_questions=1)
    assert list(splits.held_out) == ["dev", "test_dev"] and not splits.notes
    official = [{"id": n} for n in range(28, 28 + 5000)]
    write(listed, {"images": [*official, "no record"]})
    splits = read_vqa(str(root), min_questions=1)
    assert list(splits.held_out) == ["dev", "test_dev", "val2017"]
    [row] = splits.held_out["val2017"].good()
    assert (row.key, row.image) == ("5", f"{tmp_path}/val2014/COCO_val2014_{28:012d}.jpg") and row.is_labelled
    assert len(splits.held_out["dev"]) == 2, "the split of all keeps them"
    [note] = splits.notes
    assert note.startswith("val2017 is a part of dev, by which fine-tuning chooses its checkpoint")
    write(listed, {"images": official[:40]})
    splits = read_vqa(str(root), min_questions=1)
    assert "val2017" not in splits.held_out, "a part of it is not what the paper was measured on"
    assert splits.notes == [f"{listed} names 40 pictures, COCO's own 5,000: val2017 is left out"]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("annotations/instances_val2017.json", "images"),
        ("v2_OpenEnded_mscoco_val2014_questions.json", "questions"),
        ("v2_mscoco_train2014_annotations.json", "annotations"),
    ],
)
def test_a_file_without_its_list_is_one_sentence(tmp_path: Path, file: str, name: str) -> None:
    root = Path(vqa(tmp_path))
    for content, why in (({"info": {}}, "it has no"), ({name: {"id": 28}}, "its")):
        write(root / file, content)
        with pytest.raises(TriviumError, match=rf'{Path(file).name}: {why} "{name}".*: is it the file you mean'):
            read_vqa(str(root), min_questions=1)


def test_vqa_annotations_that_are_no_records_cost_their_questions_alone(tmp_path: Path) -> None:
    root = Path(vqa(tmp_path))
    path = root / "v2_mscoco_train2014_annotations.json"
    content = json.loads(path.read_text())
    content["annotations"][0] = 7
    write(path, content)
    rows = read_vqa(str(root), min_questions=1).train
    with pytest.raises(BadSample, match="question 1 has no answers"):
        rows.read(0, 0)
    assert rows.read(1, 1)["text"] == "question 2?"


def test_snli_ve_takes_both_spellings_and_counts_what_annotators_left_open(tmp_path: Path) -> None:
    lines(
        tmp_path / "snli_ve_train.jsonl",
        {"Flickr30K_ID": "11", "sentence2": "a dog", "gold_label": "neutral", "pairID": "p1"},
        {"Flikr30kID": "12.jpg", "sentence2": "a cat", "gold_label": "contradiction"},
        {"Flickr30K_ID": "11", "sentence2": "a man", "gold_label": "-"},
        {"Flickr30K_ID": "11", "sentence2": "a man", "gold_label": "true"},
    )
    lines(tmp_path / "snli_ve_dev.jsonl", {"Flickr30K_ID": 11, "sentence2": "x", "gold_label": "entailment"})
    picture(tmp_path / "flickr30k_images" / "11.jpg")
    splits = read_snli_ve(str(tmp_path)).checked()
    assert splits.labels == ("entailment", "neutral", "contradiction")
    assert [row.label for row in splits.train.good()] == [1, 2]
    assert splits.train.read(0, 0)["image"] == drawn_picture(0)
    assert splits.held_out["dev"].read(0, 0)["label"] == 0
    assert splits.notes[0] == "train: 1 rows are left out, since their annotators did not agree"
    assert 'its label "true" is none of entailment' in splits.notes[1]
    with pytest.raises(BadSample, match="does not exist"):
        splits.train.read(1, 1)


def test_snli_ve_as_albef_has_it(tmp_path: Path) -> None:
    picture(tmp_path / "flickr30k-images" / "11.jpg")
    entry = {"image": "11", "sentence": "a dog", "label": "entailment"}
    write(
        tmp_path / "ve_train.json",
        [entry, {**entry, "label": "yes"}, {"image": "12", "sentence": "x", "label": "neutral"}, {"image": "11"}],
    )
    write(tmp_path / "ve_dev.json", [entry])
    splits = read_snli_ve(str(tmp_path)).checked()
    assert splits.labels[splits.held_out["dev"].row(0).label or 0] == "entailment"
    assert splits.train.read(0, 0)["image"] == drawn_picture(0)
    for number, why in ((1, 'its label "yes" is none of'), (2, "does not exist"), (3, 'it has no "label"')):
        with pytest.raises(BadSample, match=rf"ve_train.json \(entry {number}\).*{why}"):
            splits.train.read(number, number)


def test_hateful_memes_has_seen_and_unseen_splits_and_a_test_without_labels(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "01.png")
    for name, label in (("train", 1), ("dev_seen", 0), ("dev_unseen", 1)):
        lines(tmp_path / f"{name}.jsonl", {"id": 1, "img": "img/01.png", "label": label, "text": "words"})
    lines(tmp_path / "test_unseen.jsonl", {"id": 2, "img": "img/01.png", "text": "words"})
    splits = read_hateful_memes(str(tmp_path)).checked()
    assert list(splits.held_out) == ["dev_seen", "dev_unseen", "test_unseen"]
    assert splits.train.read(0, 0)["label"] == 1
    assert not next(splits.held_out["test_unseen"].good()).is_labelled
    assert splits.notes == ["no row of the training split has the class not_hateful: it is never learned"]
    lines(tmp_path / "train.jsonl", {"id": 1, "img": "img/01.png", "label": 2, "text": "words"})
    with pytest.raises(BadSample, match="its label 2 is neither 0"):
        read_hateful_memes(str(tmp_path)).train.read(0, 0)
    with pytest.raises(TriviumError, match=r"drivendata\.org"):
        read_hateful_memes(str(tmp_path / "img"))
