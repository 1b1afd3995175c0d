"""Crop boxes, resizing, the evaluation transform and its file, normalisation."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trivium.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    CropBox,
    Filter,
    ImageTransform,
    color_jitter,
    crop_and_resize,
    normalize,
    random_crop_box,
    resize,
)
from trivium.errors import TriviumError


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# ------------------------------------------------------------------------------------------------ crop boxes


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**32), st.sampled_from([(0.9, 1.0), (0.08, 1.0)]))
def test_a_crop_lies_inside_and_keeps_to_its_bounds(
    height: int, width: int, seed: int, scale: tuple[float, float]
) -> None:
    box = random_crop_box(np.random.default_rng(seed), height, width, scale)
    assert 0 <= box.left <= box.left + box.width <= width
    assert 0 <= box.top <= box.top + box.height <= height
    assert min(box.width, box.height) >= 1
    if min(height, width) > 60 and 3 / 4 < width / height < 4 / 3:  # else rounding or the fallback decides
        assert scale[0] - 0.03 < box.width * box.height / (height * width) <= 1
        assert 0.7 < box.width / box.height < 1.4


def test_crops_are_spread_as_stated() -> None:
    """Share of the area uniform in scale; logarithm of the ratio symmetric; place uniform."""
    rng = np.random.default_rng(0)
    boxes = [random_crop_box(rng, 1000, 1000, (0.1, 0.5)) for _ in range(4000)]
    areas = np.array([box.width * box.height / 1e6 for box in boxes])
    ratios = np.log([box.width / box.height for box in boxes])
    assert abs(areas.mean() - 0.3) < 0.01
    assert abs(np.quantile(areas, 0.25) - 0.2) < 0.01
    assert abs(ratios.mean()) < 0.02
    assert abs(np.abs(ratios).max() - math.log(4 / 3)) < 0.02
    places = np.array([box.left / (1000 - box.width) for box in boxes])
    assert abs(places.mean() - 0.5) < 0.03
    assert places.min() < 0.01
    assert places.max() > 0.99


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(10, 100, (43, 0, 13, 10)), (100, 10, (0, 43, 10, 13)), (1, 1, (0, 0, 1, 1))],
)
def test_a_strip_gets_the_largest_centred_box(height: int, width: int, expected: tuple[int, ...]) -> None:
    assert random_crop_box(np.random.default_rng(0), height, width, (0.9, 1.0)) == CropBox(*expected)


def test_the_generator_alone_decides() -> None:
    first, second = (random_crop_box(np.random.default_rng(7), 300, 200, (0.2, 0.9)) for _ in range(2))
    assert first == second != random_crop_box(np.random.default_rng(8), 300, 200, (0.2, 0.9))


def plain_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> CropBox | None:
    """As torchvision writes it; None where all tries fail."""
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            return CropBox(int(rng.integers(width - box_width + 1)), top, box_width, box_height)
    return None


def test_a_box_is_that_of_the_plain_form_and_takes_the_same_draws() -> None:
    found = 0
    for seed in range(3000):
        height, width = 20 + seed % 90, 30 + seed % 70
        scale, ratio = ((0.9, 1.0), (3 / 4, 4 / 3)) if seed % 2 else ((0.08, 0.9), (0.5, 1.7))
        mine, plain = np.random.default_rng(seed), np.random.default_rng(seed)
        expected = plain_crop_box(plain, height, width, scale, ratio)
        box = random_crop_box(mine, height, width, scale, ratio)
        assert mine.random() == plain.random()
        if expected is not None:
            assert box == expected
            found += 1
    assert 1500 < found < 3000


# ---------------------------------------------------------------------------------------- resizing and colour


def test_resize_shows_the_box_and_nothing_else() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    image[5:15, 10:20] = (255, 0, 0)
    inner = resize(image, 8, CropBox(12, 7, 6, 6), "box")
    assert (inner == (255, 0, 0)).all()
    assert resize(image, (4, 7)).shape == (4, 7, 3)
    assert np.array_equal(resize(image, (20, 30), filter="lanczos"), image)


def test_resize_averages_when_it_shrinks() -> None:
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    small = resize(np.repeat(checkers[..., None], 3, axis=2).astype(np.uint8), 8)
    assert np.abs(small.astype(int) - 128).max() <= 2  # without antialiasing: 0 or 255


sides = st.integers(1, 90)


@given(sides, sides, st.integers(1, 60), st.sampled_from(["bilinear", "bicubic", "lanczos", "box"]), st.data())
def test_a_crop_that_is_resized_is_pillows_to_two_levels(
    height: int, width: int, size: int, filter: Filter, data: st.DataObject
) -> None:
    """The plain form: cut the box out with Pillow, then let Pillow resize it. Nothing outside the box is seen.

    Between its two passes bicubic is clipped to 0 to 255, so on hard edges their order shows: lines of pixels first.
    """
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = CropBox(left, top, data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top)))
    image_HWC = noise(height, width, seed=size)
    if data.draw(st.booleans()):
        image_HWC = np.where(image_HWC > 127, 255, 0).astype(np.uint8)
    image_HWC.flags.writeable = False  # as a kept picture is
    plain = Image.fromarray(image_HWC).crop((left, top, left + box.width, top + box.height))
    resampling = Image.Resampling[filter.upper()]
    if filter in ("bilinear", "bicubic"):
        plain = plain.resize((size, box.height), resampling)
    expected = np.asarray(plain.resize((size, size), resampling)).transpose(2, 0, 1)
    found = crop_and_resize(image_HWC, size, box, filter)
    assert found.shape == (3, size, size) and found.dtype == np.uint8 and found.flags.c_contiguous
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= (2 if filter in ("bilinear", "bicubic") else 0)  # of noise; of photographs 1
    inside_HWC = image_HWC[top : top + box.height, left : left + box.width]
    assert np.array_equal(found, crop_and_resize(inside_HWC, size, None, filter))


def test_two_views_of_one_box_show_the_same_part() -> None:
    rows, columns = np.mgrid[0:90, 0:120]
    image = np.stack([rows * 2, columns * 2, rows + columns], axis=-1).astype(np.uint8)
    box = CropBox(10.5, 20.25, 60, 50)
    large = resize(image, 48, box, "bicubic").astype(float)
    small = resize(image, 24, box, "lanczos").astype(float)
    assert np.abs(large.reshape(24, 2, 24, 2, 3).mean(axis=(1, 3)) - small).max() < 1.5


def test_jitter_changes_colour_only_and_keeps_grey_grey() -> None:
    image = noise(8, 8)
    assert np.array_equal(color_jitter(np.random.default_rng(0), image, 0.0), image)
    changed = color_jitter(np.random.default_rng(0), image, 0.5)
    assert changed.dtype == np.uint8
    assert np.abs(changed.astype(int) - image).mean() > 5
    assert np.array_equal(changed, color_jitter(np.random.default_rng(0), image, 0.5))
    flat = color_jitter(np.random.default_rng(3), np.full((4, 4, 3), 90, np.uint8), 0.5).astype(int)
    assert np.ptp(flat) <= 1
    warm = np.full((4, 4, 3), (120, 100, 80), np.uint8)  # brighter, darker or paler, but of no other hue
    red, green, blue = color_jitter(np.random.default_rng(3), warm, 0.5)[0, 0].astype(int)
    assert red > green > blue and abs((red - green) - (green - blue)) <= 2


def test_normalize_against_the_formula() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor(CLIP_MEAN).double().view(3, 1, 1)) / torch.tensor(
        CLIP_STD
    ).double().view(3, 1, 1)
    assert torch.allclose(normalize(pixels).double(), expected, atol=1e-5)
    assert normalize(pixels, dtype=torch.bfloat16).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("shape", [(50, 80), (224, 224), (300, 200)])
def test_the_evaluation_transform_is_flavas(shape: tuple[int, int]) -> None:
    from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

    picture = Image.fromarray(noise(*shape))
    theirs = FlavaImageProcessorPil()(picture, return_tensors="pt")["pixel_values"]
    ours = ImageTransform()(picture)
    assert ours.dtype == torch.uint8
    assert torch.allclose(normalize(ours[None]), theirs, atol=1e-5)


@pytest.mark.parametrize("shape", [(50, 80), (91, 64), (33, 33)])
def test_center_crop_is_clips(shape: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = Image.fromarray(noise(*shape))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.allclose(normalize(ImageTransform(size=32, crop="center")(picture)[None]), theirs, atol=1e-5)


@pytest.mark.parametrize("shape", [(50, 80), (91, 64), (37, 37), (32, 32)])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_a_middle_smaller_than_what_it_is_cut_out_of(shape: tuple[int, int], crop: Literal["center", "squash"]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = Image.fromarray(noise(*shape))
    size = {"shortest_edge": 37} if crop == "center" else {"height": 37, "width": 37}
    theirs = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})(picture, return_tensors="pt")
    ours = ImageTransform(size=32, crop=crop, resize=37)
    assert torch.allclose(normalize(ours(picture)[None]), theirs["pixel_values"], atol=1e-5)
    assert ours.cuts and not replace(ours, resize=None, crop="squash").cuts


def test_a_transform_at_another_size_sees_as_much_of_a_picture() -> None:
    dino = ImageTransform(224, crop="center", resize=256)
    assert dino.at(224) == dino
    assert dino.at(384) == ImageTransform(384, crop="center", resize=438)
    assert ImageTransform(224).at(384) == ImageTransform(384)


def test_a_file_that_says_no_resize_has_none() -> None:
    values = json.loads(ImageTransform().to_json())
    del values["resize"]  # as files of older versions
    assert ImageTransform.from_json(json.dumps(values)) == ImageTransform()


def test_bytes_pixels_and_pillow_pictures_are_the_same_picture() -> None:
    pixels = noise(40, 30)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    transform = ImageTransform(size=16)
    views = [transform(buffer.getvalue()), transform(pixels), transform(Image.fromarray(pixels))]
    assert all(torch.equal(view, views[0]) for view in views)
    assert views[0].is_contiguous()
    untouched = ImageTransform(size=40)(noise(40, 40))
    assert np.array_equal(untouched.permute(1, 2, 0).numpy(), noise(40, 40))


@pytest.mark.parametrize(
    "transform",
    [ImageTransform(), ImageTransform(64, "lanczos", (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), "center", resize=73)],
)
def test_json_round_trip(transform: ImageTransform) -> None:
    assert ImageTransform.from_json(transform.to_json()) == transform


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": 3}, "field 'sizes'; its fields are size, filter, mean, std, crop, longest, resize"),
        ({"size": "224"}, "whole number of pixels, not '224'"),
        ({"size": 0}, "whole number"),
        ({"filter": "cubic"}, "no filter 'cubic'.*bicubic"),
        ({"crop": "none"}, "no crop 'none'.*squash, center"),
        ({"mean": [0.5]}, "mean .* three numbers"),
        ({"std": [1, 1, 0]}, "std .* above 0"),
        ({"std": 1}, "std .* three numbers"),
        ({"resize": 223}, "resize .* must be 224 or more, not 223"),
        ({"resize": "256"}, "resize .* 224 or more, not '256'"),
        ({"resize": 256, "crop": "shortest"}, "left out where the crop is 'shortest'"),
    ],
)
def test_a_wrong_preprocessor_file_gives_one_sentence(change: dict[str, object], message: str) -> None:
    values = json.loads(ImageTransform().to_json()) | change
    with pytest.raises(TriviumError, match=message):
        ImageTransform.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_what_is_no_json_object(text: str) -> None:
    with pytest.raises(TriviumError, match=r"preprocessor.json\) is no JSON"):
        ImageTransform.from_json(text)
