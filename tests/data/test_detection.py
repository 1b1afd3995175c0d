"""Boxes as COCO and Visual Genome publish them: what is read, what is refused, and what is said."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trivium.data.detection import find_val, read_detection, read_val
from trivium.data.detection_collate import Augmentation, DetectionCollate, resized
from trivium.data.loader import StreamReader, read
from trivium.data.order import Draws
from trivium.data.scene_files import write_scenes
from trivium.data.scene_formats import ATTRIBUTES
from trivium.data.scenes import Scenes
from trivium.data.transforms import ImageTransform, padded, shortest_size
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import Stream

PLAIN = Augmentation(flip=0.0, shorts=(20,), crop=0.0)


def box(picture: int, xywh: list[Any], category: int = 3, **more: Any) -> dict[str, Any]:
    return {"id": 7, "image_id": picture, "bbox": xywh, "category_id": category, "area": 5.0, "iscrowd": 0} | more


def write(root: Path, annotations: list[dict[str, Any]], half: str = "train", **changes: Any) -> Path:
    """Two pictures of 30 x 20 pixels; categories 1 and 3."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"{half}2017").mkdir(exist_ok=True)
    for number in (1, 2):
        Image.new("RGB", (30, 20), (40 * number, 0, 0)).save(root / f"{half}2017" / f"{number}.png")
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 30, "height": 20} for n in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cup"}, {"id": 3, "name": "mug"}],
    } | changes
    path = root / "annotations" / f"instances_{half}2017.json"
    path.write_text(json.dumps(content))
    return path


def test_numbers_of_classes_keep_their_holes_and_boxes_become_corners(tmp_path: Path) -> None:
    write(tmp_path, [box(2, [1, 2, 3, 4]), box(1, [5, 5, 10, 10], 1), box(2, [0, 0, 30, 20], iscrowd=1)])
    found = read_detection("coco", str(tmp_path))
    assert found.classes == ("", "cup", "", "mug") and found.attributes == () and not found.notes
    first, second = found.train.read(0, 0), found.train.read(1, 1)
    assert first["boxes"].tolist() == [[5, 5, 15, 15]] and first["classes"].tolist() == [1]
    assert second["boxes"].tolist() == [[1, 2, 4, 6]], "a crowd is no target"
    assert found.train.boxes_M4[found.train.of(1)].tolist() == [[1, 2, 3, 4], [0, 0, 30, 20]], "but it is measured"
    assert found.held_out == {}


def test_what_is_cut_or_left_out_is_said(tmp_path: Path) -> None:
    file = write(tmp_path, [box(1, [25, 5, 10, 5]), box(1, [40, 5, 3, 3]), box(2, [4, 4, 0, 5]), box(2, [1, 1, 2, 2])])
    found = read_detection("coco", str(tmp_path))
    assert found.train.read(0, 0)["boxes"].tolist() == [[25, 5, 30, 10]]
    assert found.train.read(1, 1)["boxes"].tolist() == [[1, 1, 3, 3]]
    assert found.notes == [
        f"{file}: 2 of 4 boxes have no area inside their picture and are left out of training; the first: annotations,"
        " entry 1",
        f"{file}: 1 of 4 boxes reach beyond their picture and are cut to it; the first: annotations, entry 0",
    ]


@pytest.mark.parametrize(
    "unusable",
    [
        {"xywh": [4, 4, 0, 5]}, {"xywh": [4, 4, 5, 0]}, {"xywh": [40, 5, 3, 3]}, {"xywh": [9, 9, -3, 3]},
        {"xywh": [1, 1, 2, 2], "iscrowd": 1},
    ],
)  # fmt: skip
def test_training_pictures_without_any_box_to_learn_are_refused(tmp_path: Path, unusable: dict[str, Any]) -> None:
    file = write(tmp_path, [box(number, **unusable) for number in (1, 2)])
    crowds = 2 * unusable.get("iscrowd", 0)
    with pytest.raises(TriviumError) as refusal:
        read_detection("coco", str(tmp_path))
    assert str(refusal.value) == (
        f"{file}: there is nothing to learn from its 2 boxes, {crowds} of which are crowds, and the others have no area"
        " inside their picture: mend the file, or get it again"
    )
    write(tmp_path, [box(1, [1, 1, 2, 2])])
    write(tmp_path, [box(1, **unusable)], "val")  # what is measured may have none
    assert list(read_detection("coco", str(tmp_path)).held_out) == ["val2017"]


