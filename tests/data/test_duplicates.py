"""Fingerprints of pictures, and the search for close ones beside a comparison of all with all."""

from __future__ import annotations

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.data.drawn import photograph
from trivium.data.decode import decode
from trivium.data.duplicates import BITS, DISTANCE, close_pairs, fingerprint, groups, near_pairs
from trivium.data.embedded import emoji


def jpeg(picture: Image.Image, quality: int, scale: float = 1.0) -> bytes:
    sides = round(picture.width * scale), round(picture.height * scale)
    file = io.BytesIO()
    picture.resize(sides, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def all_with_all(hashes: list[int], distance: int) -> list[list[int]]:
    return [
        [one, other]
        for one in range(len(hashes))
        for other in range(one + 1, len(hashes))
        if (hashes[one] ^ hashes[other]).bit_count() <= distance
    ]


@given(
    st.lists(st.integers(0, 2**BITS - 1), max_size=12),
    st.lists(st.tuples(st.integers(0, 40), st.sets(st.integers(0, BITS - 1), max_size=9)), max_size=40),
    st.integers(0, 9),
)
def test_the_search_finds_what_a_comparison_of_all_finds(
    drawn: list[int], changed: list[tuple[int, set[int]]], distance: int
) -> None:
    """Hashes far apart, and some with a few bits turned over, at any place: at, below and above the distance."""
    hashes = [0, 2**BITS - 1, *drawn]
    for number, bits in changed:
        hashes.append(hashes[number % len(hashes)] ^ sum(1 << bit for bit in bits))
    assert close_pairs(np.array(hashes, dtype=np.uint64), distance).tolist() == all_with_all(hashes, distance)


def test_the_search_on_many_hashes_that_are_alike() -> None:
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2**63, 40).tolist()
    hashes = [
        int(rng.choice(centres)) ^ sum(1 << int(bit) for bit in rng.integers(0, BITS, rng.integers(6)))
        for _ in range(700)
    ]
    pairs = close_pairs(np.array(hashes, dtype=np.uint64), DISTANCE).tolist()
    assert pairs == all_with_all(hashes, DISTANCE)
    assert len(pairs) > 1000


def test_nothing_and_one_have_no_pairs() -> None:
    assert close_pairs(np.zeros(0, np.uint64), DISTANCE).shape == (0, 2)
    assert close_pairs(np.zeros(1, np.uint64), DISTANCE).shape == (0, 2)
    assert near_pairs([]).shape == (0, 2)


def test_another_encoding_of_a_photograph_is_near_and_another_photograph_is_not() -> None:
    originals = [photograph(number) for number in range(60)]
    copies = [jpeg(each, quality, scale) for each in originals for quality, scale in ((90, 1.0), (50, 1.0), (75, 0.5))]
    prints = [fingerprint(np.asarray(each)) for each in originals] + [fingerprint(decode(each)) for each in copies]
    assert len({each.pixels for each in prints}) == 240
    found = groups(near_pairs(prints), len(prints))
    assert sorted(found) == [[row, *range(60 + 3 * row, 63 + 3 * row)] for row in range(60)]


def test_colours_part_what_the_luma_does_not() -> None:
    hearts = {record.name: decode(record.image) for record in emoji("twemoji") if record.name.endswith(" heart")}
    blue, red = fingerprint(hearts["light blue heart"]), fingerprint(hearts["red heart"])
    assert (blue.hash ^ red.hash).bit_count() <= DISTANCE
    assert near_pairs([blue, red]).tolist() == []
    assert near_pairs([blue, blue, red]).tolist() == [[0, 1]]


def test_pictures_of_one_colour_are_near_where_the_colour_is() -> None:
    flat = [np.full((20, 30, 3), value, np.uint8) for value in (100, 102, 140, 250)]
    assert near_pairs([fingerprint(each) for each in flat]).tolist() == [[0, 1]]


def test_equal_pixels_need_the_same_shape() -> None:
    """The same bytes in another shape are another picture; what the file was does not count."""
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert fingerprint(picture).pixels != fingerprint(picture.reshape(6, 4, 3)).pixels
    assert fingerprint(picture[:, ::-1]).pixels == fingerprint(picture[:, ::-1].copy()).pixels


def test_groups_are_linked_through_others() -> None:
    assert groups(np.array([[4, 7], [1, 2], [0, 7]]), 9) == [[0, 4, 7], [1, 2]]
    assert groups(np.empty((0, 2), np.int64), 3) == []
