"""easy-VQA out of its package, DAQUAR out of its table: one right answer a question, no picture on both sides."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trivium.data.labelled import is_labelled
from trivium.data.small_vqa import OTHER, read_daquar, read_easy_vqa
from trivium.errors import BadSample, TriviumError


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def easy(path: Path, test_answer: str = "red") -> Path:
    asked = {
        "train": [["what color?", ["red", "blue"][n % 2], n] for n in range(40)],
        "test": [["what?", test_answer, 0]],
    }
    with zipfile.ZipFile(path, "w") as archive:
        for split, entries in asked.items():
            archive.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(entries))
            for number in {entry[2] for entry in entries}:
                archive.writestr(f"easy_vqa/data/{split}/images/{number}.png", picture(int(number)))
    return path


def test_easy_vqa_is_read_out_of_its_package(tmp_path: Path) -> None:
    splits = read_easy_vqa(str(easy(tmp_path / "easy.whl")), held_out=0.3)
    assert splits.labels == ("blue", "red")
    train, dev = ({row.image for row in rows.good()} for rows in (splits.train, splits.held_out["dev"]))
    assert train and dev and not train & dev and len(train | dev) == 40
    row = splits.checked().held_out["test"].capped(1).read(0, 0)
    assert row["label"] == 1 and row["text"] == "what?" and row["image"] == picture(0)
    with zipfile.ZipFile(tmp_path / "easy.whl") as archive:
        archive.extractall(tmp_path / "unpacked")
    again = read_easy_vqa(str(tmp_path / "unpacked" / "easy_vqa" / "data"), held_out=0.3)
    assert [row.label for row in again.train.good()] == [row.label for row in splits.train.good()]


def test_mistakes_in_easy_vqa(tmp_path: Path) -> None:
    with pytest.raises(TriviumError, match='its answer "mauve" is that of no training question'):
        read_easy_vqa(str(easy(tmp_path / "easy.whl", "mauve")))
    (tmp_path / "no.whl").write_bytes(b"no zip")
    with pytest.raises(TriviumError, match="is no package of easy-VQA"):
        read_easy_vqa(str(tmp_path / "no.whl"))
    with pytest.raises(TriviumError, match=r"holds no train/questions\.json"):
        read_easy_vqa(str(tmp_path))


def daquar(root: Path, *lines: object) -> str:
    table = pa.table({"file": [f"{n}.png" for n in range(30)], "image": [picture(n) for n in range(30)]})
    pq.write_table(table, root / "train.parquet")
    (root / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(root)


def test_daquar_keeps_questions_with_one_answer(tmp_path: Path) -> None:
    asked = [{"file": f"{n}.png", "question": "what is it", "answer": [f"thing {n}"]} for n in range(30)]
    several = {"file": "0.png", "question": "what is there", "answer": ["a", "b"]}
    splits = read_daquar(daquar(tmp_path, *asked, several, {"file": "1.png", "question": "why", "answer": []}))
    assert splits.notes == ["1 questions with several answers are left out"]
    assert splits.labels[-1] == OTHER and len(splits.labels) == len(list(splits.train.good())) + 1
    # Nobody can be right about an answer that training never had: it is a class that no training row has.
    assert {row.label for row in splits.held_out["dev"].good()} == {len(splits.labels) - 1}
    [bad] = [row for rows in (splits.train, splits.held_out["dev"]) for row in rows.rows if isinstance(row, BadSample)]
    assert 'its "answer" holds no text' in str(bad)


def test_a_picture_that_is_not_there_costs_its_row_alone(tmp_path: Path) -> None:
    splits = read_daquar(daquar(tmp_path, {"file": "99.png", "question": "what", "answer": ["a"]}), held_out=0.0)
    with pytest.raises(BadSample, match=r"its picture 99\.png does not exist"):
        splits.train.read(0, 0)
    with pytest.raises(TriviumError, match=r"holds no qa\.jsonl"):
        read_daquar(str(tmp_path / "nowhere"))


@pytest.mark.data
def test_daquar_as_it_is() -> None:
    splits = read_daquar(os.path.join(os.environ["TRIVIUM_DATA"], "daquar")).checked()
    assert len(splits.train) + len(splits.held_out["dev"]) == 6149
    assert is_labelled(splits.held_out["dev"])
