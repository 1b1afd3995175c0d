"""Referring expressions in every layout, and what is said where a file is wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trivium.data.referring import ExpressionRows, find_referring, read_referring
from trivium.data.scene_files import write_scenes
from trivium.data.scene_language import expressions
from trivium.data.scenes import Scenes
from trivium.errors import BadSample, TriviumError

PICTURE = "COCO_train2014_000000000007.jpg"


def refer_folder(
    root: Path, *, suffix: str = "p", box: Any = (10, 20, 30, 15), annotation: Any = 5, protocol: int = 2
) -> Path:
    """Two references, of testA and of train, as the owners' two files hold them."""
    folder = root / "refcoco+"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = root / "train2014"
    pictures.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(pictures / PICTURE)
    instances = {
        "images": [{"id": 7, "file_name": PICTURE, "width": 80, "height": 60}],
        "annotations": [
            {"id": 4, "image_id": 7, "bbox": [0, 0, 20, 20], "category_id": 1},
            {"id": 5, "image_id": 7, "bbox": list(box) if isinstance(box, tuple) else box, "category_id": 1},
        ],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    common = {"image_id": 7, "category_id": 1, "file_name": "COCO_train2014_000000000007_5.jpg", "sent_ids": [1, 2]}
    references = [
        common | {"ref_id": 0, "ann_id": 4, "split": "train", "sentences": [{"sent_id": 0, "sent": "corner"}]},
        common
        | {
            "ref_id": 1, "ann_id": annotation, "split": "testA",
            "sentences": [{"sent_id": 1, "sent": "the man in blue", "raw": "The man, in blue", "tokens": ["the"]},
                          {"sent_id": 2, "sent": "guy", "raw": "guy", "tokens": ["guy"]}],
        },
    ]  # fmt: skip
    for old in folder.glob("refs*"):
        old.unlink()
    path = folder / f"refs(unc).{suffix}"
    if suffix == "p":
        path.write_bytes(pickle.dumps(references, protocol=protocol))
    else:
        path.write_text(json.dumps(references))
    return root


@pytest.mark.parametrize("suffix", ["p", "json"])
def test_the_owners_files_are_read(suffix: str, tmp_path: Path) -> None:
    data = read_referring(refer_folder(tmp_path, suffix=suffix))
    assert data.name == "refcoco+" and set(data.splits) == {"train", "testA"} and data.proposed is None
    first, second = data.good("testA")
    assert (first.text, second.text) == ("the man in blue", "guy")
    assert first.box == (10, 20, 30, 15) and first.size == (60, 80) and first.number == 1
    assert first.image == str(tmp_path / "train2014" / PICTURE)
    assert data.annotated[7].tolist() == [[0, 0, 20, 20], [10, 20, 30, 15]]
    assert not data.notes


def test_a_pickle_of_python_2_has_its_texts_as_bytes(tmp_path: Path) -> None:
    refer_folder(tmp_path)
    path = tmp_path / "refcoco+" / "refs(unc).p"
    reference = pickle.loads(path.read_bytes())[1]
    as_bytes = {
        key.encode(): value.encode() if isinstance(value, str) else value for key, value in reference.items()
    } | {b"sentences": [{b"sent_id": 1, b"sent": b"the man in blue"}]}
    path.write_bytes(pickle.dumps([as_bytes], protocol=2))
    assert [each.text for each in read_referring(tmp_path).good("testA")] == ["the man in blue"]


def test_a_pickle_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    refer_folder(tmp_path)
    (tmp_path / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(TriviumError, match=r"refs\(unc\)\.p is no file of plain data"):
        read_referring(tmp_path)


def test_albefs_lists_take_the_place_of_the_references_own_texts(tmp_path: Path) -> None:
    refer_folder(tmp_path)
    image = f"train2014/{PICTURE}"
    (tmp_path / "refcoco+_test.json").write_text(json.dumps([
        {"image": image, "text": "man blue shirt", "ref_id": 1},
        {"image": image, "text": "nobody", "ref_id": 99},
        {"image": image, "ref_id": 1},
    ]))  # fmt: skip
    (tmp_path / "refcoco+_train.json").write_text(json.dumps([{"image": image, "text": "corner left"}]))
    data = read_referring(tmp_path)
    assert [(each.text, each.box) for each in data.good("testA")] == [("man blue shirt", (10, 20, 30, 15))]
    assert [each.text for each in data.good("train")] == ["corner left"]
    said = [str(each) for each in data.bad("testA")]
    assert "refcoco+_test.json (entry 1): its reference 99 is not in" in said[0]
    assert 'refcoco+_test.json (entry 2): it has no "text"' in said[1]


def test_proposed_boxes_are_cut_at_the_edges(tmp_path: Path) -> None:
    refer_folder(tmp_path)
    path = tmp_path / "refcoco+" / "dets.json"
    path.write_text(json.dumps({"7": [[-3, 5, 10, 10, 1, 0.9], [70, 50, 30, 30]], "8": "of another picture"}))
    with pytest.raises(TriviumError, match=r"dets\.json \(picture 8\): it must hold"):
        read_referring(tmp_path)
    path.write_text(json.dumps({"7": [[-3, 5, 10, 10, 1, 0.9], [70, 50, 30, 30]], "8": [["nobody", "asks"]]}))
    proposed = read_referring(tmp_path).proposed
    assert proposed is not None and proposed[7].tolist() == [[0, 5, 7, 10], [70, 50, 10, 10]]


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ([90, 5, 10, 10], r"dets\.json \(picture 7, box 1\): its box \[90, 5, 10, 10\] lies outside its "
                          r"picture of 80 x 60 pixels"),
        ([5, 5, "10", 10], r"box 1\): its box \[5, 5, \"10\", 10\] is not \[left, top, width, height\]"),
        ([5, 5], r"box 1\): its box \[5, 5\] is not"),
    ],
)  # fmt: skip
def test_a_proposed_box_that_is_none_is_named(box: Any, sentence: str, tmp_path: Path) -> None:
    refer_folder(tmp_path)
    (tmp_path / "refcoco+" / "dets.json").write_text(json.dumps({"7": [[0, 0, 5, 5], box]}))
    with pytest.raises(TriviumError, match=sentence):
        read_referring(tmp_path)


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ([60, 20, 30, 15], "lies outside its picture of 80 x 60 pixels"),
        ([10, 20, 0, 15], "has no area"),
        ([10, 20, float("nan"), 15], r"is not \[left, top, width, height\]"),
        ([10, 20, 10**400, 15], r"is not \[left, top, width, height\]"),
        (None, r"is not \[left, top, width, height\]"),
    ],
)
def test_a_box_outside_its_picture_costs_its_expressions_and_is_named(box: Any, sentence: str, tmp_path: Path) -> None:
    data = read_referring(refer_folder(tmp_path, box=box))
    [bad] = data.bad("testA")
    assert "refs(unc).p (entry 1): what it means cannot be used:" in str(bad)
    assert "instances.json (annotation entry 1)" in str(bad)
    with pytest.raises(BadSample, match=sentence):
        raise bad
    assert len(data.good("train")) == 1
    assert "1 annotated boxes cannot be used" in data.notes[0]


