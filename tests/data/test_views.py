"""Views: which part of a picture, and how small a picture may be decoded for it."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trivium.data.views import WHOLE, Views


def jpeg(height: int, width: int) -> bytes:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (3 + 5 * c)) * 50 + np.cos(columns / (4 + 3 * c)) * 50 + 128 for c in range(3)]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@given(
    st.integers(40, 900),
    st.integers(40, 900),
    st.sampled_from([(0.9, 1.0), (0.5, 1.0), (0.08, 1.0)]),
    st.integers(0, 2**32),
)
def test_no_crop_of_a_reduced_picture_is_enlarged(
    height: int, width: int, scale: tuple[float, float], seed: int
) -> None:
    views = Views(32, crop_scale=scale, scaled_decode=True)
    assert views.min_side is not None
    by = next((by for by in (8, 4, 2) if min(height, width) // by >= views.min_side), 1)
    if by == 1:
        return
    box = views.draw(np.random.default_rng(seed), math.ceil(height / by), math.ceil(width / by)).box
    assert box is not None
    assert min(box.width, box.height) >= 31  # of 32: a box has whole pixels


def test_a_large_picture_is_decoded_at_a_fraction_only_where_that_was_asked_for() -> None:
    data = jpeg(480, 640)
    assert Views(64).decode(data).shape == (480, 640, 3)
    reduced = Views(64, scaled_decode=True)
    assert reduced.decode(data).shape == (120, 160, 3)
    assert Views(64, codebook_size=128, scaled_decode=True).decode(data).shape == (240, 320, 3)
    plain, fast = Views(64).for_model(Views(64).decode(data), WHOLE), reduced.for_model(reduced.decode(data), WHOLE)
    assert np.abs(plain.astype(int) - fast).mean() < 1
    assert np.array_equal(fast, reduced.for_model(reduced.decode(data), WHOLE))


def test_a_cache_of_codes_knows_of_reduced_pictures_alone() -> None:
    """Caches of whole pictures are those of before."""
    settings = Views(64).codebook_settings()
    assert set(settings) == {"size", "filter", "crop_scale", "crop_ratio", "flip"}
    assert Views(64, scaled_decode=True).codebook_settings() == settings | {"min_side": 78}


@pytest.mark.parametrize(("height", "width"), [(480, 480), (480, 1120), (900, 480)])
def test_squares_are_a_share_of_the_shorter_side_whatever_the_shape(height: int, width: int) -> None:
    """From 2/3 to 8/9 of it, as DALL-E's tokenizer was trained, at any place."""
    views, rng = Views(256, crop_scale=(0.44, 0.79), crop_ratio=(1.0, 1.0)), np.random.default_rng(0)
    boxes = [box for _ in range(500) if (box := views.draw(rng, height, width).box) is not None]
    assert all(box.width == box.height for box in boxes)
    sides = np.array([box.width for box in boxes])
    assert 318 <= sides.min() < 325 and 420 < sides.max() <= 427
    for starts, whole in (([box.left for box in boxes], width), ([box.top for box in boxes], height)):
        assert min(starts) < 0.06 * whole and (np.array(starts) + sides).max() > 0.94 * whole
        assert (np.array(starts) + sides).max() <= whole


@pytest.mark.parametrize("filter", ["bicubic", "lanczos"])
def test_a_flipped_view_is_the_mirror_of_the_view(filter: str) -> None:
    views = Views(24, filter=filter, flip=1.0)  # type: ignore[arg-type]
    picture_HWC = views.decode(jpeg(50, 70))
    view = views.draw(np.random.default_rng(3), 50, 70)
    assert view.flip
    straight = views.for_model(picture_HWC, replace(view, flip=False))
    assert np.array_equal(views.for_model(picture_HWC, view), straight[:, :, ::-1])
