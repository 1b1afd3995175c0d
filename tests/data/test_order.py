"""The order of samples: a permutation in each epoch, mixed in windows, pure, and false pairs that rotate captions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.order import Draws, Order, keyed_generator, pair_rows, permute
from trivium.errors import TriviumError


def blocks_of(sizes: list[int]) -> list[range]:
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


layouts = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    index = np.arange(size)
    image = permute(index, np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(image.tolist()) == index.tolist()


def test_permute_looks_random() -> None:
    """Over many keys every index of a small range lands everywhere about equally often, and neighbours part."""
    keys = np.array([keyed_generator("key", number).integers(0, 2**63) for number in range(6000)], dtype=np.uint64)
    for size in (7, 16, 31):
        for index in (0, size // 2, size - 1):
            landed = permute(np.full(6000, index), np.full(6000, size), keys)
            counts = np.bincount(landed, minlength=size)
            chi_square = np.sum((counts - 6000 / size) ** 2 / (6000 / size))
            assert chi_square < 3 * size + 12  # far above the 99.9 % point of a uniform law
    size = 100_000
    image = permute(np.arange(size), np.full(size, size), np.full(size, keys[0]))
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(image, np.arange(size))[0, 1]) < 0.02


@settings(max_examples=100, deadline=None)
@given(sizes=layouts, window=st.integers(1, 8), seed=st.integers(0, 2**40), epoch=st.integers(0, 3))
def test_every_row_once_an_epoch(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    num_rows = sum(sizes)
    order = Order(num_rows, blocks_of(sizes), seed, "pairs", window)
    places = np.arange(epoch * num_rows, (epoch + 1) * num_rows)
    assert sorted(order.rows(places).tolist()) == list(range(num_rows))


@settings(max_examples=60, deadline=None)
@given(sizes=layouts, seed=st.integers(0, 2**40), data=st.data())
def test_pure_and_reachable_at_any_place(sizes: list[int], seed: int, data: st.DataObject) -> None:
    """Any set of places, across epochs and in any order, gives what the whole sequence has there."""
    num_rows = sum(sizes)
    whole = Order(num_rows, blocks_of(sizes), seed, "pairs", 4).rows(np.arange(4 * num_rows))
    places = np.array(data.draw(st.lists(st.integers(0, 4 * num_rows - 1), min_size=1, max_size=50)))
    assert np.array_equal(Order(num_rows, blocks_of(sizes), seed, "pairs", 4).rows(places), whole[places])


def test_epochs_seeds_and_streams_differ() -> None:
    blocks = blocks_of([100] * 10)
    first = Order(1000, blocks, 1, "pairs").rows(np.arange(2000))
    assert (first[:1000] != first[1000:]).mean() > 0.9
    assert (first != Order(1000, blocks, 2, "pairs").rows(np.arange(2000))).mean() > 0.9
    assert (first != Order(1000, blocks, 1, "text").rows(np.arange(2000))).mean() > 0.9


def test_a_window_reads_few_blocks() -> None:
    """Inside a window of 4 blocks of 50 rows only 4 blocks are touched, well mixed; the blocks are not neighbours."""
    order = Order(5000, blocks_of([50] * 100), 7, "pairs", window=4)
    rows = order.rows(np.arange(5000)).reshape(25, 200)
    for window in rows:
        assert len(np.unique(window // 50)) == 4
        assert len(np.unique(window[:50] // 50)) == 4  # mixed from the first rows on
    neighbours = sum(np.ptp(np.unique(window // 50)) == 3 for window in rows)
    assert neighbours < 3


def test_a_billion_rows_need_no_table() -> None:
    num_rows = 10**9 + 7
    order = Order(num_rows, [range(num_rows)], 3, "pairs")
    places = np.array([0, 1, num_rows - 1, num_rows, 10 * num_rows + 12345])
    rows = order.rows(places)
    assert ((rows >= 0) & (rows < num_rows)).all()
    assert len(np.unique(rows)) == len(rows)
    assert np.array_equal(rows[3:4], order.rows(places[3:4]))


def test_a_billion_rows_in_a_million_blocks() -> None:
    """Windows far apart, of two epochs: each holds whole blocks, no row comes twice, and any place alone agrees."""
    num_blocks, window = 10**6, 16
    sizes = np.full(num_blocks, 1000)
    sizes[:-1:3] += 1  # shards are of unequal lengths
    sizes[1::3] -= 1
    ends = np.cumsum(sizes)
    num_rows = int(ends[-1])
    order = Order(
        num_rows, [range(a, b) for a, b in zip((ends - sizes).tolist(), ends.tolist(), strict=True)], 3, "pairs"
    )
    assert num_rows == 10**9
    for epoch in (0, 7):
        layout = order._layout(epoch)[1]
        rows_of_epoch, blocks_of_epoch = [], []
        for number in (0, 1, 31_337, 62_499):  # of 62,500 windows
            first, last = layout[number * window], layout[min((number + 1) * window, num_blocks)]
            rows = order.rows(epoch * num_rows + np.arange(first, last))
            blocks = np.unique(np.searchsorted(ends, rows, side="right"))
            assert len(blocks) == window
            assert sizes[blocks].sum() == len(rows) == len(np.unique(rows))  # these blocks whole, each row once
            early = np.unique(np.searchsorted(ends, rows[:200], side="right"))
            assert len(early) == window  # mixed from the first rows on
            rows_of_epoch.append(rows)
            blocks_of_epoch.append(blocks)
        assert len(np.unique(np.concatenate(blocks_of_epoch))) == 4 * window
        assert len(np.unique(np.concatenate(rows_of_epoch))) == sum(map(len, rows_of_epoch))
    resumed = Order(num_rows, [range(num_rows)], 3, "pairs")  # nothing that was read before matters
    places = np.array([5 * 10**8, 5 * 10**8 + 1])
    assert np.array_equal(resumed.rows(places)[1:], Order(num_rows, [range(num_rows)], 3, "pairs").rows(places[1:]))


def test_the_order_is_fixed_for_ever() -> None:
    """A change here would change what a run that was begun earlier reads when it resumes."""
    order = Order(11, blocks_of([4, 4, 3]), 0, "pairs", window=2)
    assert order.rows(np.arange(22)).tolist() == [2, 8, 10, 0, 9, 3, 1, 5, 4, 7, 6, 9, 2, 3, 1, 10, 0, 8, 4, 6, 5, 7]
    assert Draws(0, "pairs", 5).generator("crop").random() == 0.9363691954052702


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(TriviumError, match="'text' has no samples"):
        Order(0, [], 0, "text")


def test_substitutes_depend_on_place_and_attempt() -> None:
    order = Order(10_000, [range(10_000)], 0, "pairs")
    drawn = {order.substitute(place, attempt) for place in range(20) for attempt in range(1, 6)}
    assert len(drawn) > 95
    assert order.substitute(3, 1) == Order(10_000, [range(10_000)], 0, "pairs").substitute(3, 1)


@settings(max_examples=60, deadline=None)
@given(rate=st.floats(0, 1), seed=st.integers(0, 2**32), first=st.integers(0, 10_000), rows=st.integers(1, 64))
def test_false_pairs_keep_every_caption(rate: float, seed: int, first: int, rows: int) -> None:
    order = Order(1000, blocks_of([125] * 8), seed, "pairs")
    places = np.arange(first, first + rows)
    image_rows, text_rows = pair_rows(places, order, rate, seed, "pairs")
    assert np.array_equal(image_rows, order.rows(places))
    assert sorted(image_rows.tolist()) == sorted(text_rows.tolist())
    moved = np.flatnonzero(image_rows != text_rows)
    assert np.array_equal(text_rows[moved], np.roll(image_rows[moved], 1))  # one rotation, by one


def test_false_pairs_have_their_share_and_a_single_one_stays_true() -> None:
    order = Order(100_000, [range(100_000)], 5, "pairs")
    image_rows, text_rows = pair_rows(np.arange(100_000), order, 0.1, 5, "pairs")
    assert abs((image_rows != text_rows).mean() - 0.1) < 0.004
    places = np.arange(1000)
    chosen = np.flatnonzero(image_rows[:1000] != text_rows[:1000])
    alone = pair_rows(places[chosen[:1]], order, 0.1, 5, "pairs")
    assert np.array_equal(*alone)
    two = pair_rows(places[chosen[:2]], order, 0.1, 5, "pairs")
    assert np.array_equal(two[0], two[1][::-1])  # the choice is by place: the same two are chosen again
    everyone = pair_rows(np.arange(8), order, 1.0, 5, "pairs")
    assert (everyone[0] != everyone[1]).all()


def test_draws_are_named_and_pure() -> None:
    draws = Draws(1, "pairs", 9)
    assert draws.generator("crop").random(4).tolist() == Draws(1, "pairs", 9).generator("crop").random(4).tolist()
    others = [Draws(2, "pairs", 9), Draws(1, "text", 9), Draws(1, "pairs", 10)]
    firsts = {d.generator(name).random() for d in [draws, *others] for name in ("crop", "mask")}
    assert len(firsts) == 8
    means = [Draws(0, "pairs", place).generator("crop").random() for place in range(4000)]
    assert abs(np.mean(means) - 0.5) < 0.02
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.06
