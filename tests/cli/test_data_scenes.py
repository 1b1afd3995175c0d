"""`trivium data scenes`: what it prints, what it leaves, and its sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from tests.recipes.shop import trivium
from trivium.cli.data_scenes import scenes
from trivium.data.drawings import SPLITS, Classes
from trivium.data.scene_formats import FORMATS


def test_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scenes"
    words = ["data", "scenes", "--out", out, "--count", 4, "--seed", 3, "--difficulty", 1, "--classes", "subgroup"]
    assert trivium(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["coco", "vg", "vqa", "snli-ve", "nlvr2", "refcoco"]
    content = json.loads((out / "coco" / "annotations" / "instances_train2017.json").read_text())
    assert len(content["categories"]) == 24
    boxes = len(content["annotations"])
    assert lines[0] == f"coco: 4 scenes of train, 4 images, {boxes} annotations, 12 captions, in {out / 'coco'}"
    assert trivium(*words) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{lines[0]} (4 scenes were there)"
    assert trivium(*words, "--split", "held-out-concepts", "--format", "coco") == 0
    assert sorted(path.name for path in (out / "coco").iterdir()) == [
        "ATTRIBUTION.txt", "annotations", "scenes-train.json", "scenes-val.json", "train2017", "val2017",
    ]  # fmt: skip


def test_its_choices_are_those_of_the_library() -> None:
    hints = get_type_hints(scenes)
    assert get_args(hints["split"]) == SPLITS
    assert get_args(hints["classes"]) == get_args(Classes)
    assert get_args(hints["format"]) == (*FORMATS, "all")


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*words: object) -> str:
        assert trivium("data", "scenes", "--out", tmp_path / "scenes", *words) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert complaint("--count", 0) == "trivium: 0 scenes: ask for at least 1"
    assert complaint("--difficulty", 2) == "trivium: a difficulty of 2: it lies between 0 and 1"
    assert "too few for nlvr2" in complaint("--count", 3)
    assert "'held-out-style', 'held-out-both'" in complaint("--split", "dev")
    assert "voc" in complaint("--format", "voc")
    assert not (tmp_path / "scenes").exists()


def test_a_file_is_no_folder_to_write_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("mine")
    assert trivium("data", "scenes", "--out", out, "--count", 4) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"trivium: {out / 'coco'} cannot be made a folder (Not a directory): name another one"
    ]
    assert out.read_text() == "mine"
    assert out.read_text() == "mine"
