"""Multi-crop: seeded by place and number of the crop, published probabilities, what each change does to colours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import DrawnSource, drawn_picture
from PIL import Image, ImageFilter, ImageOps

from trivium.data.crops import CropCollate, MultiCrop
from trivium.data.decode import decode
from trivium.data.loader import StreamReader, read
from trivium.data.order import Draws
from trivium.data.transforms import Recoloring, blurred, crop_and_resize, recolored, solarised
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import Batch, Stream

CROPS = MultiCrop(global_size=16, local_size=8, num_local=3)
PLAIN = replace(CROPS, flip=0.0, jitter=0.0, grey=0.0, blur=(0.0, 0.0, 0.0), solarise=(0.0, 0.0, 0.0))


def batch_of(collate: CropCollate, places: list[int], seed: int = 0) -> Batch:
    source = DrawnSource(100)
    prepared = [read(source, collate, place, place, Draws(seed, "crops", place)) for place in places]
    return collate.batch("crops", prepared, torch.arange(len(places)), torch.tensor(places), 3, ["one"])


def equal(first: Batch, second: Batch) -> bool:
    pairs = zip(first.images, second.images, strict=True)
    return all(torch.equal(a.pixels_BCHW, b.pixels_BCHW) for a, b in pairs)


def test_a_batch_of_crops() -> None:
    batch = batch_of(CropCollate(CROPS, 4), [5, 6, 7])
    assert [images.pixels_BCHW.shape[1:] for images in batch.images] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * 3
    assert all(images.pixels_BCHW.dtype == torch.uint8 for images in batch.images)
    assert (batch.number, batch.bad, batch.targets) == (3, ("one",), {})
    assert batch.images[0].same_B.tolist() == batch.images[4].same_B.tolist() == [5, 6, 7]
    pixels = [images.pixels_BCHW for images in batch.images]
    assert not torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[2], pixels[3])


def test_crops_are_functions_of_seed_and_place_alone() -> None:
    collate = CropCollate(CROPS, 4)
    whole, part = batch_of(collate, [5, 6, 7]), batch_of(collate, [6])
    assert all(torch.equal(a.pixels_BCHW[1:2], b.pixels_BCHW) for a, b in zip(whole.images, part.images, strict=True))
    assert equal(whole, batch_of(CropCollate(CROPS, 4, cache_bytes=1 << 20), [5, 6, 7]))
    assert not equal(whole, batch_of(collate, [5, 6, 7], seed=1))
    more = batch_of(CropCollate(replace(CROPS, num_local=5), 4), [5, 6, 7])  # the others stay as they were
    assert equal(whole, Batch("", whole.rows_B, whole.places_B, more.images[:5]))


def test_any_micro_batch_has_the_crops_of_the_whole() -> None:
    whole = StreamReader(Stream("crops", DrawnSource(40), CropCollate(CROPS, 4), 8, 8), seed=3)
    halves = StreamReader(Stream("crops", DrawnSource(40), CropCollate(CROPS, 4), 8, 4), seed=3)
    first, parts = whole.micro_batch(16, 0), [halves.micro_batch(16, number) for number in (0, 1)]
    for number, images in enumerate(first.images):
        assert torch.equal(images.pixels_BCHW, torch.cat([part.images[number].pixels_BCHW for part in parts]))


def test_without_changes_a_crop_is_a_part_of_the_picture() -> None:
    picture = decode(drawn_picture(3, 40, 40))
    whole = replace(PLAIN, global_scale=(1.0, 1.0))
    crop = whole.crop(picture, Draws(0, "crops", 9), 0)
    found = [crop_and_resize(picture, 16, None)]
    assert crop.shape == (3, 16, 16)
    assert np.abs(crop.astype(int).mean() - found[0].astype(int).mean()) < 8  # up to the aspect
    flipped = replace(whole, flip=1.0).crop(picture, Draws(0, "crops", 9), 0)
    assert np.array_equal(flipped, crop[:, :, ::-1])


def test_how_often_each_change_happens() -> None:
    """Of a flat colour picture every change but flip and crop shows; probabilities are per kind of crop."""
    picture = np.full((32, 32, 3), (200, 60, 90), np.uint8)
    published = replace(PLAIN, jitter=0.8, grey=0.2, solarise=(0.0, 0.2, 0.0))

    def share(crops: MultiCrop, number: int, changed: object) -> float:
        found = [crops.crop(picture, Draws(0, "crops", place), number) for place in range(600)]
        return float(np.mean([changed(crop) for crop in found]))  # type: ignore[operator]

    untouched = crop_and_resize(picture, 16, None)
    grey = share(replace(published, jitter=0.0, solarise=(0.0,) * 3), 0, lambda crop: np.ptp(crop, axis=0).max() <= 1)
    assert grey == pytest.approx(0.2, abs=0.05)
    jittered = share(
        replace(published, grey=0.0, solarise=(0.0,) * 3), 0, lambda crop: not np.array_equal(crop, untouched)
    )
    assert jittered == pytest.approx(0.8, abs=0.05)
    plain = replace(published, jitter=0.0, grey=0.0)
    solarised_first, solarised_second = (share(plain, n, lambda crop: crop[0].max() < 100) for n in (0, 1))
    assert solarised_first == 0
    assert solarised_second == pytest.approx(0.2, abs=0.05)


def test_jitter_stays_within_its_strengths() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    crops = replace(PLAIN, jitter=1.0, brightness=0.4, contrast=0.0, saturation=0.0, hue=0.0)
    values = [int(crops.crop(grey, Draws(0, "crops", place), 0).max()) for place in range(300)]
    assert 60 <= min(values) < 68 and 132 < max(values) <= 140
    soft = np.full((8, 8, 3), (150, 100, 110), np.uint8)  # turned to any side it stays inside of the cube of colours
    chroma = np.array([[0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    turned = replace(crops, brightness=0.0, hue=0.1)
    colors = np.array([turned.crop(soft, Draws(0, "crops", place), 0)[:, 0, 0] for place in range(200)], float)
    after = colors @ chroma.T
    angles = np.angle((after[:, 0] + 1j * after[:, 1]) / complex(*(chroma @ soft[0, 0]))) / (2 * np.pi)
    assert 0.09 < angles.max() < 0.11 and -0.11 < angles.min() < -0.09  # a tenth of the circle


def test_changes_are_pillows() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    image = Image.fromarray(picture)
    assert np.array_equal(solarised(picture), np.asarray(ImageOps.solarize(image, 128)))
    assert np.array_equal(blurred(picture, 1.3), np.asarray(image.filter(ImageFilter.GaussianBlur(1.3))))
    grey = recolored(picture, Recoloring(saturation=0.0)).astype(int)
    assert np.abs(grey - np.asarray(image.convert("L"))[..., None]).max() <= 1
    brighter = recolored(picture, Recoloring(brightness=0.7)).astype(int)
    assert np.abs(brighter - np.rint(picture * 0.7)).max() <= 1
    assert np.array_equal(recolored(picture, Recoloring()), picture)


def test_hidden_patches_of_global_crops() -> None:
    masks = torch.cat([batch_of(CropCollate(CROPS, 2, masked=True), [place]).targets["patch_mask"] for place in
                       range(200)])  # fmt: skip
    assert masks.shape == (200, 2, 64) and masks.dtype == torch.bool
    hidden = masks.sum(-1)
    assert float((hidden > 0).float().mean()) == pytest.approx(0.5, abs=0.08)
    assert hidden.max() <= 32
    assert not torch.equal(masks[:, 0], masks[:, 1])
    again = batch_of(CropCollate(CROPS, 2, masked=True), [7]).targets["patch_mask"]
    assert torch.equal(again[0], masks[7])


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(TriviumError, match="local crop of 8 pixels cannot be cut into patches of 16"):
        CropCollate(CROPS, 16)
    with pytest.raises(BadSample, match="has no picture"):
        CropCollate(CROPS, 4).prepare({"name": "row 3", "same_image": 3}, Draws(0, "crops", 3))
