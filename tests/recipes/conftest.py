"""A shop and a run on it, made once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.shop import data_of, flags, make_shop, trivium


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("shop") / "data")


@pytest.fixture(scope="session")
def twenty(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that kept its checkpoints of steps 10 and 20."""
    out = tmp_path_factory.mktemp("run") / "twenty"
    assert (
        trivium("pretrain", "flava", "--out", out, *data_of(shop), *flags(train__steps=20, train__save_every=10)) == 0
    )
    return out
