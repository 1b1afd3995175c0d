"""No test of a benchmark writes among the figures that were measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import side_by_side


@pytest.fixture(scope="module", autouse=True)
def results_stay() -> Iterator[None]:
    before = digests()
    yield
    assert digests() == before


def digests() -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in side_by_side.RESULTS.iterdir()}
