"""Shares of the streams, the place of each step by brute force, round-robin, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import DrawnSource, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.collate import TextCollate, TextInput
from trivium.data.mixture import CYCLE, StreamMixture
from trivium.errors import TriviumError
from trivium.train.protocol import Mixture, Stream

COLLATE = TextCollate(TextInput(tokenizer(), 8))


def streams(*ratios: float, batch: int = 8, micro_batch: int = 2) -> list[Stream]:
    return [
        Stream(f"stream{number}", DrawnSource(40), COLLATE, batch * (number + 1), micro_batch, ratio)
        for number, ratio in enumerate(ratios)
    ]


def test_flava_shares_are_exact_in_every_cycle() -> None:
    mixture = StreamMixture(streams(0.70, 0.15, 0.15), seed=3)
    names = np.array([mixture.stream_at(step).name for step in range(50 * CYCLE)]).reshape(50, CYCLE)
    assert ((names == "stream0").sum(axis=1) == 14).all()
    assert ((names == "stream1").sum(axis=1) == 3).all()
    assert len({tuple(cycle) for cycle in names}) == 50  # dealt anew each time
    early = np.stack([names[:, position] == "stream0" for position in range(CYCLE)]).mean(axis=1)
    assert early.min() > 0.4  # at every position of a cycle each stream may come
    assert early.max() < 0.95


@settings(max_examples=40, deadline=None)
@given(
    ratios=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    seed=st.integers(0, 2**40),
    schedule=st.sampled_from(["ratio", "round-robin"]),
    start=st.integers(0, 3000),
)
def test_place_equals_a_brute_force_count(ratios: list[float], seed: int, schedule: str, start: int) -> None:
    mixture: Mixture = StreamMixture(streams(*ratios), seed, schedule)  # type: ignore[arg-type]
    fresh = StreamMixture(streams(*ratios), seed, schedule)  # type: ignore[arg-type]
    places = dict.fromkeys([stream.name for stream in streams(*ratios)], 0)
    for step in range(60):
        stream = mixture.stream_at(step)
        assert mixture.place_at(step) == places[stream.name]
        places[stream.name] += stream.batch
    for step in range(60, start):
        places[mixture.stream_at(step).name] += mixture.stream_at(step).batch
    if start >= 60:
        assert fresh.place_at(start) == places[fresh.stream_at(start).name]


def test_any_ratio_is_met_on_average() -> None:
    ratios = np.array([0.617, 0.25, 0.113, 0.02])
    mixture = StreamMixture(streams(*ratios), seed=9)
    numbers = np.array([int(mixture.stream_at(step).name[-1]) for step in range(4000)])
    assert np.abs(np.bincount(numbers, minlength=4) / 4000 - ratios).max() < 0.006
    per_cycle = np.stack([(numbers.reshape(-1, CYCLE) == number).sum(axis=1) for number in range(4)])
    assert (np.abs(per_cycle - CYCLE * ratios[:, None]) < 2).all()


def test_a_step_far_ahead_is_reached_at_once() -> None:
    mixture = StreamMixture(streams(0.70, 0.15, 0.15), seed=1)
    step = 10**6
    stream = mixture.stream_at(step)
    share = {"stream0": 0.70, "stream1": 0.15, "stream2": 0.15}[stream.name]
    assert abs(mixture.place_at(step) / stream.batch - share * step) <= CYCLE


def test_seeds_differ_and_zero_ratios_are_dropped() -> None:
    first, second = (StreamMixture(streams(1, 0, 1), seed) for seed in (1, 2))
    names = [[mixture.stream_at(step).name for step in range(200)] for mixture in (first, second)]
    assert names[0] != names[1]
    assert set(names[0]) == {"stream0", "stream2"}
    assert 90 <= names[0].count("stream0") <= 110


def test_round_robin() -> None:
    mixture = StreamMixture(streams(5, 1, 1), seed=0, schedule="round-robin")
    assert [mixture.stream_at(step).name[-1] for step in range(7)] == list("0120120")
    assert [mixture.place_at(step) for step in range(7)] == [0, 0, 0, 8, 16, 24, 16]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TriviumError, match="'stream0': a global batch of 8 cannot be cut into micro-batches of 3"):
        StreamMixture(streams(1.0, micro_batch=3), seed=0)
    with pytest.raises(TriviumError, match="no stream with a ratio above 0"):
        StreamMixture(streams(0.0, 0.0), seed=0)
    with pytest.raises(TriviumError, match="ratio -1"):
        StreamMixture(streams(1.0, -1.0), seed=0)
    with pytest.raises(TriviumError, match="share a name"):
        StreamMixture(streams(1.0) + streams(1.0), seed=0)
    with pytest.raises(TriviumError, match="'stream0': 3 processes cannot share a global batch of 8 evenly"):
        StreamMixture(streams(1.0), seed=0).loader(0, 0, 3, 1)
    with pytest.raises(TriviumError, match=r"4 processes cannot share 2 micro-batches .* --train.micro-batch 2$"):
        StreamMixture(streams(1.0, micro_batch=4), seed=0).loader(0, 0, 4, 1)
    StreamMixture(streams(1.0, micro_batch=2), seed=0).loader(0, 0, 4, 1)  # what it says will do