def test_a_box_may_reach_a_pixel_over_the_edge(tmp_path: Path) -> None:
    data = read_referring(refer_folder(tmp_path, box=(49.6, 20, 30.9, 15)))
    assert data.good("testA")[0].box == (49.6, 20, 30.9, 15)


def test_a_reference_to_nothing_is_named(tmp_path: Path) -> None:
    [bad] = read_referring(refer_folder(tmp_path, annotation=77)).bad("testA")
    assert str(bad).endswith("refs(unc).p (entry 1): it means an object 77 that instances.json does not list")


def test_where_there_is_nothing_it_says_what_to_give(tmp_path: Path) -> None:
    assert find_referring(tmp_path) is None
    with pytest.raises(TriviumError, match="holds no referring expressions: give the folder in which refcoco"):
        read_referring(tmp_path)


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    for scenes in (Scenes("train", 4, seed=6), Scenes("held-out-style", 3, seed=6)):
        write_scenes(scenes, out, ["refcoco"])
    return out / "refcoco"


def test_scenes_are_read_with_their_exact_boxes(scenes_folder: Path) -> None:
    data = read_referring(scenes_folder)
    assert set(data.splits) == {"train", "val"} and data.name == "refcoco" and not data.notes
    scenes = Scenes("held-out-style", 3, seed=6)
    expected = [
        (each.text, scene.objects[each.object].box)
        for scene in map(scenes.scene, range(3))
        for each in sorted(expressions(scene, scenes), key=lambda each: each.object)
    ]
    assert [(each.text, each.box) for each in data.good("val")] == expected
    assert find_referring(scenes_folder / "val") is not None


def test_expressions_of_one_picture_show_the_same(scenes_folder: Path) -> None:
    rows = ExpressionRows(read_referring(scenes_folder).splits["train"])
    numbers = {}
    for row in range(len(rows)):
        sample = rows.read(row, row)
        assert sample["text"] == rows.row(row).text
        numbers.setdefault(rows.row(row).image, set()).add(sample["same_image"])
    assert len(numbers) == 4 and all(len(each) == 1 for each in numbers.values())
    assert len(set.union(*numbers.values())) == 4
