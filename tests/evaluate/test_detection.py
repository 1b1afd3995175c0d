"""Average precision by faster-coco-eval against pycocotools and by hand; attributes; boxes drawn."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.data.test_detection import box, write
from trivium.data.detection import DetectionRows, read_detection
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.evaluate import average_precision
from trivium.evaluate.detection import FIGURES, as_coco, as_entries, attributes_right, drawn, find, measure, wall
from trivium.models.encoded import Objects


def objects(
    boxes: list[list[float]], labels: list[int], scores: list[float], attributes: list[int] | None = None
) -> Objects:
    return Objects(
        torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes).reshape(-1, 4).float(),
        None if attributes is None else torch.tensor(attributes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(Scenes("train", 24, seed=1, difficulty=1), root, ("coco", "vg"))
    return root


def guesses(rows: DetectionRows, seed: int = 0) -> dict[int, Objects]:
    """True boxes, shifted, some of another class, and boxes from nowhere."""
    rng = np.random.default_rng(seed)
    found = {}
    for row in range(len(rows)):
        here = rows.of(row)
        true = rows.boxes_M4[here] + rng.normal(0, 3, (here.stop - here.start, 4))
        nowhere = np.concatenate([rng.uniform(0, 90, (5, 2)), rng.uniform(5, 40, (5, 2))], axis=1)
        both = np.concatenate([true, nowhere])
        corner = np.concatenate([both[:, :2], both[:, :2] + both[:, 2:].clip(1)], axis=1)
        labels = np.concatenate([rows.classes_M[here], rng.integers(1, 10, 5)])
        labels = np.where(rng.random(len(labels)) < 0.2, rng.integers(1, 10, len(labels)), labels)
        found[row] = objects(corner.tolist(), labels.tolist(), rng.random(len(labels)).tolist())
    return found


def test_it_agrees_with_pycocotools(scenes: Path, tmp_path: Path) -> None:
    """From the file itself, which pycocotools reads, and a crowd among the boxes."""
    path = scenes / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for number, annotation in enumerate(content["annotations"]):
        annotation["iscrowd"] = int(number % 7 == 0)
    path.write_text(json.dumps(content))
    data = read_detection("coco", str(scenes / "coco"))
    found = guesses(data.train)
    ours = measure(data.train, found, data.classes)
    with contextlib.redirect_stdout(io.StringIO()):
        truths = COCO(str(path))
        numbers = [picture.number for picture in data.train.pictures]
        entries = [entry | {"image_id": numbers[entry["image_id"]]} for entry in as_entries(data.train, found)]
        theirs = COCOeval(truths, truths.loadRes(entries), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    for name, place in FIGURES.items():
        if theirs.stats[place] < 0:  # no scene has an object as large as that
            assert name not in ours
            continue
        assert ours[name].value == pytest.approx(theirs.stats[place], abs=1e-9), name
    assert 0.05 < ours["ap"].value < ours["ap50"].value < 0.95


def test_a_perfect_and_an_empty_guess(scenes: Path) -> None:
    data = read_detection("vg", str(scenes / "vg"))
    rows, perfect = data.train, {}
    for row in range(len(rows)):
        sample = rows.read(row, row)
        first = [attributes[0] for attributes in sample["attributes"].tolist()]
        perfect[row] = objects(sample["boxes"].tolist(), sample["classes"].tolist(), [1.0] * len(first), first)
    found = measure(rows, perfect, data.classes)
    assert found["ap"].value == found["ap50"].value == pytest.approx(1.0)
    assert found["attributes"].value == 1.0
    every = [{int(n) for n in each if n >= 0} for row in range(len(rows)) for each in rows.read(row, row)["attributes"]]
    shares = [sum(name in each for each in every) / len(every) for name in range(1, len(data.attributes))]
    assert found["attributes.majority"].value == max(shares) < 1
    nothing = {row: objects([], [], [], []) for row in range(len(rows))}
    assert measure(rows, nothing, data.classes)["ap"].value == 0.0


def with_crowds(root: Path) -> DetectionRows:
    rows = read_detection("coco", str(root / "coco")).train
    rows.crowd_M = np.arange(len(rows.crowd_M)) % 7 == 0
    return rows


def test_what_is_drawn_again_is_the_figure_itself(scenes: Path) -> None:
    """Each picture once is COCO's figure; some twice and some not at all, that of the pictures listed so."""
    rows = with_crowds(scenes)
    found, classes = guesses(rows), read_detection("coco", str(scenes / "coco")).classes
    matched = average_precision.of_classes(rows, found)
    whole = measure(rows, found, classes)
    some = {row: found[row] for row in range(5, 20)}
    weight_N = np.array([float(row in some) for row in range(len(rows))])
    draws_RN = np.stack([np.ones(len(rows)), weight_N, 3 * weight_N, np.zeros(len(rows))])
    every, chosen, thrice, nothing = average_precision.precision(matched, draws_RN)
    assert every == pytest.approx([whole[name].value for name in average_precision.NAMES], abs=1e-9)
    part = measure(rows, some, classes, has_intervals=False)
    assert chosen == pytest.approx([part[name].value for name in average_precision.NAMES], abs=1e-9)
    assert thrice == pytest.approx(chosen, abs=1e-9)
    assert np.isnan(nothing).all()


