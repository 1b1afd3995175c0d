"""NLVR2 in its layouts, that of scenes among them, and pairs for text assignment."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.data.drawn import drawn_picture
from tests.data.test_vqa import lines, write
from trivium.data.labelled_tables import Columns
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.data.statements import read_assignments, read_nlvr2
from trivium.data.vqa import read_questions, read_vqa
from trivium.errors import BadSample, TriviumError


def test_scenes_are_read_as_nlvr2_with_both_pictures(tmp_path: Path) -> None:
    for split in ("train", "new-scenes"):
        write_scenes(Scenes(split, 8, 0, 0.5, "group"), tmp_path, ("nlvr2",))
    splits = read_nlvr2(str(tmp_path / "nlvr2"))
    assert splits.labels == ("False", "True") and list(splits.held_out) == ["dev"]
    for rows, part in ((splits.train, "train"), (splits.held_out["dev"], "dev")):
        stated = [json.loads(line) for line in (tmp_path / "nlvr2" / "data" / f"{part}.json").read_text().splitlines()]
        assert len(rows) == len(stated) > 0
        assert [(row.text, splits.labels[row.label or 0]) for row in rows.good()] == [
            (each["sentence"], each["label"]) for each in stated
        ]
        sample = rows.read(0, 0)
        assert sample["image"] != sample["second_image"]
        assert sample["image"] == Path(str(rows.row(0).image)).read_bytes()
        assert str(rows.row(0).image).endswith("-img0.png") and str(rows.row(0).second_image).endswith("-img1.png")
    counts = Counter(row.label for row in splits.train.good())
    assert counts[0] == counts[1]  # a statement holds for one of two pairs


def test_nlvr2_as_albef_has_it_and_what_is_wrong_with_a_row(tmp_path: Path) -> None:
    good = {"images": ["a.png", "b.png"], "sentence": "one is red", "label": "True"}
    wrong = [{**good, "label": "Maybe"}, {**good, "images": ["a.png"]}, {"images": ["a.png", "b.png"], "label": "True"}]
    write(tmp_path / "nlvr_train.json", [good, *wrong])
    write(tmp_path / "nlvr_test.json", [good])
    splits = read_nlvr2(str(tmp_path))
    assert list(splits.held_out) == ["test-P"]
    row = splits.train.row(0)
    assert (row.image, row.second_image, row.label) == (f"{tmp_path}/a.png", f"{tmp_path}/b.png", 1)
    told = [str(each) for each in splits.train.rows if isinstance(each, BadSample)]
    assert [f"nlvr_train.json (entry {n})" in sentence for n, sentence in enumerate(told, start=1)] == [True] * 3
    assert "neither True nor False" in told[0] and "not the paths of two" in told[1] and '"sentence"' in told[2]
    with pytest.raises(BadSample, match=r"nlvr_train.json \(entry 0\).*a\.png"):
        splits.train.read(0, 0)  # the picture is not there
    with pytest.raises(TriviumError, match=r"holds neither data/train\.json nor nlvr_train\.json"):
        read_nlvr2(str(tmp_path / "data"))


def test_official_rows_name_their_pictures(tmp_path: Path) -> None:
    row = {"identifier": "dev-10-0-1", "sentence": "one is red", "label": "False"}
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "train.json", {**row, "identifier": "train-10-2-3", "directory": 42},
          {**row, "identifier": "train-10-2-3"}, {**row, "identifier": "train"})  # fmt: skip
    lines(tmp_path / "data" / "test1.json", {**row, "identifier": "test1-4-0-1"})
    (tmp_path / "test1").mkdir()
    splits = read_nlvr2(str(tmp_path))
    assert splits.train.row(0).image == f"{tmp_path}/images/train/42/train-10-2-img0.png"
    assert splits.held_out["test-P"].row(0).second_image == f"{tmp_path}/test1/test1-4-0-img1.png"
    told = [str(each) for each in splits.train.rows if isinstance(each, BadSample)]
    assert '"directory"' in told[0] and "does not end in the number of a sentence" in told[1]


def test_texts_are_assigned_once_and_for_all(tmp_path: Path) -> None:
    table = tmp_path / "pairs.jsonl"
    lines(table, *({"image": f"{n}.png", "caption": f"text {n}"} for n in range(300)))
    splits = read_assignments([str(table)], [str(table)], [], Columns(), 0.1)
    again = read_assignments([str(table)], [str(table)], [], Columns(), 0.1)
    dev = list(splits.held_out["dev"].good())
    assert dev == list(again.held_out["dev"].good())
    for number, row in enumerate(dev):
        own = f"{tmp_path}/{number}.png"
        assert row.image != row.second_image
        assert [row.image == own, row.second_image == own] == [row.label == 0, row.label == 1]
    assert all(70 < count < 130 for count in Counter(row.label for row in dev).values())
    assert all(row.second_image is None for row in splits.train.good())
    held = read_assignments([str(table)], [], [], Columns(), 0.2)
    assert 30 < len(held.held_out["dev"]) < 90 and "pairs are held out" in held.notes[0]
    assert {row.image for row in held.train.good()}.isdisjoint(
        image for row in held.held_out["dev"].good() for image in (row.image, row.second_image)
    )
    lines(table, {"image": "0.png", "caption": "text"})
    with pytest.raises(TriviumError, match="too few to assign a text among"):
        read_assignments([str(table)], [str(table)], [], Columns(), 0.1)


def test_texts_are_assigned_alike_wherever_their_table_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "p.jsonl", *({"image": f"im/{n}.png", "caption": f"text {n}"} for n in range(200)))
        monkeypatch.chdir(tmp_path / folder)
        for table in ("p.jsonl", str(tmp_path / folder / "p.jsonl")):
            for dev in ([table], []):
                rows = read_assignments([table], dev, [], Columns(), 0.2).held_out["dev"].good()
                dealt.append([(row.where, Path(str(row.second_image)).name, row.label) for row in rows])
    assert dealt == dealt[:2] * 4 and len(dealt[0]) == 200 > len(dealt[1]) > 0


def test_texts_are_assigned_by_the_columns_that_are_named_and_in_the_test_split_too(tmp_path: Path) -> None:
    train, test = str(tmp_path / "pairs.jsonl"), str(tmp_path / "test.jsonl")
    for path, count in ((train, 40), (test, 7)):
        rows = [{"image": "thumb.png", "Photo": f"{n}.png", "Legend": f"text {n}"} for n in range(count)]
        lines(Path(path), *rows)
    columns = Columns(image="Photo", text="other,Legend")
    splits = read_assignments([train], [train], [test], columns, 0.1)
    assert list(splits.held_out) == ["dev", "test"] and len(splits.held_out["test"]) == 7
    row = splits.train.row(1)
    assert (row.text, row.image) == ("text 1", f"{tmp_path}/1.png")
    for row in splits.held_out["test"].good():
        number = str(row.text).removeprefix("text ")
        assert (f"{tmp_path}/{number}.png" in (row.image, row.second_image)) == (row.label != 2)
    for named, lacks in ((Columns(), r'"caption\|captions\|text\|title"'), (Columns(text="words"), '"words')):
        with pytest.raises(TriviumError, match=rf"no pair can be used.*\(line 1\).*no {lacks}.*--data\.text-column"):
            read_assignments([train], [], [], named, 0.1)
    lines(tmp_path / "test.jsonl", {"Photo": "0.png", "Legend": "text"})
    with pytest.raises(TriviumError, match=r"1 held-out pictures \(test\) are too few"):
        read_assignments([train], [train], [test], columns, 0.1)


def test_one_answer_to_a_question(tmp_path: Path) -> None:
    lines(
        tmp_path / "train.jsonl",
        *({"image": "a.png", "question": "what?", "answer": a} for a in ("no", "two", "no", "")),
    )
    lines(tmp_path / "dev.jsonl", {"image": "a.png", "question": "what?", "answer": "six"},
          {"image": "a.png", "question": "what?", "answer": "two"}, {"image": "a.png", "answer": "two"})  # fmt: skip
    columns = Columns(label="answer")
    splits = read_questions([str(tmp_path / "train.jsonl")], [str(tmp_path / "dev.jsonl")], [], columns, 0.1)
    assert splits.labels == ("no", "two")
    unknown, known = splits.held_out["dev"].good()
    assert (unknown.answers, unknown.truths) == ({}, ("six",)) and unknown.is_labelled
    assert (known.answers, known.truths) == ({1: 1.0}, ("two",))
    assert '(line 1), "six"' in splits.notes[0]
    assert isinstance(splits.held_out["dev"].rows[2], BadSample)
    assert "it has no answer" in str(splits.train.rows[3]), "it costs itself alone"
    (tmp_path / "a.png").write_bytes(drawn_picture(0))
    assert splits.train.read(0, 0)["written"] == {"no": 1.0}


def test_answers_of_albefs_files_have_the_weights_of_the_paper(tmp_path: Path) -> None:
    good = {
        "question_id": 1,
        "question": "what?",
        "image": "a.png",
        "dataset": "vqa",
        "answer": ["no"] * 7 + ["six"] * 3,
    }
    write(tmp_path / "vqa_train.json", [good])
    write(tmp_path / "vg_qa.json", [{**good, "dataset": "vg", "answer": "Two."}])
    write(tmp_path / "vqa_val.json", [good, {**good, "answer": [1]}])
    write(tmp_path / "answer_list.json", ["no", "2"])
    (tmp_path / "vg").mkdir()
    for path in (tmp_path / "a.png", tmp_path / "vg" / "a.png"):
        path.write_bytes(drawn_picture(0))
    splits = read_vqa(str(tmp_path))
    assert splits.train.read(0, 0)["written"] == pytest.approx({"no": 0.7, "six": 0.3})
    assert splits.train.read(1, 1)["written"] == {"Two.": 0.5}
    assert splits.train.row(1).image == f"{tmp_path}/vg/a.png"
    assert splits.train.row(1).answers == {1: 1.0}  # in normal form it is in the list
    assert "neither a text nor a list" in str(splits.held_out["dev"].rows[1])
    assert not any("stands there again" in note for note in splits.notes)
    write(tmp_path / "answer_list.json", ["no", "2", "No ", "2"])
    splits = read_vqa(str(tmp_path))
    assert splits.labels == ("no", "2")
    assert any('stands there again is left out: "No" (entry 2), as entry 0' in note for note in splits.notes)
