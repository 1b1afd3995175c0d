"""Scenes: boxes, masks and hidden shares against the pixels; the order of everything from (seed, index) alone."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.data.decode import decode
from trivium.data.drawings import Cut, cut, pool
from trivium.data.scenes import SIZES, Scene, SceneObject, Scenes
from trivium.errors import TriviumError

ANY = st.builds(
    Scenes,
    split=st.sampled_from(["train", "new-scenes", "held-out-concepts", "held-out-style", "held-out-both"]),
    count=st.just(10**6),
    seed=st.integers(0, 2**40),
    difficulty=st.floats(0, 1),
    classes=st.sampled_from(["group", "subgroup"]),
)


def cuts_of(scenes: Scenes, thing: SceneObject) -> list[Cut]:
    """Several where clip art of one title has several drawings."""
    named = [
        cut(each)
        for styles in pool(scenes.split, scenes.classes)[thing.category]
        for each in styles
        if (each.name, each.concept, each.style) == (thing.name, thing.concept, thing.style)
    ]
    return [each for each in named if each is not None and each.hue == thing.hue]


def placements(scenes: Scenes, scene: Scene, number: int) -> list[tuple[int, np.ndarray]]:
    """Every (area of the whole drawing, its RGBA) that leaves, under the later objects, exactly what is visible."""
    thing, later_HW = scene.objects[number], scene.owner_HW > number
    left, top, width, height = thing.box
    found = []
    for cutout, side in product(cuts_of(scenes, thing), range(SIZES[thing.size][0], SIZES[thing.size][1] + 1)):
        rgba_HWC = cutout.at(side)
        rows, columns = rgba_HWC.shape[:2]
        for first_row in range(max(0, top + height - rows), min(top, 128 - rows) + 1):
            for first_column in range(max(0, left + width - columns), min(left, 128 - columns) + 1):
                whole_HW = np.zeros((128, 128), bool)
                whole_HW[first_row : first_row + rows, first_column : first_column + columns] = rgba_HWC[..., 3] >= 128
                if np.array_equal(whole_HW & ~later_HW, scene.mask(number)):
                    found.append((int(whole_HW.sum()), rgba_HWC))
    return found


def test_masks_are_those_of_the_drawings_less_what_lies_above() -> None:
    scenes = Scenes("train", 8, seed=3, difficulty=1)
    hidden = []
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        for number, thing in enumerate(scene.objects):
            found = placements(scenes, scene, number)
            shares = [1 - thing.area / whole for whole, _ in found]
            assert any(share == pytest.approx(thing.hidden) for share in shares)
            assert min(shares) <= 0.2
            hidden.append(thing.hidden)
    assert max(hidden) > 0.05
    assert sum(share == 0 for share in hidden) > len(hidden) / 2


def test_pixels_inside_a_mask_are_the_drawing() -> None:
    scenes = Scenes("held-out-style", 6, seed=1, difficulty=0.5)
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        number = len(scene.objects) - 1  # nothing lies on the last
        left, top, width, height = scene.objects[number].box
        shown_HWC = scene.pixels_HWC[top : top + height, left : left + width]
        matches = []
        for _, rgba_HWC in placements(scenes, scene, number):
            rows, columns = (np.flatnonzero((rgba_HWC[..., 3] >= 128).any(axis=axis)) for axis in (1, 0))
            part_HWC = rgba_HWC[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            opaque_HW = part_HWC[..., 3] == 255
            matches.append(np.array_equal(shown_HWC[opaque_HW], part_HWC[opaque_HW][:, :3]))
        assert any(matches)


@given(ANY, st.integers(0, 10**6 - 1))
def test_every_scene_keeps_its_bounds(scenes: Scenes, index: int) -> None:
    scene = scenes.scene(index)
    assert scene.pixels_HWC.shape == (128, 128, 3)
    assert scene.pixels_HWC.dtype == np.uint8
    assert 2 <= len(scene.objects) <= 6
    assert set(np.unique(scene.owner_HW)) == set(range(-1, len(scene.objects)))
    allowed = {
        (each.name, each.concept, each.style)
        for concepts in pool(scenes.split, scenes.classes)
        for styles in concepts
        for each in styles
    }
    assert len({thing.name for thing in scene.objects}) == len(scene.objects)
    for number, thing in enumerate(scene.objects):
        mask_HW = scene.mask(number)
        left, top, width, height = thing.box
        assert mask_HW.sum() == thing.area == mask_HW[top : top + height, left : left + width].sum()
        inside_HW = mask_HW[top : top + height, left : left + width]
        assert inside_HW[0].any() and inside_HW[-1].any() and inside_HW[:, 0].any() and inside_HW[:, -1].any()
        assert 0 <= thing.hidden <= 0.2 * scenes.difficulty + 1e-9
        assert max(width, height) <= SIZES[thing.size][1]
        if thing.hidden == 0:
            assert max(width, height) >= SIZES[thing.size][0] - 2  # half a pixel may be lost at either edge
        assert (thing.name, thing.concept, thing.style) in allowed


@given(st.integers(0, 2**40), st.integers(0, 10**9), st.sampled_from(["group", "subgroup"]))
def test_training_scenes_hold_nothing_that_is_held_out(seed: int, index: int, classes: str) -> None:
    held_out = {
        (kind, value)
        for split in ("held-out-concepts", "held-out-both")
        for concepts in pool(split, classes)
        for styles in concepts
        for each in styles
        for kind, value in (("concept", each.concept), ("name", each.name.lower()))
    }
    for split in ("train", "new-scenes", "held-out-style"):
        for thing in Scenes(split, 10**9 + 1, seed, 0.5, classes).scene(index).objects:
            assert not {("concept", thing.concept), ("name", thing.name.lower())} & held_out
            assert (thing.style == "noto") == (split == "held-out-style")


PROGRAM = """
import hashlib
from trivium.data.scenes import Scenes
for split, index in (("train", 7), ("held-out-both", 123456)):
    sample = Scenes(split, 10**6, 5, 0.7).read(index, index)
    print(hashlib.sha256(sample["image"]).hexdigest(), sample["texts"])
