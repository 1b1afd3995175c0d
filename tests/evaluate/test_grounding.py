"""Choice of boxes, overlap and pointing: against the public code's loops, known maps, and a whole run on scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from trivium.bundle import Bundle
from trivium.data.embedded import bert_vocabulary
from trivium.data.referring import BadSample, Expression, Referring, read_referring
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.evaluate import grounding
from trivium.invariance.albef import TINY, random_albef
from trivium.models.clip import Clip, ClipConfig

BOXES = st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(1, 10), st.integers(1, 10))


def published_overlap(box1: tuple[float, ...], box2: tuple[float, ...]) -> float:
    """computeIoU of dataset/utils.py."""
    x1, y1 = max(box1[0], box2[0]), max(box1[1], box2[1])
    x2 = min(box1[0] + box1[2] - 1, box2[0] + box2[2] - 1)
    y2 = min(box1[1] + box1[3] - 1, box2[1] + box2[3] - 1)
    shared = (x2 - x1 + 1) * (y2 - y1 + 1) if x1 < x2 and y1 < y2 else 0
    return float(shared) / (box1[2] * box1[3] + box2[2] * box2[3] - shared)


@given(BOXES, st.lists(BOXES, min_size=1, max_size=5))
def test_overlap_is_the_published_one(box: tuple[int, ...], boxes: list[tuple[int, ...]]) -> None:
    found = grounding.overlap(np.array(box, float), np.array(boxes, float))
    assert found.tolist() == pytest.approx([published_overlap(box, other) for other in boxes])


def test_overlap_of_known_boxes() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 0, 10, 10], [10, 0, 10, 10], [9, 9, 5, 5]], float)
    # The last shares one pixel, which the published code does not count.
    assert grounding.overlap((0, 0, 10, 10), boxes).tolist() == pytest.approx([1, 50 / 150, 0, 0])


@given(st.lists(st.tuples(*[st.floats(0.5, 20)] * 4), min_size=1, max_size=6), st.integers(0, 5))
def test_scores_are_those_of_the_published_loop(boxes: list[tuple[float, ...]], seed: int) -> None:
    heat = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed))
    enlarged = F.interpolate(heat.double().view(1, 1, 6, 6), size=(45, 50), mode="bicubic").squeeze()
    published = []
    for box in boxes:  # grounding_eval of dataset/utils.py
        inside = enlarged[int(box[1]) : int(box[1] + box[3]), int(box[0]) : int(box[0] + box[2])]
        published.append(float(inside.sum() / (box[2] * box[3]) ** 0.5))
    mine = grounding.scores(grounding.enlarged(heat, (45, 50)), np.array(boxes))
    assert mine.tolist() == pytest.approx(published, abs=1e-9)


def test_pointing_at_a_hot_patch() -> None:
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0  # second row, third column of patches: around (50, 22.5) of a picture of 60 x 80
    enlarged = grounding.enlarged(heat, (60, 80))
    assert grounding.points_at(enlarged, (45, 15, 10, 15))
    assert not grounding.points_at(enlarged, (0, 0, 45, 60))


def tiny_bundle() -> Bundle:
    tokenizer = Tokenizer.wordpiece(bert_vocabulary()).for_captions()
    config = replace(TINY, vocab_size=tokenizer.vocab_size)
    return Bundle(
        "albef", random_albef(config, dtype=torch.float32), tokenizer, ImageTransform(TINY.image_size), max_length=16
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Referring:
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(Scenes("held-out-style", 6, seed=3), out, ["refcoco"])
    return read_referring(out / "refcoco")


def oracle(monkeypatch: pytest.MonkeyPatch, data: Referring, right: bool) -> None:
    """A model that looks at what is meant, or at the corner farthest from it."""
    means = {(each.image, each.text): each for each in data.good("val")}

    def heats(bundle: Bundle, expressions: list[Expression], *_: object) -> list[tuple[Expression, torch.Tensor]]:
        found = []
        for each in expressions:
            left, top, width, height = means[each.image, each.text].box
            heat = torch.zeros(128, 128)
            if right:
                heat[int(top) : int(top + height), int(left) : int(left + width)] = 1.0
            else:
                heat[0 if top + height / 2 > 64 else 127, 0 if left + width / 2 > 64 else 127] = 1.0
            found.append((each, heat))
        return found

    monkeypatch.setattr(grounding, "_heats", heats)


def test_who_looks_at_what_is_meant_is_right_everywhere(data: Referring, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle(monkeypatch, data, right=True)
    with_boxes = replace(data, proposed={picture: boxes.copy() for picture, boxes in data.annotated.items()})
    found = grounding.run(tiny_bundle(), with_boxes)
    assert found.results["val.pointing"].value == 1 and found.results["val.among_annotated"].value > 0.9
    assert found.results["val.accuracy"].value == found.results["val.among_annotated"].value
    assert found.results["val.accuracy.at_best"].value == 1
    assert 0 < found.chance["val.pointing"] < 0.5 and 0 < found.chance["val.among_annotated"] <= 0.5
    oracle(monkeypatch, data, right=False)
    wrong = grounding.run(tiny_bundle(), with_boxes)
    assert wrong.results["val.pointing"].value < 0.1 and wrong.results["val.among_annotated"].value < 0.5


def test_a_picture_without_proposals_is_a_wrong_answer(data: Referring, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle(monkeypatch, data, right=True)
    first = data.good("val")[0].image_id
    proposed = {picture: boxes for picture, boxes in data.annotated.items() if picture != first}
    found = grounding.run(tiny_bundle(), replace(data, proposed=proposed))
    missing = sum(each.image_id == first for each in data.good("val"))
    assert found.results["val.accuracy"].value <= 1 - missing / len(data.good("val"))
    assert any(f"of {missing:,} expressions no box is proposed" in note for note in found.notes)


@pytest.mark.parametrize("by", ["match", "cosine"])
def test_a_real_model_is_measured_and_a_broken_picture_is_left_out(
    by: grounding.By, data: Referring, tmp_path: Path
) -> None:
    broken = replace(data.good("val")[0], image=str(tmp_path / "nowhere.jpg"))
    with_broken = replace(data, splits={"val": [broken, *data.splits["val"]]})
    bundle = tiny_bundle()
    found = grounding.run(bundle, with_broken, by=by)
    assert found.results["val.pointing"].n == len(data.good("val"))
    assert any("val: 1 expressions are left out" in note and "nowhere.jpg" in note for note in found.notes)
    assert any("no boxes are proposed" in note for note in found.notes)
    few = grounding.run(bundle, data, rows=3, by=by)
    assert few.results["val.pointing"].n == 3


def test_pictures_are_encoded_once_and_texts_are_not_mixed_up(data: Referring) -> None:
    bundle = tiny_bundle()
    pairs = list(grounding._heats(bundle, data.good("val"), None, "match", []))
    assert [each for each, _ in pairs] == sorted(data.good("val"), key=lambda each: each.image)
    for expression, heat in pairs[::4]:
        [alone] = bundle.ground(expression.image, expression.text)
        assert torch.allclose(heat, alone.text_nn, rtol=1e-3, atol=1e-12)


def test_who_cannot_ground_is_told(data: Referring) -> None:
    config = ClipConfig.of_size("tiny")
    tokenizer = Tokenizer.wordpiece(bert_vocabulary())
    clip = Bundle("clip", Clip(config), tokenizer, ImageTransform(config.image_size))
    with pytest.raises(TriviumError, match=r"\(clip\) has no attention from words to patches"):
        grounding.run(clip, data)
    for cuts in (ImageTransform(TINY.image_size, crop="center"), ImageTransform(TINY.image_size, resize=256)):
        with pytest.raises(TriviumError, match="sees only the middle of a picture"):
            grounding.run(replace(tiny_bundle(), transform=cuts), data)


def test_a_split_without_a_usable_row_is_told(data: Referring) -> None:
    bad = BadSample("refs(unc).p", "entry 3", "its box is broken")
    with pytest.raises(TriviumError, match=r"split val of refcoco has no usable expression; the first: refs\(unc\)\.p"):
        grounding.run(tiny_bundle(), replace(data, splits={"val": [bad]}))
    with pytest.raises(TriviumError, match="holds no split to measure on"):
        grounding.run(tiny_bundle(), replace(data, splits={"train": data.splits["val"]}))
