"""What a run states of its data: the same for the same blocks, however a source holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_run
from tiny_run import TinySource

from trivium.data.order import Order
from trivium.data.sources import Concat
from trivium.train.agreement import facts_of
from trivium.train.protocol import Blocks, Stream


class Cut(TinySource):
    def __init__(self, blocks: Sequence[range]) -> None:
        super().__init__(rows=int(Blocks.of(blocks).bounds[-1]))
        self.cut = blocks

    def blocks(self) -> Any:
        return self.cut


class Unlisted(Blocks):
    """Of a million blocks none is to become an object when a run begins."""

    def __getitem__(self, number: Any) -> Any:
        raise AssertionError("a block was made")


LISTED = [range(3), range(3, 3), range(3, 10)]


def test_the_digest_of_the_blocks_is_fixed_for_ever() -> None:
    """A change here would keep runs that were begun earlier from going on."""
    digest = hashlib.sha256(b"".join(size.to_bytes(8, "little") for size in (3, 0, 7))).hexdigest()
    for blocks in (LISTED, Blocks(np.array([0, 3, 3, 10])), Unlisted(np.array([0, 3, 3, 10]))):
        stream = Stream("pairs", Cut(blocks), tiny_run.TinyCollate(), 2, 1)
        assert facts_of([stream]) == {"pairs": {"rows": 10, "blocks": digest}}


def test_blocks_are_a_sequence_of_ranges() -> None:
    blocks = Blocks.of(LISTED)
    assert (list(blocks), len(blocks), blocks[-1], blocks[1:]) == (LISTED, 3, LISTED[-1], LISTED[1:])
    assert Blocks.of(blocks) is blocks
    with pytest.raises(IndexError):
        blocks[3]
    with pytest.raises(AssertionError, match="in order"):
        Blocks.of([range(3), range(4, 5)])


def test_an_order_and_joined_sources_make_no_block() -> None:
    unlisted = Unlisted(np.array([0, 3, 3, 10]))
    places = np.arange(20)
    listed_rows = Order(10, LISTED, 1, "pairs", 2).rows(places)
    assert np.array_equal(Order(10, unlisted, 1, "pairs", 2).rows(places), listed_rows)
    joined = Concat([Cut(unlisted), Cut(LISTED), Cut(unlisted)]).blocks()
    assert isinstance(joined, Blocks)
    assert joined.bounds.tolist() == [0, 3, 3, 10, 13, 13, 20, 23, 23, 30]