def test_the_interval_holds_the_figure_and_narrows_with_more_pictures(scenes: Path) -> None:
    rows = with_crowds(scenes)
    found, classes = guesses(rows), read_detection("coco", str(scenes / "coco")).classes
    widths = []
    for count in (6, 24):
        results = measure(rows, {row: found[row] for row in range(count)}, classes)
        for name in average_precision.NAMES:
            result = results[name]
            assert result.low is not None and result.high is not None and result.n == count
            assert 0 <= result.low < result.value < result.high <= 1
        widths.append(results["ap50"].high - results["ap50"].low)  # type: ignore[operator]
        assert results["ar100"].low is None
    assert widths[1] < widths[0]
    nothing = measure(rows, {row: objects([], [], []) for row in range(3)}, classes)["ap"]
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


def test_a_true_box_is_taken_once_and_a_crowd_counts_neither_way() -> None:
    true = np.array([[0.0, 0, 10, 10], [20, 0, 40, 40]])
    seen = np.array([[0.0, 0, 10, 10], [0, 0, 10, 9], [25, 5, 35, 15], [50, 50, 60, 60]])
    right, on_crowd = average_precision.cover(seen, true, np.array([False, True]))
    assert right[0].tolist() == [True, False, False, False] and on_crowd[0].tolist() == [False, False, True, False]
    right, _ = average_precision.cover(seen[[1, 0]], true, np.array([False, True]))
    assert right[:, 0].tolist() == [threshold <= 0.9 for threshold in average_precision.THRESHOLDS], "the surest first"
    assert right[:, 1].tolist() == [threshold > 0.9 for threshold in average_precision.THRESHOLDS]


def test_a_picture_of_another_size_than_its_boxes_is_named_and_left_out(tmp_path: Path) -> None:
    write(tmp_path, [box(1, [0, 0, 10, 10])])
    Image.new("RGB", (20, 30)).save(tmp_path / "train2017" / "2.png")
    rows = read_detection("coco", str(tmp_path)).train

    class Sees:
        def detect(self, pictures: list[np.ndarray], task: str | None, batch: int) -> list[Objects]:
            return [objects([], [], []) for _ in pictures]

    found, bad = find(Sees(), rows)  # type: ignore[arg-type]
    assert list(found) == [0]
    assert list(map(str, bad)) == [f"{tmp_path / 'train2017' / '2.png'}: it has 20 x 30 pixels, not 30 x 20 as stated"]


def test_an_attribute_is_right_on_the_box_that_covers_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = write(tmp_path, [box(1, [0, 0, 10, 10], attribute_ids_max16=[2, 5]), box(1, [20, 0, 10, 10])])
    file.rename(tmp_path / "annotations" / "instances_train_split_by_coco_2017.json")
    rows = read_detection("vg", str(tmp_path)).train
    near, far = [0.0, 0, 9, 10], [12.0, 12, 20, 20]
    assert attributes_right(rows, {0: objects([far, near], [1, 1], [0.9, 0.1], [1, 5])})[0].tolist() == [True]
    assert attributes_right(rows, {0: objects([far, near], [1, 1], [0.9, 0.1], [2, 4])})[0].tolist() == [False]
    assert attributes_right(rows, {0: objects([far], [1], [0.9], [2])})[0].tolist() == [False], "it was not found"


def test_ground_truth_is_handed_on_as_the_file_has_it(scenes: Path) -> None:
    data = read_detection("vg", str(scenes / "vg"))
    given = json.loads((scenes / "vg" / "annotations" / "instances_train_split_by_coco_2017.json").read_text())
    ours = as_coco(data.train, {0: objects([], [], [])}, data.classes)
    first = [each for each in given["annotations"] if each["image_id"] == given["images"][0]["id"]]
    assert [each["bbox"] for each in ours["annotations"]] == [each["bbox"] for each in first]
    assert [each["area"] for each in ours["annotations"]] == [each["area"] for each in first]


def test_pictures_with_boxes(scenes: Path) -> None:
    data = read_detection("vg", str(scenes / "vg"))
    white = np.full((40, 60, 3), 255, np.uint8)
    picture = drawn(white, objects([[10, 15, 50, 35]], [1], [0.9], [1]), data.classes, data.attributes)
    assert (picture[25, 10:12] != 255).any() and (picture[20:30, 20:40] == 255).all(), "a frame, empty inside"
    figure = wall(data.train, guesses(data.train), "What it finds", data.classes)
    assert figure.image.startswith("data:image/png;base64,") and "12 pictures" in figure.alt
