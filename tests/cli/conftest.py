"""A shop and a run on it, made once for the tests of the verbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.shop import data_of, flags, make_shop, trivium


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("shop") / "data")


@pytest.fixture(scope="session")
def trained(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, two of each stream, with validation pairs."""
    out = tmp_path_factory.mktemp("run") / "trained"
    words = ["--out", out, *data_of(shop), "--data.validation", shop / "goods.csv", *flags(train__save_every=3)]
    assert trivium("pretrain", "flava", *words) == 0
    return out
