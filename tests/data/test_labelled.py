"""Labelled rows of one's own tables, and what every reader of a task promises."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trivium.data.labelled import UNSEEN, LabelledRows, Row, Splits, is_labelled
from trivium.data.labelled_tables import Columns, read_tables
from trivium.data.order import Order
from trivium.data.sources import open_source
from trivium.data.vqa import read_questions
from trivium.errors import BadSample, TriviumError


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = [",".join(rows[0])] + [",".join(str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def opened(train: list[str], dev: list[str] | None = None, **changes: Any) -> Splits:
    given = {"columns": Columns(), "kind": "text", "regression": False, "held_out_share": 0.25} | changes
    return read_tables(train, dev or [], given.pop("test", []), **given)  # type: ignore[arg-type]


def labels_of(rows: LabelledRows) -> list[int | None]:
    return [row.label for row in rows.good()]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_classes_are_named_in_order_and_dev_is_matched_by_name(tmp_path: Path, suffix: str) -> None:
    train = table(tmp_path / f"train{suffix}", [{"text": f"t{n}", "label": n} for n in (10, 9, 2, 10)])
    dev = table(tmp_path / f"dev{suffix}", [{"Text": "d1", "LABEL": 9}, {"Text": "d2", "LABEL": 2}])
    splits = opened([train], [dev])
    assert splits.labels == ("2", "9", "10")  # as numbers, not as words
    assert labels_of(splits.train) == [2, 1, 0, 2]
    assert labels_of(splits.held_out["dev"]) == [1, 0]


def test_labels_that_are_words_true_or_false(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}, {"text": "c", "label": "maybe"}]
    train = table(tmp_path / "train.jsonl", rows)
    assert opened([train], [train]).labels == ("false", "maybe", "true")


def test_a_held_out_row_whose_class_training_never_had_stays_and_is_told(tmp_path: Path) -> None:
    train = table(tmp_path / "train.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    names = ["x", "new", *(f"c{n}" for n in range(6)), "new"]
    dev = table(tmp_path / "dev.csv", [{"text": "a", "label": name} for name in names])
    splits = opened([train], [dev]).checked()
    assert splits.labels == ("x", "y")
    rows = splits.held_out["dev"]
    assert labels_of(rows) == [0] + 8 * [UNSEEN] and rows.row(1).truths == ("new",)
    assert labels_of(rows.of_known_classes()) == [0]
    assert splits.notes == [
        "8 of 9 rows of dev have a class that no training row has (new, c0, c1, c2, c3, and 2 more): counted as wrong"
    ]


def test_a_test_table_may_lack_the_label_column_that_is_named(tmp_path: Path) -> None:
    """It is predicted; what is learned or chosen by needs it."""
    rows = [{"image": "a.png", "text": "a", "klass": "x"}, {"image": "b.png", "text": "b", "klass": "y"}]
    train = table(tmp_path / "train.csv", rows)
    bare = table(tmp_path / "test.csv", [{"image": "c.png", "text": "c"}])
    named = Columns(label="Klass")
    splits = opened([train], [train], test=[bare], columns=named).checked()
    assert labels_of(splits.held_out["test"]) == [None] and not is_labelled(splits.held_out["test"])
    asked = read_questions([train], [train], [bare], named, 0.25).checked()
    assert [row.truths for row in asked.held_out["test"].good()] == [()]
    assert labels_of(opened([train], [train], test=[train], columns=named).held_out["test"]) == [0, 1]
    for given in (([bare], [train]), ([train], [bare])):
        with pytest.raises(TriviumError, match='has no column "klass"'):
            opened(*given, columns=named)


def test_a_held_out_table_of_other_classes_alone_is_refused(tmp_path: Path) -> None:
    train = table(tmp_path / "train.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    dev = table(tmp_path / "dev.csv", [{"text": "a", "label": "X"}, {"text": "b", "label": "Y"}])
    with pytest.raises(TriviumError, match=r'no row of dev has a class that .*; the first: .*dev.csv \(line 2\), "X"'):
        opened([train], [dev])


def test_a_quote_in_a_tsv_is_a_plain_character(tmp_path: Path) -> None:
    """As in pretraining: it must not swallow the rows that follow."""
    train = tmp_path / "train.tsv"
    train.write_text('text\tlabel\n"Great\tx\nfine\ty\nok"\tx\n')
    source = open_source("text", [train])
    assert [row.text for row in opened([str(train)], [str(train)]).train.good()] == ['"Great', "fine", 'ok"']
    assert [source.read(row, row)["text"] for row in range(3)] == ['"Great', "fine", 'ok"']


def test_a_mark_of_utf8_before_a_quoted_name_is_no_part_of_it(tmp_path: Path) -> None:
    train = tmp_path / "train.csv"
    train.write_bytes('\ufeff"text","label"\r\n"a cat",x\r\n"a dog",y\r\n'.encode())
    assert [row.text for row in opened([str(train)], [str(train)]).train.good()] == ["a cat", "a dog"]
    source = open_source("text", [train])
    assert [source.read(row, row)["text"] for row in range(2)] == ["a cat", "a dog"]


def test_where_no_row_can_be_used_the_first_says_why(tmp_path: Path) -> None:
    train = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"a picture", "path": "0.png"}] * 4, "label": [0, 1, 0, 1]}), train)
    said = r'no training row can be used; the first: .*train.parquet \(row 0\): its "image" is a picture, not the name'
    with pytest.raises(TriviumError, match=said):
        opened([str(train)], kind="images")


def test_a_row_without_text_or_label_costs_itself_alone(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": " ", "label": "y"}, {"text": "c", "label": ""}, {"text": "d"}]
    train = table(tmp_path / "train.jsonl", [*rows, {"text": "e", "label": "y"}])
    splits = opened([train], [train])
    found = [type(row).__name__ for row in splits.train.rows]
    assert found == ["Row", "BadSample", "BadSample", "BadSample", "Row"]
    assert splits.train.read(4, 4)["label"] == 1


@pytest.mark.parametrize("first", [{"label": "x"}, {"title": "a", "label": "x"}, {"text": "a"}, ["a", "x"]])
def test_a_first_row_that_is_wrong_does_not_speak_for_its_file(tmp_path: Path, first: Any) -> None:
    rows = [first, {"text": "b", "label": "y"}, {"text": "c", "label": "x"}]
    train = table(tmp_path / "train.jsonl", rows)
    splits = opened([train], [train])
    assert [type(row).__name__ for row in splits.train.rows] == ["BadSample", "Row", "Row"]
    with pytest.raises(BadSample, match=r"train.jsonl \(line 1\): it (has no|is no record)"):
        splits.train.read(0, 0)
    assert splits.labels == ("x", "y")


def test_without_a_dev_table_equal_rows_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"text": f"text {n % 50}", "label": n % 2} for n in range(200)]
    splits = opened([table(tmp_path / "train.jsonl", rows)])
    kept, held = ({row.text for row in part.good()} for part in (splits.train, splits.held_out["dev"]))
    assert kept and held and not kept & held
    assert len(splits.train) + len(splits.held_out["dev"]) == 200
    assert 5 <= len(held) <= 20
    assert "rows are held out" in splits.notes[0]


def test_without_a_dev_table_all_rows_of_a_picture_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"image": f"{n % 60}.png", "text": f"question {n}", "label": n % 2} for n in range(300)]
    splits = opened([table(tmp_path / "train.jsonl", rows)], kind="pairs")
    kept, held = ({row.image for row in part.good()} for part in (splits.train, splits.held_out["dev"]))
    assert kept and held and not kept & held
    assert len(splits.held_out["dev"]) == 5 * len(held)


@pytest.mark.parametrize(("pictures", "held_out"), [(2, 1), (4, 1), (8, 1), (20, 2), (100, 10)])
def test_of_few_pictures_one_is_held_out(tmp_path: Path, pictures: int, held_out: int) -> None:
    rows = [{"image": f"{n % pictures}.png", "text": f"question {n}", "label": n // 7 % 2} for n in range(400)]
    for names in ("one", "other"):
        (tmp_path / names).mkdir()
        given = [{**row, "image": f"{names}/{row['image']}"} for row in rows]
        splits = opened([table(tmp_path / f"{names}.jsonl", given)], kind="pairs", held_out_share=0.1)
        assert len({row.image for row in splits.held_out["dev"].good()}) == held_out


def test_pairs_of_texts_and_pictures_beside_their_table(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"a picture")
    rows = [{"image": "pictures/a.png", "caption": "c", "note": "n", "label": k} for k in ("x", "y")]
    train = table(tmp_path / "train.csv", rows)
    splits = opened([train], [train], kind="pairs", columns=Columns(second_text="note"))
    sample = splits.train.read(0, 0)
    assert (sample["image"], sample["text"], sample["second_text"]) == (b"a picture", "c", "n")
    assert sample["same_image"] == splits.train.read(1, 1)["same_image"]
    os.unlink(tmp_path / "pictures" / "a.png")
    with pytest.raises(BadSample, match="does not exist"):
        splits.train.read(0, 0)


def test_values_of_a_regression_are_centred_for_the_model_alone(tmp_path: Path) -> None:
    train = table(tmp_path / "train.csv", [{"text": f"t{n}", "score": n} for n in (10, 20, 30, 40)])
    splits = opened([train], [train], regression=True)
    assert (splits.center, splits.scale, splits.labels) == (25.0, pytest.approx(125**0.5), ())
    assert [row.value for row in splits.train.good()] == [10, 20, 30, 40]
    bad = table(tmp_path / "bad.jsonl", [{"text": "a", "score": s} for s in ("high", 10**400, 1)])
    for row in (0, 1):
        with pytest.raises(BadSample, match='its "score" is no number'):
            opened([bad], [train], regression=True).train.read(row, row)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": f"t{n}", "label": "x"} for n in range(9)], "one class .x."),
        ([{"text": "a", "kind": "x"}], "no class"),
        ([{"words": "a", "label": "x"}], "no column caption|captions"),
    ],
)
def test_tables_that_cannot_be_trained_on_are_refused(tmp_path: Path, rows: list, sentence: str) -> None:
    with pytest.raises(TriviumError, match=sentence):
        opened([table(tmp_path / "train.csv", rows)])
    with pytest.raises(TriviumError, match=r"--data\.train"):
        opened([])


def test_the_rows_that_are_held_out_are_the_same_wherever_the_table_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": f"pictures/{n}.png", "caption": "c", "label": n % 2} for n in range(60)]
    held = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        table(tmp_path / name / "train.csv", rows)
        monkeypatch.chdir(tmp_path / name)
        for path in ("train.csv", str(tmp_path / name / "train.csv")):
            splits = opened([path], kind="pairs")
            held.append([row.where for row in splits.held_out["dev"].good()])
    assert held[0] and held == held[:1] * 4


def test_a_blank_label_costs_its_row_and_not_its_split(tmp_path: Path) -> None:
    train = table(tmp_path / "train.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    dev = table(tmp_path / "dev.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": ""}])
    test = table(tmp_path / "test.csv", [{"text": "a", "label": ""}, {"text": "b", "label": ""}])
    splits = opened([train], [dev], test=[test]).checked()
    assert labels_of(splits.held_out["dev"]) == [0]
    with pytest.raises(BadSample, match=r"dev.csv \(line 3\): it has no label, where others of its split have one"):
        splits.held_out["dev"].read(1, 1)
    assert "dev: 1 of 2 rows cannot be used" in splits.notes[-1]
    assert labels_of(splits.held_out["test"]) == [None, None], "none has one: they are predicted"


def some(*labels: int | None) -> LabelledRows:
    return LabelledRows([Row("f", f"line {n}", str(n), f"t{n}", label=label) for n, label in enumerate(labels)], "text")


def test_a_class_that_is_missing_from_training_is_named() -> None:
    splits = Splits(some(0, 2, 2), {"dev": some(0, 1)}, ("red", "green", "blue")).checked()
    assert splits.notes == ["no row of the training split has the class green: it is never learned"]


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        (Splits(some(0, 1), {"test": some(None)}, ("a", "b")), "no held-out row has a label"),
        (Splits(some(0, None), {"dev": some(0)}, ("a", "b")), r"f \(line 1\) has no label"),
        (
            Splits(LabelledRows([BadSample("f", "line 1", "broken")], "text"), {"dev": some(0)}, ("a",)),
            "line 1.*broken",
        ),
    ],
)
def test_splits_that_cannot_be_used_are_refused(splits: Splits, sentence: str) -> None:
    with pytest.raises(TriviumError, match=sentence):
        splits.checked()


def test_a_cap_takes_rows_evenly_from_the_whole() -> None:
    assert [row.key for row in some(*range(10)).capped(4).good()] == ["0", "2", "5", "7"]
    assert len(some(1, 2).capped(None)) == len(some(1, 2).capped(5)) == 2


def test_rows_of_one_picture_stand_together_and_every_row_is_still_read_once() -> None:
    names = ["a", "b", "a", None, "c", "a", "b", None]
    rows: list[Row | BadSample] = [
        Row("t.csv", str(n), str(n), text="x", label=0, image=None if name is None else f"/pictures/{name}.png")
        for n, name in enumerate(names)
    ]
    rows.append(BadSample("t.csv", "8", "it cannot be read"))
    together = LabelledRows(rows, "pairs").by_picture(2)
    found = [[together.rows[n].where for n in block] for block in together.blocks()]
    assert found == [["0", "2"], ["5"], ["1", "6"], ["3"], ["4"], ["7"], ["8"]]
    order = Order(len(together), together.blocks(), seed=3, stream="s", window=1)
    epochs = order.rows(np.arange(2 * len(rows))).reshape(2, -1)
    assert all(sorted(epoch) == list(range(len(rows))) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()
    for epoch in epochs.tolist():
        places = {together.rows[row].where: place for place, row in enumerate(epoch)}
        assert abs(places["0"] - places["2"]) == 1 and abs(places["1"] - places["6"]) == 1