"""


def test_another_process_makes_the_same_bytes() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    # Here other scenes come first, so that nothing but (seed, index) may matter.
    Scenes("train", 10**6, 5, 0.7).scene(8)
    lines = []
    for split, index in (("held-out-both", 123456), ("train", 7)):
        sample = Scenes(split, 10**6, 5, 0.7).read(index, index)
        lines.append(f"{hashlib.sha256(sample['image']).hexdigest()} {sample['texts']}")
    assert said.splitlines() == lines[::-1]


def test_splits_seeds_and_indices_differ() -> None:
    settings = [("train", 0, 0), ("train", 0, 1), ("train", 1, 0), ("new-scenes", 0, 0)]
    pictures = {Scenes(split, 2, seed).scene(index).pixels_HWC.tobytes() for split, seed, index in settings}
    assert len(pictures) == len(settings)


def test_difficulty_moves_what_it_says() -> None:
    def facts(difficulty: float) -> tuple[float, float, float]:
        made = [Scenes("train", 60, 2, difficulty).scene(index) for index in range(60)]
        things = [thing for scene in made for thing in scene.objects]
        return (
            len(things) / len(made),
            float(np.mean([max(thing.box[2:]) for thing in things])),
            float(np.mean([thing.hidden for thing in things])),
        )

    easy, middle, hard = map(facts, (0, 0.5, 1))
    assert easy[0] < middle[0] < hard[0]
    assert easy[1] > middle[1] > hard[1]
    assert 0 == easy[2] < middle[2] < hard[2]


def test_it_is_a_source_for_training() -> None:
    source = pickle.loads(pickle.dumps(Scenes("train", 50, 4)))
    assert len(source) == 50
    assert list(source.blocks()) == [range(50)]
    true, false = source.read(3, 3), source.read(3, 9)
    assert np.array_equal(decode(true["image"]), source.scene(3).pixels_HWC)
    assert false["image"] == true["image"]
    assert false["texts"] == source.read(9, 9)["texts"] != true["texts"]
    assert true["same_image"] == true["same_text"] == false["same_image"] != false["same_text"]
    assert 0 <= true["same_image"] < 2**63


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"split": "dev"}, "no scenes of the split 'dev': choose one of train, new-scenes"),
        ({"classes": "subgroups"}, "no classes 'subgroups': choose group or subgroup"),
        ({"difficulty": 1.5}, "a difficulty of 1.5: it lies between 0 and 1"),
        ({"difficulty": float("nan")}, "a difficulty of nan: it lies between 0 and 1"),
        ({"count": 0}, "0 scenes: ask for at least 1"),
    ],
)
def test_mistakes(given_: dict, said: str) -> None:
    with pytest.raises(TriviumError, match=said):
        Scenes(**{"split": "train", "count": 3} | given_)
