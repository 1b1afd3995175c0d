"""Scenes in the official formats, read as the published readers read them, against the scenes themselves."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tests.data import scene_facts
from trivium.data import scene_files
from trivium.data.pmd_annotations import Pair, coco, visual_genome
from trivium.data.scene_files import write_scenes
from trivium.data.scene_formats import FORMATS, run_lengths
from trivium.data.scenes import Scenes
from trivium.errors import TriviumError

TRAIN = Scenes("train", 10, seed=6, difficulty=0.8)
VAL = Scenes("held-out-style", 9, seed=6, difficulty=0.8)
VAL_ID = 500_000_001


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both halves of every format."""
    out = tmp_path_factory.mktemp("scenes")
    for scenes in (TRAIN, VAL):
        write_scenes(scenes, out)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_picture(path: Path, pixels_HWC: np.ndarray, format_: str = "JPEG") -> bool:
    with Image.open(path) as picture:
        assert picture.format == format_
        difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - pixels_HWC)
    return difference.max() == 0 if format_ == "PNG" else difference.mean() < 4


# ------------------------------------------------------------------------------------------------ masks, COCO


def decoded(segmentation: dict[str, Any]) -> np.ndarray:
    """COCO's run lengths, by their definition."""
    height, width = segmentation["size"]
    values = [run % 2 == 1 for run, length in enumerate(segmentation["counts"]) for _ in range(length)]
    return np.array(values).reshape(width, height).T


@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_run_lengths_are_the_mask(mask_HW: np.ndarray) -> None:
    found = run_lengths(mask_HW)
    assert np.array_equal(decoded(found), mask_HW)
    assert all(length > 0 for length in found["counts"][1:])


