"""Loss curves that are kept beside the tests, and how a run is held to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest


def hold(found: Mapping[str, Sequence[float]], path: Path, request: pytest.FixtureRequest) -> None:
    """Each curve is the stored one, within what processors differ by; --regenerate-golden stores it anew first."""
    if request.config.getoption("--regenerate-golden"):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
        path.write_text(f"{{\n{lines}\n}}\n")
    stored = json.loads(path.read_text())
    assert set(found) == set(stored)
    for name, values in stored.items():
        assert found[name] == pytest.approx(values, abs=1e-3), name


def fall(values: Sequence[float]) -> float:
    """From the mean of the first four steps to that of the last four, which is once through the batches of a curve; of
    a curve of fewer than eight steps from half to half."""
    width = min(4, len(values) // 2)
    return (sum(values[:width]) - sum(values[-width:])) / width
