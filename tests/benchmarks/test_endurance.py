"""The long benchmarks of the engine in small: what they count is what happened."""

from __future__ import annotations

from pathlib import Path

import bad_samples
import pytest
import soak

from trivium.errors import TriviumError


def test_a_short_soak_reads_memory_and_files_as_often_as_it_says(tmp_path: Path) -> None:
    found = soak.soak(120, tmp_path / "run", every=10, warm=20)
    memory, files = found["memory"], found["files"]
    assert isinstance(memory, list) and isinstance(files, list)
    assert len(memory) == len(files) == 12
    assert found["files_more"] < 6, "one save may be under way; twenty that left a file open would be more"
    assert found["memory_growth"] == memory[-1] / memory[1] - 1
    assert min(memory) > 50 << 20, "bytes of a process that holds torch"


def test_broken_samples_in_small_are_counted_exactly_and_move_no_other() -> None:
    found = bad_samples.measured(6_000, workers=2)
    assert found["broken"] == 60
    assert found["replaced"] == found["expected"] >= 60
    assert found["count_exact"] and found["misplaced"] == 0


def test_more_broken_samples_than_the_rate_allows_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bad_samples.Replaced
    monkeypatch.setattr(bad_samples, "Replaced", lambda path, rate: real(path, rate=rate / 10))
    with pytest.raises(TriviumError, match=r"more than 0\.5% of"):
        bad_samples.measured(20_000, workers=0)