@pytest.mark.parametrize(("scenes", "half", "first"), [(TRAIN, "train", 1), (VAL, "val", VAL_ID)])
def test_coco(written: Path, scenes: Scenes, half: str, first: int) -> None:
    content = read(written / "coco" / "annotations" / f"instances_{half}2017.json")
    names = {each["id"]: each["name"] for each in content["categories"]}
    assert len(names) == 9
    assert min(names) == 1
    by_image: dict[int, list[Any]] = {each["id"]: [] for each in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    assert len({each["id"] for each in content["annotations"]}) == len(content["annotations"])
    for image in content["images"]:
        scene = scenes.scene(image["id"] - first)
        assert same_picture(written / "coco" / f"{half}2017" / image["file_name"], scene.pixels_HWC)
        assert image["file_name"] == f"{image['id']:012d}.jpg"
        for number, (annotation, thing) in enumerate(zip(by_image[image["id"]], scene.objects, strict=True)):
            mask_HW = decoded(annotation["segmentation"])
            assert np.array_equal(mask_HW, scene.mask(number))
            rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
            bounds = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert annotation["bbox"] == bounds
            assert annotation["area"] == mask_HW.sum()
            assert names[annotation["category_id"]] == scene.categories[thing.category].name
    captions = list(coco([str(written / "coco" / "annotations" / f"captions_{half}2017.json")], frozenset()))
    assert {type(each) for each in captions} == {Pair}
    assert set(Counter(each.names for each in captions).values()) == {3}
    assert {int(each.names[0]) for each in captions} == set(by_image)


def test_coco_opens_with_pycocotools(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco_api = pytest.importorskip(
        "pycocotools.coco", reason="pycocotools is not installed: pip install 'trivium[dev]'"
    )
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    truth = coco_api.COCO(str(written / "coco" / "annotations" / "instances_train2017.json"))
    masks = pytest.importorskip("pycocotools.mask")
    for index in range(len(TRAIN)):
        scene = TRAIN.scene(index)
        entries = truth.loadAnns(truth.getAnnIds(imgIds=index + 1))
        assert len(entries) == len(scene.objects)
        for number, entry in enumerate(entries):
            assert np.array_equal(truth.annToMask(entry), scene.mask(number))
            coded = truth.annToRLE(entry)
            assert masks.area(coded) == entry["area"]
            assert masks.toBbox(coded).tolist() == entry["bbox"]
    found = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for entry in truth.loadAnns(truth.getAnnIds())
    ]
    judged = evaluation.COCOeval(truth, truth.loadRes(found), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    assert judged.stats[0] == pytest.approx(1)


# ------------------------------------------------------------------------------------------------ Visual Genome


def test_visual_genome(written: Path) -> None:
    folder = written / "vg"
    content = read(folder / "annotations" / "instances_val_split_by_coco_2017.json")
    names = {each["id"]: each["name"] for each in content["attCategories"]}
    assert len(names) == 11
    attributes = {
        each["object_id"]: set(each["attributes"])
        for image in read(folder / "val" / "attributes.json")
        for each in image["attributes"]
    }
    with_hue = 0
    for annotation in content["annotations"]:
        scene = VAL.scene(annotation["image_id"] - VAL_ID)
        [thing] = [each for each in scene.objects if list(each.box) == annotation["bbox"]]
        numbers = annotation["attribute_ids_max16"]
        assert len(numbers) == 16
        kept = [number for number in numbers if number != -1]
        assert numbers == kept + [-1] * (16 - len(kept))
        expected = {thing.hue, thing.size} - {None}
        assert {names[number] for number in kept} == attributes[annotation["id"]] == expected
        with_hue += thing.hue is not None
    assert with_hue
    for image in read(folder / "val" / "image_data.json"):
        scene = VAL.scene(image["image_id"] - VAL_ID)
        assert same_picture(folder / "images" / f"{image['image_id']}.jpg", scene.pixels_HWC)
    files = [str(folder / "val" / name) for name in ("region_descriptions.json", "image_data.json")]
    regions = list(visual_genome(files, frozenset()))
    assert {type(each) for each in regions} == {Pair}
    assert len(regions) == len(content["annotations"])
    for region in regions:
        scene = VAL.scene(int(region.names[0]) - VAL_ID)
        left, top, right, bottom = (round(128 * share) for share in region.box)
        [thing] = [each for each in scene.objects if each.box == (left, top, right - left, bottom - top)]
        words = [thing.size, thing.hue, scene.categories[thing.category].noun]
        assert region.caption.split(" ", 1)[1] == " ".join(word for word in words if word)
    asked = [each for image in read(folder / "val" / "question_answers.json") for each in image["qas"]]
    assert asked
    for each in asked:
        assert scene_facts.answer(VAL.scene(each["image_id"] - VAL_ID), each["question"]) == each["answer"]


# ------------------------------------------------------------------------------------------------------ VQAv2


def test_vqa(written: Path) -> None:
    folder = written / "vqa"
    asked = read(folder / "v2_OpenEnded_mscoco_train2014_questions.json")
    answered = read(folder / "v2_mscoco_train2014_annotations.json")
    assert (asked["task_type"], asked["data_subtype"]) == ("Open-Ended", "train2014")
    questions = {each["question_id"]: each for each in asked["questions"]}
    assert len(questions) == len(asked["questions"]) == len(answered["annotations"]) > 30
    for each in answered["annotations"]:
        question = questions[each["question_id"]]
        assert question["image_id"] == each["image_id"]
        scene = TRAIN.scene(each["image_id"] - 1)
        picture = folder / "train2014" / f"COCO_train2014_{each['image_id']:012d}.jpg"
        assert same_picture(picture, scene.pixels_HWC)
        assert [answer["answer_id"] for answer in each["answers"]] == list(range(1, 11))
        assert {answer["answer"] for answer in each["answers"]} == {each["multiple_choice_answer"]}
        assert scene_facts.answer(scene, question["question"]) == each["multiple_choice_answer"]


# ------------------------------------------------------------------------------------------ SNLI-VE and NLVR2


@pytest.mark.parametrize(("scenes", "name", "first"), [(TRAIN, "train", 1), (VAL, "dev", VAL_ID)])
def test_snli_ve(written: Path, scenes: Scenes, name: str, first: int) -> None:
    lines = read_lines(written / "snli-ve" / f"snli_ve_{name}.jsonl")
    counts = Counter(line["gold_label"] for line in lines)
    assert len(counts) == 3
    assert len(set(counts.values())) == 1
    assert len({line["pairID"] for line in lines}) == len(lines)
    for line in lines:
        scene = scenes.scene(int(line["Flickr30K_ID"]) - first)
        assert line["Flikr30kID"] == f"{line['Flickr30K_ID']}.jpg"
        assert same_picture(written / "snli-ve" / "flickr30k_images" / line["Flikr30kID"], scene.pixels_HWC)
        assert scene_facts.label(scene, line["sentence2"]) == line["gold_label"]


@pytest.mark.parametrize(("scenes", "part"), [(TRAIN, "train"), (VAL, "dev")])
def test_nlvr2(written: Path, scenes: Scenes, part: str) -> None:
    folder = written / "nlvr2"
    lines = read_lines(folder / "data" / f"{part}.json")
    assert lines
    labels: dict[str, set[str]] = {}
    for line in lines:
        split, group, pair, _ = line["identifier"].split("-")
        assert split == part
        where = folder / "images" / "train" / str(line["directory"]) if part == "train" else folder / "dev"
        pictures = []
        for side in (0, 1):
            scene = scenes.scene(4 * int(group) + 2 * int(pair) + side)
            assert same_picture(where / f"{part}-{group}-{pair}-img{side}.png", scene.pixels_HWC, "PNG")
            pictures.append(scene)
        assert str(scene_facts.holds(*pictures, line["sentence"])) == line["label"]
        labels.setdefault(group + line["sentence"], set()).add(line["label"])
    assert all(found == {"True", "False"} for found in labels.values())  # the sentence alone tells nothing


# -------------------------------------------------------------------------------------------------- RefCOCO


def test_refcoco(written: Path, tmp_path: Path) -> None:
    root = written / "refcoco" / "val"
    # REFER's own file is a pickle, which its user makes of the JSON (docs/how-to.md).
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(read(root / "refcoco" / "refs(unc).json")))
    refs = pickle.loads((tmp_path / "refs(unc).p").read_bytes())
    instances = read(root / "refcoco" / "instances.json")
    annotations = {each["id"]: each for each in instances["annotations"]}
    files = {each["id"]: each["file_name"] for each in instances["images"]}
    categories = {each["id"] for each in instances["categories"]}
    sentence_ids = [number for ref in refs for number in ref["sent_ids"]]
    assert len(set(sentence_ids)) == len(sentence_ids) > 20
    for ref in refs:
        annotation = annotations[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"]
        assert annotation["category_id"] == ref["category_id"] in categories
        assert ref["split"] == "val"
        scene = VAL.scene(ref["image_id"] - VAL_ID)
        picture = root / "images" / "mscoco" / "images" / "train2014" / files[ref["image_id"]]
        assert same_picture(picture, scene.pixels_HWC)
        assert [sentence["sent_id"] for sentence in ref["sentences"]] == ref["sent_ids"]
        for sentence in ref["sentences"]:
            [number] = scene_facts.meant(scene, sentence["sent"])
            assert list(scene.objects[number].box) == annotation["bbox"]
            assert sentence["tokens"] == sentence["sent"].split()


# --------------------------------------------------------------------------------------------- how it is written


def test_every_format_says_who_drew(written: Path) -> None:
    for name in FORMATS:
        told = (written / name / "ATTRIBUTION.txt").read_text(encoding="utf-8")
        for owner in ("Twemoji", "CC BY 4.0", "Noto Emoji", "Apache License", "Fluent Emoji", "MIT License",
                      "Open Clip Art", "Unicode License", "Miles Johnson", "What was changed"):  # fmt: skip
            assert owner in told


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_call_goes_on_and_ends_as_another_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Path
) -> None:
    monkeypatch.setattr(scene_files, "RUN", 4)
    out = tmp_path / "scenes"

    def stop(done: int, total: int) -> None:
        assert (done, total) == (4, 10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(TRAIN, out, progress=stop)
    assert not list(out.glob("*/scenes-train.json"))
    assert not list(out.rglob("instances_*.json"))
    first = out / "coco" / "train2017" / "000000000001.jpg"
    before = first.stat().st_mtime_ns
    made = write_scenes(TRAIN, out)
    assert {each.made for each in made.values()} == {6}
    assert first.stat().st_mtime_ns == before
    whole = {name: data for name, data in files_of(written).items() if name in files_of(out)}
    assert files_of(out) == whole
    assert not list(out.rglob(".*"))

    marks = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    time.sleep(0.01)
    assert {each.made for each in write_scenes(TRAIN, out).values()} == {0}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == marks


def test_what_is_damaged_is_made_again(tmp_path: Path) -> None:
    scenes = Scenes("train", 2)
    write_scenes(scenes, tmp_path, ("coco",))
    whole = files_of(tmp_path)
    for name in ("coco/train2017/000000000002.jpg", "coco/annotations/captions_train2017.json"):
        (tmp_path / name).unlink()
        assert write_scenes(scenes, tmp_path, ("coco",))["coco"].made == 2
        assert files_of(tmp_path) == whole


def test_formats_share_their_pictures(written: Path) -> None:
    names = ("coco/train2017/000000000003.jpg", "vg/images/3.jpg", "vqa/train2014/COCO_train2014_000000000003.jpg")
    assert len({os.stat(written / name).st_ino for name in names}) == 1


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write_scenes(Scenes("train", 1), tmp_path, ("coco", "vg"))
    assert (tmp_path / "vg/images/1.jpg").read_bytes() == (tmp_path / "coco/train2017/000000000001.jpg").read_bytes()


def test_mistakes(tmp_path: Path) -> None:
    scenes = Scenes("train", 2)
    with pytest.raises(TriviumError, match=r"no format 'voc': choose one of coco, vg, .*, or all"):
        write_scenes(scenes, tmp_path, ("voc",))
    with pytest.raises(TriviumError, match="2 scenes are too few for nlvr2, whose sentences need 4"):
        write_scenes(scenes, tmp_path)
    (tmp_path / "coco" / "train2017").mkdir(parents=True)  # photographs of somebody
    with pytest.raises(TriviumError, match="coco exists already and holds other things: name a new folder"):
        write_scenes(scenes, tmp_path, ("coco",))
    (tmp_path / "a.txt").touch()
    with pytest.raises(TriviumError, match=r"a.txt/vqa cannot be made a folder \(Not a directory\): name another one"):
        write_scenes(scenes, tmp_path / "a.txt", ("vqa",))
    write_scenes(scenes, tmp_path, ("vqa",))
    with pytest.raises(TriviumError, match="holds scenes of its train half made with seed = 0, not 1: name a new"):
        write_scenes(Scenes("train", 2, seed=1), tmp_path, ("vqa",))
    write_scenes(Scenes("new-scenes", 2), tmp_path, ("vqa",))
    with pytest.raises(TriviumError, match="of its val half made with split = new-scenes, not held-out-both"):
        write_scenes(Scenes("held-out-both", 2), tmp_path, ("vqa",))
    (tmp_path / "vqa" / "scenes-val.json").write_text("{")
    with pytest.raises(TriviumError, match=r"scenes-val\.json is damaged: remove it"):
        write_scenes(Scenes("new-scenes", 2), tmp_path, ("vqa",))
