"""results.json and its intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from trivium import manifest
from trivium.errors import TriviumError
from trivium.evaluate import results
from trivium.evaluate.results import Result


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(60):
        found = results.mean_of(rng.random(150) < 0.3)
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= 0.3 <= found.high)
    assert np.mean(covered) >= 0.85


def test_interval_of_a_constant_has_no_width_and_repeats_itself() -> None:
    assert results.mean_of(np.ones(9)) == Result(1.0, 1.0, 1.0, 9)
    values = np.random.default_rng(1).normal(size=40)
    assert results.median_of(values) == results.median_of(values)


def write(path: Path, found: dict[str, Result]) -> None:
    seconds = {"train": 1.5, "total": 2.0}
    results.write(path, found, command="trivium demo", version="0.1", machine={"cores": 2}, seconds=seconds)


def test_the_mean_over_two_splits_draws_the_units_of_each_for_themselves() -> None:
    rng = np.random.default_rng(3)
    few, many = (rng.random(n) < share for n, share in ((40, 0.9), (4000, 0.5)))
    parts = [results.mean_of(hits, [f"{len(hits)} {number}" for number in range(len(hits))]) for hits in (few, many)]
    found = results.mean_over(parts)
    assert found.value == pytest.approx((few.mean() + many.mean()) / 2) and found.n == 4040
    deviation = math.sqrt(few.var() / 40 + many.var() / 4000) / 2
    assert found.low == pytest.approx(found.value - 1.96 * deviation, abs=0.004)
    assert found.high == pytest.approx(found.value + 1.96 * deviation, abs=0.004)
    assert results.mean_over([parts[0], results.mean_of(many)]).low is None, "without its units"


def test_units_of_one_group_are_drawn_together() -> None:
    rng = np.random.default_rng(5)
    hits = rng.random(200) < 0.3
    alone = results.mean_of(hits)
    five = results.mean_of(np.repeat(hits, 5), groups=[f"picture {n // 5}" for n in range(1000)])
    assert (five.value, five.low, five.high, five.n) == (alone.value, alone.low, alone.high, 1000), "no more is known"
    assert results.mean_of(hits, groups=[str(n) for n in range(200)]) == alone
    # Groups of several sizes, whose units are anywhere: the ratio of two sums, one of each drawn group.
    number = rng.integers(150, size=600)
    values = rng.normal(size=150)[number] + rng.normal(size=600)
    drawn = results.Draws(600, [str(n) for n in number])(np.random.default_rng(0))
    times = np.bincount(drawn, minlength=600)
    assert all(len(set(times[number == n])) == 1 for n in set(number)), "a group whole, as often as it was drawn"
    found = results.mean_of(values, groups=[str(n) for n in number])
    sums, sizes = (np.bincount(number, weights, 150) for weights in (values, None))
    deviation = float(np.sqrt(((sums - found.value * sizes) ** 2).sum())) / 600
    assert found.low == pytest.approx(found.value - 1.96 * deviation, rel=0.1, abs=0.02)
    assert found.high == pytest.approx(found.value + 1.96 * deviation, rel=0.1, abs=0.02)


def test_file_holds_what_the_contract_names_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "results.json"
    write(path, {"a.b": Result(0.5, 0.4, 0.6, 10), "peer": Result(1.0, published=2.0), "bad": Result(math.nan)})
    content = json.loads(path.read_text())
    assert list(content) == ["schema", "command", "version", "machine", "seconds", "results"]
    assert content["seconds"] == {"train": 1.5, "total": 2.0}
    assert content["results"]["a.b"] == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    assert content["results"]["peer"]["published"] == 2.0
    assert content["results"]["bad"]["value"] is None
    back = results.read(path)
    assert back["seconds.train"].value == 1.5
    assert back["a.b"] == Result(0.5, 0.4, 0.6, 10)
    assert math.isnan(back["bad"].value)
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write(path, {"a": Result(1.0)})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest.os, "fsync", full)
    with pytest.raises(TriviumError, match=r"results\.json cannot be written \(No space left on device\)"):
        write(path, {"a": Result(2.0)})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema": 99, "results": {}}', '{"schema": 1, "results": {"a": 3}}']
)
def test_a_foreign_file_is_one_clear_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(TriviumError, match="evaluate again"):
        results.read(path)
    with pytest.raises(TriviumError, match="evaluate first"):
        results.read(tmp_path / "none.json")
