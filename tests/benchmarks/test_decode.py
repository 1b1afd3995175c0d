"""What the benchmark of decoding decodes."""

from __future__ import annotations

import statistics

import decode


def test_a_picture_has_the_bytes_of_a_photograph() -> None:
    """The time of decoding goes with them."""
    assert 18_000 < statistics.mean(map(len, decode.jpegs(*decode.SHAPES["256 px"]))) < 22_000