def test_numbers_too_large_to_be_added_lie_beyond_the_picture(tmp_path: Path) -> None:
    write(tmp_path, [box(1, [1e308, 0, 1e308, 5]), box(1, [1, 1, 1e308, 5])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_detection("coco", str(tmp_path))
        assert found.train.read(0, 0)["boxes"].tolist() == [[1, 1, 30, 6]]
    assert ["1 of 2 boxes have no area" in note for note in found.notes] == [True, False]


@pytest.mark.parametrize(
    ("annotations", "changes", "sentence"),
    [
        ([box(1, [1, 2, float("nan"), 4])], {}, r"annotations, entry 0\): its \"bbox\" \[1, 2, nan, 4\] is not four"),
        ([box(1, [1, 2, 3])], {}, r"entry 0\): its \"bbox\" \[1, 2, 3\] is not four numbers"),
        ([box(1, [1, 2, 3, 4]), box(1, [1, 2, 3, 4], 2)], {}, r"entry 1\): its category 2 is not listed"),
        ([box(1, [1, 2, 10**400, 4])], {}, r"entry 0\): its \"bbox\" \[1, 2, 10+, 4\] is not four numbers"),
        ([box(1, [1, 2, 3, 4], area=-(10**400))], {}, r"annotations, entry 0\): its \"area\" is no number"),
        ([box(9, [1, 2, 3, 4])], {}, r"entry 0\): its picture 9 is not listed"),
        ([], {}, "no annotations, so there is no box"),
        ([box(1, [1, 2, 3, 4])], {"categories": [{"id": 1, "name": "cup"}] * 2}, "its id 1 is that of cup already"),
        (
            [box(1, [1, 2, 3, 4])],
            {"images": [{"id": 1, "file_name": "1.png"}]},
            r'images, entry 0\): it has no "width"',
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_file_and_entry(
    tmp_path: Path, annotations: list[dict[str, Any]], changes: dict[str, Any], sentence: str
) -> None:
    file = write(tmp_path, annotations, **changes)
    with pytest.raises(TriviumError, match=sentence) as error:
        read_detection("coco", str(tmp_path))
    assert str(file) in str(error.value)


def test_a_folder_without_annotations_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(TriviumError, match=r"holds no annotations/instances_train2017\.json"):
        read_detection("coco", str(tmp_path))
    with pytest.raises(TriviumError, match="instances_val"):
        read_val("vg", str(tmp_path))


def test_both_halves_must_list_the_same_categories(tmp_path: Path) -> None:
    write(tmp_path, [box(1, [1, 2, 3, 4])])
    write(tmp_path, [box(1, [1, 2, 3, 4], 1)], "val", categories=[{"id": 1, "name": "cup"}])
    with pytest.raises(TriviumError, match="lists other categories"):
        read_detection("coco", str(tmp_path))


def test_attributes_without_names_may_have_other_numbers_in_the_other_half(tmp_path: Path) -> None:
    """Numbers are all that is known of them, and one half need not use the highest."""
    for most in ({"train": 5, "val": 2}, {"train": 2, "val": 5}):  # a model needs a place for each of both
        for half in most:
            file = write(tmp_path, [box(1, [1, 2, 3, 4], attribute_ids_max16=[0, most[half]])], half)
            file.rename(file.with_name(f"instances_{half}_split_by_coco_2017.json"))
        assert read_detection("vg", str(tmp_path)).attributes == ("0", "1", "2", "3", "4", "5")
    names = [{"id": n, "name": name} for n, name in enumerate(("none", "red", "blue"))]
    for half in ("train", "val"):
        file = write(tmp_path, [box(1, [1, 2, 3, 4], attribute_ids_max16=[1])], half, attCategories=names)
        file.rename(file.with_name(f"instances_{half}_split_by_coco_2017.json"))
        names = [names[0], names[1] | {"name": "green"}, names[2]]
    with pytest.raises(TriviumError, match="lists other categories"):
        read_detection("vg", str(tmp_path))


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ([1, True], "is no list of at most 16 whole numbers"),
        ([1.0], "is no list of at most 16 whole numbers"),
        ([0] * 17, "is no list of at most 16 whole numbers"),
        ([2, -2, -1], "-2 is no number of an attribute, and -1 where there is none"),
        ([10**9], "1000000000 is no number of an attribute"),
        ([10**30], "10+ is no number of an attribute"),
    ],
)
def test_attributes_that_cannot_be_meant_are_refused(tmp_path: Path, attributes: list[Any], sentence: str) -> None:
    for more in ({}, {"attCategories": [{"id": 1, "name": "red"}]}):
        file = write(tmp_path, [box(1, [1, 2, 3, 4], attribute_ids_max16=attributes)], **more)
        file.rename(file.with_name("instances_train_split_by_coco_2017.json"))
        with pytest.raises(TriviumError, match=rf"annotations, entry 0\): .*{sentence}"):
            read_detection("vg", str(tmp_path))


def test_boxes_without_any_attribute_are_told(tmp_path: Path) -> None:
    for more, told in (({}, True), ({"attribute_ids_max16": [-1] * 16}, True), ({"attribute_ids_max16": [0]}, False)):
        file = write(tmp_path, [box(1, [1, 2, 3, 4]), box(2, [1, 2, 3, 4], **more)])
        assert not read_detection("coco", str(tmp_path)).notes, "COCO's have none"
        file = file.rename(file.with_name("instances_train_split_by_coco_2017.json"))
        note = f'{file}: none of its 2 boxes has an attribute ("attribute_ids_max16"): none is learned from it'
        note += ", nor measured on it"
        assert read_detection("vg", str(tmp_path)).notes == [note] * told


def test_pictures_of_visual_genome_lie_in_the_two_folders_that_it_comes_in(tmp_path: Path) -> None:
    file = write(tmp_path, [box(1, [1, 2, 3, 4]), box(2, [1, 2, 3, 4])])
    file.rename(file.with_name("instances_train_split_by_coco_2017.json"))
    for number, folder in ((1, "VG_100K"), (2, "VG_100K_2")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (30, 20), (number, 0, 0)).save(tmp_path / folder / f"{number}.png")
    rows = read_detection("vg", str(tmp_path)).train
    found = [Image.open(io.BytesIO(rows.picture(row))).getpixel((0, 0)) for row in range(2)]
    assert found == [(1, 0, 0), (2, 0, 0)]


def test_the_validation_half_is_found_in_the_folder_of_its_own(tmp_path: Path) -> None:
    assert find_val("coco", str(tmp_path)) is None
    write(tmp_path, [box(1, [1, 2, 3, 4])], "val")
    rows, classes = find_val("coco", str(tmp_path))  # type: ignore[misc]
    assert classes == ("", "cup", "", "mug") and len(rows) == 2
    write(tmp_path / "COCO", [box(1, [1, 2, 3, 4])], "val")
    rows, _ = find_val("coco", str(tmp_path))  # type: ignore[misc]
    assert rows.path(0) == str(tmp_path / "COCO" / "val2017" / "1.png")


def test_scenes_are_read_as_they_were_made(tmp_path: Path) -> None:
    scenes = Scenes("train", 6, seed=5)
    write_scenes(scenes, tmp_path, ("coco", "vg"))
    coco, vg = (read_detection(name, str(tmp_path / name)) for name in ("coco", "vg"))
    for index in range(6):
        scene = scenes.scene(index)
        expected = [[x, y, x + w, y + h] for x, y, w, h in (thing.box for thing in scene.objects)]
        for found in (coco, vg):
            assert found.train.read(index, index)["boxes"].tolist() == expected
            assert found.train.read(index, index)["classes"].tolist() == [t.category + 1 for t in scene.objects]
        named = [[vg.attributes[n] for n in row if n >= 0] for row in vg.train.read(index, index)["attributes"]]
        assert named == [[word for word in (thing.hue, thing.size) if word] for thing in scene.objects]
    assert vg.attributes == ("", *ATTRIBUTES)
    assert len(vg.train.capped(3)) == 3
    assert vg.train.capped(3).read(1, 1)["boxes"].tolist() == vg.train.read(2, 2)["boxes"].tolist()


# ------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((300, 900), (444, 1332)),
        ((800, 1000), (800, 1000)),
        ((2, 20_000), (1, 1333)),
        ((20_000, 2), (1333, 1)),
    ],
)
def test_the_shorter_side_is_set_and_the_longer_one_capped(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert shortest_size(*size, 800, 1333) == expected
    assert ImageTransform(800, crop="shortest", longest=1333)(np.zeros((*size, 3), np.uint8)).shape[1:] == expected


def test_boxes_follow_the_drawing_through_every_augmentation() -> None:
    """A bright rectangle on black: wherever it goes, its box is where its pixels are."""
    rng = np.random.default_rng(0)
    augmentation = Augmentation(flip=0.5, shorts=(60, 80), crop=0.5, before_crop=(70, 90), crop_sides=(40, 70))
    seen = 0
    for _ in range(40):
        picture = np.zeros((64, 96, 3), np.uint8)
        left, top = int(rng.integers(0, 60)), int(rng.integers(0, 40))
        picture[top : top + 20, left : left + 30] = 255
        image, boxes = augmentation(rng, picture, np.array([[left, top, left + 30, top + 20]], np.float64), 140)
        assert min(image.shape[:2]) in (60, 80) or max(image.shape[:2]) <= 140
        rows, columns = np.flatnonzero((image[..., 0] > 127).any(1)), np.flatnonzero((image[..., 0] > 127).any(0))
        if (boxes[0, 2:] - boxes[0, :2] < 3).any():
            continue
        seen += 1
        assert boxes[0] == pytest.approx([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], abs=2)
    assert seen > 20


def test_other_colours_leave_boxes_and_hues_where_they_are() -> None:
    picture = np.full((8, 12, 3), (200, 80, 40), np.uint8)
    boxes_M4 = np.array([[2.0, 1.0, 9.0, 7.0]])
    augmentation = Augmentation(flip=0.0, shorts=(8,), crop=0.0, jitter=0.3)
    seen = []
    for seed in range(20):
        image_HWC, found_M4 = augmentation(np.random.default_rng(seed), picture, boxes_M4, None)
        assert np.array_equal(found_M4, boxes_M4) and (image_HWC == image_HWC[0, 0]).all()
        red, green, blue = image_HWC[0, 0].tolist()
        assert red > green > blue, "still orange"
        seen.append((red, green, blue))
    lights = [sum(each) for each in seen]
    assert len(set(seen)) == 20 and min(lights) < 0.85 * 320 and max(lights) > 1.15 * 320
    plain, _ = replace(augmentation, jitter=0.0)(np.random.default_rng(0), picture, boxes_M4, None)
    assert np.array_equal(plain, picture)


def encoded(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, "PNG")
    return buffer.getvalue()


def sample(height: int, width: int, boxes: list[list[float]], **more: Any) -> Any:
    return {
        "image": encoded(height, width), "size": (height, width), "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "classes": np.arange(len(boxes)), "name": "a row", "same_image": 1,
    } | more  # fmt: skip


def test_a_batch_is_padded_and_its_boxes_are_flat_with_the_row_of_each() -> None:
    collate = DetectionCollate(ImageTransform(20, crop="shortest", longest=40), PLAIN)
    samples = [sample(20, 40, [[0, 0, 20, 20], [10, 5, 20, 15]]), sample(40, 40, []), sample(20, 20, [[0, 0, 20, 10]])]
    prepared = [collate.prepare(each, Draws(0, "coco", n)) for n, each in enumerate(samples)]
    rows = torch.arange(3)
    batch = collate.batch("coco", prepared, rows, rows, 0, ())
    assert batch.images[0].sizes_B2 is not None
    assert batch.images[0].sizes_B2.tolist() == [[20, 40], [20, 20], [20, 20]]
    assert batch.targets["box_row"].tolist() == [0, 0, 2]
    expected = [[0.25, 0.5, 0.5, 1], [0.375, 0.5, 0.25, 0.5], [0.5, 0.25, 1, 0.5]]
    torch.testing.assert_close(batch.targets["box"], torch.tensor(expected))
    last = batch.part(1, 3, 1)
    assert last.targets["box_row"].tolist() == [1] and last.targets["box_class"].tolist() == [0]
    assert batch.images[0].pixels_BCHW[1, :, :, 20:].sum() == 0


def test_pictures_of_one_shape_are_padded_together_and_are_those_of_the_global_batch(tmp_path: Path) -> None:
    file = write(tmp_path, [box(number, [1, 1, 5, 5]) for number in range(1, 9)])
    shapes = [(30, 20) if number % 2 else (20, 30) for number in range(8)]  # lying and standing in turns
    for number, (width, height) in enumerate(shapes, 1):
        Image.new("RGB", (width, height), (30 * number, 0, 0)).save(tmp_path / "train2017" / f"{number}.png")
    content = json.loads(file.read_text())
    content["images"] = [
        {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        for number, (width, height) in enumerate(shapes, 1)
    ]
    file.write_text(json.dumps(content))
    rows = read_detection("coco", str(tmp_path)).train
    collate = DetectionCollate(ImageTransform(20, crop="shortest", longest=40), PLAIN)
    reader = StreamReader(Stream("coco", rows, collate, batch=8, micro_batch=4, ratio=1.0), seed=0)
    batches = [reader.micro_batch(0, number) for number in range(2)]
    shown = [batch.images[0] for batch in batches]
    assert [tuple(images.pixels_BCHW.shape[2:]) for images in shown] == [(30, 20), (20, 30)]
    assert all(images.sizes_B2 is None for images in shown), "so nothing is padded"
    reds = [int(pixels[0, 0, 0]) for images in shown for pixels in images.pixels_BCHW]
    assert sorted(reds) == [30 * number for number in range(1, 9)]
    assert sorted(torch.cat([batch.places_B for batch in batches]).tolist()) == list(range(8))
    assert [batch.targets["box_row"].tolist() for batch in batches] == [[0, 1, 2, 3]] * 2


def test_a_crop_that_leaves_nothing_of_a_box_drops_it_with_its_class() -> None:
    collate = DetectionCollate(
        ImageTransform(20, crop="shortest"),
        Augmentation(flip=0, shorts=(20,), crop=1, before_crop=(40,), crop_sides=(8, 8)),
    )
    boxes = [[0.0, 0, 1, 1], [0, 0, 40, 40]]
    prepared = [collate.prepare(sample(40, 40, boxes), Draws(0, "coco", n)) for n in range(10)]
    assert all(each.kept_M[1] for each in prepared) and not all(each.kept_M[0] for each in prepared)
    batch = collate.batch("coco", prepared, torch.arange(10), torch.arange(10), 0, ())
    assert (
        len(batch.targets["box"]) == len(batch.targets["box_class"]) == sum(int(each.kept_M.sum()) for each in prepared)
    )


def test_a_picture_of_another_size_than_its_boxes_refer_to_is_replaced() -> None:
    collate = DetectionCollate(ImageTransform(20, crop="shortest"), PLAIN)
    with pytest.raises(BadSample, match="has 40 x 20 pixels, not 20 x 40 as stated"):
        collate.prepare(sample(20, 40, [[0, 0, 1, 1]], size=(40, 20)), Draws(0, "coco", 0))


def test_a_picture_that_its_crop_would_blow_up_is_replaced() -> None:
    collate = DetectionCollate(ImageTransform(20, crop="shortest", longest=40), replace(Augmentation(), crop=1.0))
    reader: Any = SimpleNamespace(read=lambda *rows: sample(2, 10_000, []))
    with pytest.raises(
        BadSample, match=r"a row: its 10,000 x 2 pixels would become \d,\d00,000 x \d00 with \d00 on the shorter"
    ):
        read(reader, collate, 0, 0, Draws(0, "coco", 0))
    still = replace(collate, augmentation=PLAIN).prepare(sample(2, 10_000, []), Draws(0, "coco", 0))
    assert still.pixels_CHW.shape == (3, 1, 40), "without a crop it is none too large"


def test_in_evaluation_nothing_is_drawn() -> None:
    collate = DetectionCollate(ImageTransform(20, crop="shortest"), Augmentation(flip=1.0), train=False)
    pixels = collate.prepare(sample(40, 60, [[0, 0, 6, 4]]), Draws(0, "coco", 0))
    assert pixels.pixels_CHW.shape == (3, 20, 30)
    assert pixels.boxes_M4.tolist() == [pytest.approx([0.05, 0.05, 0.1, 0.1])]
    assert resized(np.zeros((10, 10, 3), np.uint8), np.zeros((0, 4)), 5, None)[1].shape == (0, 4)


def test_pictures_of_one_size_are_not_padded() -> None:
    assert padded([torch.zeros(3, 4, 5, dtype=torch.uint8)] * 2)[1] is None
