"""Random changes against the public code's arithmetic written out, and their draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trivium.data import random_augment
from trivium.data.order import Draws
from trivium.data.random_augment import (
    CHANGES,
    RandomAugment,
    autocontrast,
    brightened,
    equalised,
    moved,
    sharpened,
    turned,
)
from trivium.errors import TriviumError


def smooth(height: int = 24, width: int = 31, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(40, 200, (height + 4, width + 4, 3))
    kernel = [np.roll(np.roll(noise, dy, 0), dx, 1) for dy in range(5) for dx in range(5)]
    return np.mean(kernel, axis=0)[4:, 4:].astype(np.uint8)


def plain_warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """cv2.warpAffine by its definition: the inverse map, four neighbours, grey outside."""
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    height, width, _ = image.shape
    found = np.empty(image.shape)
    for row in range(height):
        for column in range(width):
            x, y, _ = inverse @ (column, row, 1)
            left, top = math.floor(x), math.floor(y)
            value = np.zeros(3)
            for dy in (0, 1):
                for dx in (0, 1):
                    share = (x - left if dx else 1 - x + left) * (y - top if dy else 1 - y + top)
                    inside = 0 <= left + dx < width and 0 <= top + dy < height
                    value += share * (image[top + dy, left + dx] if inside else 128)
            found[row, column] = value
    return found


def rotation(width: int, height: int, degrees: float) -> np.ndarray:
    """cv2.getRotationMatrix2D about the middle."""
    a, b = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return np.array([[a, b, (1 - a) * x - b * y], [-b, a, b * x + (1 - a) * y]])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("number", "matrix"),
    [
        (5, lambda sign: np.array([[1, sign * 0.21, 0], [0, 1, 0]])),
        (6, lambda sign: np.array([[1, 0, 0], [sign * 0.21, 1, 0]])),
        (7, lambda sign: np.array([[1, 0, -sign * 7.0], [0, 1, 0]])),
        (8, lambda sign: np.array([[1, 0, 0], [0, 1, -sign * 7.0]])),
        (9, lambda sign: rotation(31, 24, sign * 21)),
    ],
)
def test_what_moves_is_opencvs_map_at_level_7(number: int, matrix: object, sign: int) -> None:
    image = smooth()
    expected = plain_warp(image, matrix(sign))  # type: ignore[operator]
    assert np.abs(CHANGES[number](image, 0.7, sign).astype(float) - expected).max() <= 1.5


def test_nothing_moved_is_nothing_changed() -> None:
    image = smooth()
    assert np.array_equal(moved(image, (1, 0, 0, 0, 1, 0)), image)
    assert np.array_equal(turned(image, 0.0), image)


def test_contrast_and_brightness_are_the_published_tables() -> None:
    image = smooth()
    stretched = autocontrast(image)
    assert stretched.min(axis=(0, 1)).tolist() == [0] * 3 and (stretched.max(axis=(0, 1)) >= 254).all()
    low, high = image[..., 0].min(), image[..., 0].max()
    exact = (image[..., 0].astype(float) - low) * 255 / (int(high) - int(low))
    assert np.abs(stretched[..., 0] - np.floor(exact + 1e-9)).max() <= 1
    flat = np.full((4, 5, 3), 77, np.uint8)
    assert np.array_equal(autocontrast(flat), flat) and np.array_equal(equalised(flat), flat)
    assert np.array_equal(brightened(image, 1.36), (image * np.float32(1.36)).clip(0, 255).astype(np.uint8))


def test_equalising_is_the_published_loop() -> None:
    image = smooth(40, 40)
    for channel in range(3):
        values = image[..., channel]
        histogram = np.array([(values == value).sum() for value in range(256)])
        step = histogram[histogram != 0][:-1].sum() // 255
        table = [step // 2]
        for value in range(255):
            table.append(table[-1] + histogram[value])
        expected = np.clip(np.array(table) // step, 0, 255)[values]
        assert np.array_equal(equalised(image)[..., channel], expected)


def test_sharpening_leads_away_from_the_soft_picture_and_is_clipped() -> None:
    image = smooth()
    sharp = sharpened(image, 1.36)
    for row, column in ((1, 1), (10, 20), (22, 29)):
        patch = image[row - 1 : row + 2, column - 1 : column + 2].astype(float)
        soft = np.rint((patch.sum((0, 1)) + 4 * patch[1, 1]) / 13)
        expected = soft + 1.36 * (image[row, column] - soft)
        assert np.abs(sharp[row, column] - expected).max() <= 1
    assert np.array_equal(sharp[0], image[0]) and np.array_equal(sharp[:, -1], image[:, -1])
    lone = np.zeros((5, 5, 3), np.uint8)
    lone[2, 2] = 250
    assert sharpened(lone, 1.36)[2, 2].tolist() == [255] * 3, "the public code makes it black"


def test_grey_pictures_stay_grey_whatever_is_drawn() -> None:
    grey = np.repeat(smooth()[..., :1], 3, axis=2)
    for number in range(len(CHANGES)):
        changed = CHANGES[number](grey, 0.7, 1)
        assert np.array_equal(changed[..., 0], changed[..., 1]) and np.array_equal(changed[..., 0], changed[..., 2])
        assert changed.dtype == np.uint8 and changed.shape == grey.shape


def test_a_picture_changes_by_its_place_alone() -> None:
    augment, image = RandomAugment(), smooth()

    def at(place: int) -> np.ndarray:
        return augment(Draws(3, "pairs", place).generator("augment"), image)

    assert all(np.array_equal(at(place), at(place)) for place in range(20))
    unchanged = sum(np.array_equal(at(place), image) for place in range(200)) / 200
    # Of two draws each is made half of the time, and one change in ten is none.
    assert unchanged == pytest.approx((1 - 0.5 * 0.9) ** 2, abs=0.09)
    assert np.array_equal(RandomAugment(number=0)(np.random.default_rng(0), image), image)


def test_each_change_is_drawn_as_often_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0] * len(CHANGES)

    def counting(number: int) -> object:
        def change(image: np.ndarray, _: float, __: int) -> np.ndarray:
            counts[number] += 1
            return image

        return change

    monkeypatch.setattr(random_augment, "CHANGES", tuple(counting(number) for number in range(len(CHANGES))))
    rng, image = np.random.default_rng(0), smooth(4, 4)
    for _ in range(2000):
        RandomAugment()(rng, image)
    assert sum(counts) == pytest.approx(2000, rel=0.1)
    assert min(counts) > 130 and max(counts) < 270


def test_levels_and_numbers_that_are_none_are_told() -> None:
    with pytest.raises(TriviumError, match="level 11: it lies between 0 and 10"):
        RandomAugment(level=11)
    with pytest.raises(TriviumError, match="-1 random changes"):
        RandomAugment(number=-1)
